"""`serve`, `check`, `simulate`: what they read, and what is wrong with it."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from trio_router.commands.said import say
from trio_router.config import CONFIG_PATH, Problem, read_variables

DEFAULT: Final = "router.toml"


def config_path(given: Path | None, environ: Mapping[str, str]) -> Path:
    """`--config`, else CONFIG_PATH (also from ./.env), else ./router.toml."""
    if given is not None:
        return given
    variables, _ = read_variables(Path(), environ)
    return Path(variables[CONFIG_PATH].value if CONFIG_PATH in variables else DEFAULT)


def print_problems(problems: Iterable[Problem]) -> None:
    """A line each."""
    for problem in problems:
        say(str(problem), sys.stderr)
