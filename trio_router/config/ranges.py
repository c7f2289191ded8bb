"""What values a field may have: attrs validators that can say in words what they allow."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from trio_router.errors import shown

ONE_OR_MORE = {"one or more": True}
"""Metadata of a field: a list whose only entry may stand without brackets."""


class OutOfRange(ValueError):
    """Raised when a value has the right type and is still not allowed; `reason` is without the field's name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


def _refuse(attribute: "attrs.Attribute[Any]", allowed: str, value: object) -> None:
    reason = f"expected {allowed}"
    if attribute.repr:  # a secret is not repeated
        reason += f", got {shown(value) if isinstance(value, str) else value}"
    raise OutOfRange(attribute.name, reason)


@attrs.frozen(kw_only=True)
class Within:
    """A number between bounds; `above` is excluded, the others are not. NaN is nowhere within."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None

    def __str__(self) -> str:
        if self.above is not None:
            return f"a number > {self.above:g}"
        if self.maximum is not None:
            return f"a number from {self.minimum:g} to {self.maximum:g}"
        return f"a number >= {self.minimum:g}"

    def __call__(self, _instance: object, attribute: "attrs.Attribute[Any]", value: float) -> None:
        inside = (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
        )
        if not inside:
            _refuse(attribute, str(self), value)


@attrs.frozen
class Matching:
    """A string that matches as a whole; `words` says to people what the pattern says to machines."""

    pattern: str
    words: str

    def __str__(self) -> str:
        return self.words

    def __call__(self, _instance: object, attribute: "attrs.Attribute[Any]", value: str | None) -> None:
        if value is not None and not re.fullmatch(self.pattern, value):
            _refuse(attribute, self.words, value)


@attrs.frozen
class Each:
    """Every entry of a tuple passes `entry`; with `distinct`, no entry stands twice."""

    entry: Callable[[Any, "attrs.Attribute[Any]", Any], None]
    distinct: bool = attrs.field(default=False, kw_only=True)

    def __call__(self, instance: object, attribute: "attrs.Attribute[Any]", values: Sequence[Any] | None) -> None:
        for index, value in enumerate(values or ()):
            self.entry(instance, attribute, value)
            if self.distinct and value in (values or ())[:index]:
                _refuse(attribute, "each entry once", value)
