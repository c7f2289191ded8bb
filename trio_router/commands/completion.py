"""`completion`."""

from typing import Literal

from cyclopts import App

from trio_router.commands.said import CLEAN


def completion(shell: Literal["bash", "zsh", "fish"], /, *, app: App) -> int:
    """Print what makes a shell complete commands."""
    print(app.generate_completion(shell=shell))
    if shell == "zsh":  # of itself it is for a file in $fpath, not for `eval`
        print("compdef _cyclopts_trio-router trio-router")
    return CLEAN
