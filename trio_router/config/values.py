"""TOML values into the types of the schema: strictly, by cattrs.

cattrs on its own is kind: `"8080"`, `True` and `80.9` become ints, a string becomes a tuple of its characters.
A configuration file deserves none of that, so every type has a hook that takes what TOML has for it and nothing else.
"""

import enum
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import attrs
import cattrs

from trio_router.config.ranges import ONE_OR_MORE, OutOfRange
from trio_router.errors import shown


class Mismatch(ValueError):
    """Raised when a value has a wrong type or is out of range; one `(index or key or None, message)` each."""

    def __init__(self, *problems: tuple[int | str | None, str]) -> None:
        super().__init__("; ".join(message for _, message in problems))
        self.problems = problems


def found(value: object) -> str:
    """A TOML value in a message: its type by TOML's word, and itself where it is short."""
    match value:
        case str():
            return f"str {shown(value)}"
        case dict():
            return "a table"
        case list():
            return "a list"
        case bool():
            return f"bool {str(value).lower()}"
        case int() if value.bit_length() > 64:
            return "an int of more than 64 bits"
        case _:
            return f"{type(value).__name__} {value}"


def _expected(words: str, value: object) -> Mismatch:
    return Mismatch((None, f"expected {words}, got {found(value)}"))


def _exactly(wanted: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _type: Any) -> Any:
        if type(value) is not wanted:  # bool is an int to isinstance
            raise _expected(wanted.__name__, value)
        return value

    return structure


def _int(value: Any, _type: Any) -> int:
    if type(value) is not int or value.bit_length() > 64:
        raise _expected("int", value)
    return value


def _float(value: Any, _type: Any) -> float:
    if type(value) not in {int, float} or (type(value) is int and value.bit_length() > 64):
        raise _expected("float", value)
    if not math.isfinite(value):
        raise _expected("a finite float", value)
    return float(value)


def _path(value: Any, _type: Any) -> Path:
    if type(value) is not str or not value or "\0" in value:
        raise _expected("a path", value)
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise Mismatch((None, f"no home folder is known for {shown(value)}")) from None


def _enum(value: Any, wanted: Any) -> enum.Enum:
    members: dict[Any, enum.Enum] = {member.value: member for member in wanted}
    if type(value) is not str or value not in members:
        raise _expected("one of " + ", ".join(map(repr, members)), value)
    return members[value]


def _is_tuple_of_one_type(wanted: Any) -> bool:
    return get_origin(wanted) is tuple and get_args(wanted)[1:] == (...,)


def _tuple_hook(wanted: Any, converter: cattrs.BaseConverter) -> Callable[[Any, Any], tuple[Any, ...]]:
    entry_type = get_args(wanted)[0]

    def structure(value: Any, _type: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _expected("a list", value)
        entries: list[Any] = []
        wrong: list[tuple[int | None, str]] = []
        for index, entry in enumerate(value):
            try:
                entries.append(converter.structure(entry, entry_type))
            except Mismatch as error:
                wrong += [(index, message) for _, message in error.problems]
        if wrong:
            raise Mismatch(*wrong)
        return tuple(entries)

    return structure


def _is_table(wanted: Any) -> bool:
    return get_origin(wanted) is Mapping


def _table(value: Any, _type: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise _expected("a table", value)
    return value


def _strict_converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_structure_hook(str, _exactly(str))
    converter.register_structure_hook(bool, _exactly(bool))
    converter.register_structure_hook(int, _int)
    converter.register_structure_hook(float, _float)
    converter.register_structure_hook(Path, _path)
    converter.register_structure_hook(enum.Enum, _enum)
    converter.register_structure_hook_factory(_is_tuple_of_one_type, _tuple_hook)
    converter.register_structure_hook_func(_is_table, _table)
    return converter


_CONVERTER = _strict_converter()


def checked(field: "attrs.Attribute[Any]", value: object) -> Any:
    """`value` as the type of `field`, within its range. Raises Mismatch."""
    if field.metadata == ONE_OR_MORE and type(value) is not list:
        value = [value]
    typed = _CONVERTER.structure(value, cast("type[Any]", field.type))
    if field.validator is not None:
        try:
            field.validator(None, field, typed)
        except OutOfRange as error:
            raise Mismatch((None, error.reason)) from None
    return typed
