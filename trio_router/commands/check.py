"""`check`."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trio_router.commands.options import AsJson, ConfigFile
from trio_router.commands.said import CLEAN, USAGE, say

if TYPE_CHECKING:
    from trio_router.config import Problem


def check(*, config: ConfigFile = None, ask: bool = False, as_json: AsJson = False, environ: Mapping[str, str]) -> int:
    """Say what is wrong with the configuration and its files, and what each model would need.

    Parameters
    ----------
    ask
        Have llama-server say what each model needs, if nobody knows.
    """
    from trio_router.commands.config import config_path  # noqa: PLC0415  (wrong usage is said without waiting)
    from trio_router.config import ConfigError, load_config, model_file_problems  # noqa: PLC0415

    path = config_path(config, environ)
    try:
        found = load_config(path, environ)
    except ConfigError as error:
        return _checked([], [*error.problems, *model_file_problems(path, error.models)], as_json=as_json)
    from trio_router.commands.needs import needs  # noqa: PLC0415

    return _checked(*needs(found, environ, ask=ask), as_json=as_json)


def _checked(rows: Sequence[tuple[str, ...]], problems: "Sequence[Problem]", *, as_json: bool) -> int:
    if as_json:
        head, *models = rows or [()]
        table = [dict(zip(map(str.lower, head), model, strict=True)) for model in models]
        told = [{name: getattr(problem, name) for name in ("file", "line", "key", "message")} for problem in problems]
        say(json.dumps({"models": table, "problems": told}, indent=2), sys.stdout)
    else:
        from trio_router.commands.config import print_problems  # noqa: PLC0415

        if rows:
            _print_table(rows)
        print_problems(problems)
    return USAGE if problems else CLEAN


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), sys.stdout)
