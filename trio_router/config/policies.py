"""What a model's entry says of requests rather than of its llama-server: other names, parameters, variants.

None of it needs another llama-server, so a reload that changes nothing else restarts nothing.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from trio_router.config.ranges import Within
from trio_router.config.values import Mismatch, found

OURS: Final = frozenset({"model", "stream", "keep_alive"})
"""Parameters that the router itself goes by: no policy changes them."""
DEEPEST: Final = 16
_VARIANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Parameters = Mapping[str, Any]
"""Request parameters by name, as JSON has them; a table goes for the parameters inside it."""


def no_parameters() -> Parameters:
    """None of them."""
    return {}


class Named:
    """Each entry is a parameter's name, dots between the parts of one inside another."""

    def __call__(self, _instance: object, _attribute: "attrs.Attribute[Any]", names: tuple[str, ...]) -> None:
        """Raise Mismatch for each that is none."""
        wrong = [(index, reason) for index, name in enumerate(names) if (reason := _name_problem(name))]
        if wrong:
            raise Mismatch(*wrong)


def _name_problem(name: str) -> str | None:
    first, *_ = parts = name.split(".")
    if "" in parts:
        return f"expected the name of a parameter, got {found(name)}"
    return f"the router itself goes by {first!r}" if first in OURS else None


class Sendable:
    """A table of parameters that can be sent as JSON."""

    def __call__(self, _instance: object, _attribute: "attrs.Attribute[Any]", table: Parameters) -> None:
        """Raise Mismatch for each that cannot."""
        wrong = [(name, f"the router itself goes by {name!r}") for name in table if name in OURS]
        wrong += [(name, reason) for name, value in table.items() for reason in _unsendable(value, 0)]
        if wrong:
            raise Mismatch(*wrong)


def _unsendable(value: object, depth: int) -> Iterator[str]:
    match value:
        case _ if depth > DEEPEST:
            yield "nested too deeply"
        case dict() | list():
            for inner in value.values() if isinstance(value, dict) else value:
                yield from _unsendable(inner, depth + 1)
        case int() if value.bit_length() > 63:
            yield f"expected a smaller number, got {found(value)}"
        case float() if math.isfinite(value):
            pass
        case str() | int():
            pass
        case _:  # dates, times, infinity
            yield f"expected what JSON has a word for, got {found(value)}"


@attrs.frozen(kw_only=True)
class Policy:
    """What is done to requests."""

    name: str | None = None
    """What people see, in lists of models."""
    description: str | None = None
    """A line on what it is for."""
    set: Parameters = attrs.field(factory=no_parameters, validator=Sendable())
    """Request parameters that are sent to llama-server whatever the client said."""
    default: Parameters = attrs.field(factory=no_parameters, validator=Sendable())
    """Request parameters that are sent where the client said nothing, or null."""
    strip: tuple[str, ...] = attrs.field(default=(), validator=Named())
    """Request parameters of clients that are left out; a dot goes into a table."""
    max_output_tokens: int | None = attrs.field(default=None, validator=attrs.validators.optional(Within(minimum=1)))
    """Longest answer that can be asked for; requests that ask for more, or do not say, get this."""


@attrs.frozen(kw_only=True)
class ModelPolicy(Policy):
    """The same of a model, and what else it answers to."""

    aliases: tuple[str, ...] = attrs.field(default=())
    """Other names clients may send for it."""
    variants: Mapping[str, Policy] = attrs.field(factory=dict)
    """Further models that clients see as ALIAS:NAME: this llama-server, other parameters."""


def variant_problem(name: str) -> str | None:
    """Why `name` cannot be that of a variant, or None when it can."""
    if _VARIANT.fullmatch(name):
        return None
    return "a variant's name starts with an ASCII letter or digit; then letters, digits and . _ - may follow"


def overlaid(below: Policy, above: Policy) -> Policy:
    """The policy of a variant: `above` where it says something, else `below`."""
    return Policy(
        name=above.name,
        description=above.description,
        set=merged(below.set, above.set),
        default=merged(below.default, above.default),
        strip=tuple(dict.fromkeys((*below.strip, *above.strip))),
        max_output_tokens=below.max_output_tokens if above.max_output_tokens is None else above.max_output_tokens,
    )


def merged(below: Parameters, above: Parameters) -> Parameters:
    """Table into table, key by key; `above` has the last word."""
    both = dict(below)
    for key, value in above.items():
        under = both.get(key)
        both[key] = merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both
