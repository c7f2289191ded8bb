"""Writes a router.toml, and says where one is wrong."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trio_router.config import Problem

Table = Mapping[str, Any]


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str() | Path():
            return json.dumps(str(value))  # a JSON string without surrogates is a TOML basic string
        case dict():
            return "{" + ", ".join(f"{json.dumps(key)} = {_value(inner)}" for key, inner in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_value, value)) + "]"
    raise TypeError(f"not for TOML here: {value!r}")


def router_toml(
    *,
    models: Mapping[str, Table],
    system: Table | None = None,
    api: Table | None = None,
    keys: Sequence[Table] = (),
) -> str:
    """The file's text."""
    tables = {"api": api or {}, "system": system or {}}
    tables |= {f"models.{json.dumps(alias)}": model for alias, model in models.items()}
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_value(value)}" for key, value in table.items()]
    for key in keys:
        lines.append("[[keys]]")
        lines += [f"{name} = {_value(value)}" for name, value in key.items()]
    return "\n".join([*lines, ""])


def located(problem: Problem) -> str:
    """A problem with its line in front, so that tests can say what they know of its beginning."""
    place = problem.file if problem.line is None else f"{problem.file}:{problem.line}"
    return ": ".join(part for part in (place, problem.key, problem.message) if part)
