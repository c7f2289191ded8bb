"""The JSON Schema of router.toml, for editors: made from the classes, so that it cannot say anything else.

Draft 4, the one that Taplo (Even Better TOML) knows. What one key says of another, such as `preload_models` of
`models`, is not in it: `trio-router check` says that.
"""

import ast
import enum
import inspect
import itertools
import textwrap
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Union, get_args, get_origin

import attrs

from trio_router.config.policies import ModelPolicy
from trio_router.config.ranges import ONE_OR_MORE, Each, Matching, Within
from trio_router.config.schema import DERIVED, ApiConfig, KeyConfig, ModelConfig, SystemConfig

NAMES: Final[dict[Any, dict[str, Any]]] = {
    str: {"type": "string"},
    Path: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
}


def json_schema() -> dict[str, Any]:
    """The whole."""
    return {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "title": "router.toml of trio-router",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "api": _table(ApiConfig),
            "system": _table(SystemConfig),
            "models": {
                "type": "object",
                "description": "The models, by alias.",
                "additionalProperties": _model(),
            },
            "keys": {"type": "array", "description": "Who may ask.", "items": _table(KeyConfig)},
        },
    }


def _model() -> dict[str, Any]:
    """One table of two classes."""
    table, policy = _table(ModelConfig), _table(ModelPolicy)
    return {**table, "properties": {**table["properties"], **policy["properties"]}}


def _table(kind: type[attrs.AttrsInstance]) -> dict[str, Any]:
    told = _descriptions(kind)
    properties: dict[str, Any] = {}
    required = []
    for field in attrs.fields(kind):
        if field.metadata == DERIVED:
            continue
        # a key of the file is None only by being absent
        entry = _bounded(_type(_without_none(field.type)), field.validator)
        if field.metadata == ONE_OR_MORE:
            entry = {"anyOf": [entry["items"], entry]}
        if field.name in told:
            entry["description"] = told[field.name]
        default = _plain(field.default)
        if default is attrs.NOTHING:
            if field.type is not Path:  # the file's own folder is the default of one
                required.append(field.name)
        elif default is not None:
            entry["default"] = default
        properties[field.name] = entry
    table = {
        "type": "object",
        "description": inspect.cleandoc(kind.__doc__ or ""),
        "additionalProperties": False,
        "properties": properties,
    }
    return {**table, "required": required} if required else table


def _without_none(wanted: Any) -> Any:
    if get_origin(wanted) in {types.UnionType, Union}:
        (wanted,) = (one for one in get_args(wanted) if one is not type(None))
    return wanted


def _type(wanted: Any) -> dict[str, Any]:
    if get_origin(wanted) is Mapping:
        _, inside = get_args(wanted)
        return {"type": "object"} if inside is Any else {"type": "object", "additionalProperties": _table(inside)}
    if get_origin(wanted) is tuple:
        return {"type": "array", "items": _type(get_args(wanted)[0])}
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return {"enum": [member.value for member in wanted]}
    return dict(NAMES[wanted])


def _bounded(entry: dict[str, Any], validator: Any) -> dict[str, Any]:
    match validator:
        case Within(minimum=minimum, above=above, maximum=maximum):
            if minimum is not None:
                entry["minimum"] = minimum
            if above is not None:
                entry |= {"minimum": above, "exclusiveMinimum": True}
            if maximum is not None:
                entry["maximum"] = maximum
        case Matching(pattern=pattern):
            entry["pattern"] = f"^(?:{pattern})$"
        case Each(entry=each, distinct=distinct):
            entry["items"] = _bounded(entry["items"], each)
            if distinct:
                entry["uniqueItems"] = True
        case _ if (inner := getattr(validator, "validator", None)) is not None:  # attrs.validators.optional
            return _bounded(entry, inner)
    return entry


def _plain(default: Any) -> Any:
    match default:
        case attrs.NOTHING:
            return default
        case enum.Enum():
            return default.value
        case object(factory=_):  # an empty table
            return None
        case tuple():
            return [_plain(one) for one in default]
        case _:
            return default


def _descriptions(kind: type) -> dict[str, str]:
    """The strings below the fields, which Python forgets."""
    told = {}
    for each in reversed(kind.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
        for field, below in itertools.pairwise(body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    told[name] = inspect.cleandoc(text)
    return told
