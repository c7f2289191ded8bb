"""What is wrong with a configuration: located, in words, all of it at once."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from trio_router.config.schema import ModelConfig

KeyPath: TypeAlias = tuple[str | int, ...]
"""Where a value stands in a TOML document: `("models", "qwen", "flags", 1)`."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def written_key(path: KeyPath) -> str:
    """`path` as a TOML author writes it: `models.qwen.flags[1]`, `models."b.c".flags`."""
    text = ""
    for part in path:
        match part:
            case int():
                text += f"[{part}]"
            case str():
                text += ("." if text else "") + (
                    part if _BARE.fullmatch(part) else json.dumps(part, ensure_ascii=False)
                )
    return text


@attrs.frozen(kw_only=True)
class Problem:
    """One thing to correct."""

    file: str
    """Name of the file, or `environment`."""
    line: int | None = None
    """Counted from 1, where known."""
    key: str = ""
    """The key as written in the file, or the variable; empty: the file as a whole."""
    message: str
    """What was found, what is allowed."""

    def __str__(self) -> str:
        said = ": ".join(part for part in (self.file, self.key, self.message) if part)
        return said if self.line is None else f"{said} (line {self.line})"


class ConfigError(Exception):
    """Raised when a configuration cannot be used; `problems` is never empty and in file order."""

    def __init__(self, problems: Sequence[Problem], models: Sequence["ModelConfig"] = ()) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)
        self.models = tuple(models)
        """Those whose own tables are right."""
