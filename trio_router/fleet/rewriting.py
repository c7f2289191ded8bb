"""What a model's policy does to the body of a request: parameters left out, filled in, overridden, bounded.

In this order, so that a parameter that is stripped can have a default in its place: `strip`, `default`, `set`,
`max_output_tokens`. What is not concerned stays as the client wrote it, digit by digit.
"""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import attrs
import msgspec

from trio_router.config.policies import Parameters, Policy
from trio_router.errors import InvalidJSON

Raw: TypeAlias = msgspec.Raw
Tree: TypeAlias = dict[str, Any]
"""Parameters by name; JSON, or a tree where only something inside is meant."""

LENGTHS: Final = {
    "/chat/completions": "max_tokens",
    "/completions": "max_tokens",
    "/completion": "n_predict",
    "/infill": "n_predict",
    "/messages": "max_tokens",
    "/responses": "max_output_tokens",
}
"""How the length of an answer is asked for, by path without `/v1`."""
ALL_LENGTHS: Final = ("n_predict", "max_tokens", "max_completion_tokens", "max_output_tokens")
"""llama-server takes more than one of them at most of these paths."""
NULL: Final = b"null"
_OBJECT: Final = msgspec.json.Decoder(dict[str, Raw])
_encode: Final = msgspec.json.Encoder().encode


@attrs.frozen(eq=False)
class Rewriting:
    """A policy, ready to be applied."""

    _strip: tuple[tuple[str, ...], ...] = ()
    _default: Tree = attrs.field(factory=dict)
    _set: Tree = attrs.field(factory=dict)
    _max_output_tokens: int | None = None

    @classmethod
    def of(cls, policy: Policy) -> "Rewriting | None":
        """None for a policy under which requests go as they are."""
        if not (policy.strip or policy.default or policy.set or policy.max_output_tokens):
            return None
        strip = tuple(tuple(name.split(".")) for name in policy.strip)
        return cls(strip, _tree(policy.default), _tree(policy.set), policy.max_output_tokens)

    def apply(self, path: str, body: bytes | bytearray) -> bytes:
        """The body that is sent for `body`, which is for `path`. Raises InvalidJSON."""
        try:
            parameters: Tree = _OBJECT.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidJSON(f"the body is no JSON object: {error}") from error
        parameters.pop("keep_alive", None)
        for names in self._strip:
            _leave_out(parameters, names)
        _merge(parameters, self._default, over=False)
        _merge(parameters, self._set, over=True)
        length = LENGTHS.get(path.removeprefix("/v1"))
        if self._max_output_tokens is not None and length is not None:
            _bound(parameters, length, self._max_output_tokens)
        return _encode(parameters)


AS_IT_IS: Final = Rewriting()
"""Leaves out what is meant for us, and nothing else."""


def _tree(parameters: Parameters) -> Tree:
    return {
        name: _tree(value) if isinstance(value, Mapping) else Raw(_encode(value)) for name, value in parameters.items()
    }


def _leave_out(parameters: Tree, names: tuple[str, ...]) -> None:
    first, *rest = names
    if not rest:
        parameters.pop(first, None)
    elif (inside := _inside(parameters.get(first))) is not None:
        _leave_out(inside, tuple(rest))
        parameters[first] = Raw(_encode(inside))


def _merge(parameters: Tree, tree: Tree, *, over: bool) -> None:
    """Put `tree` into `parameters`: where there is nothing, or `over` what is there."""
    for name, value in tree.items():
        there = parameters.get(name)
        absent = there is None or bytes(there) == NULL
        if not isinstance(value, dict):
            if over or absent:
                parameters[name] = value
            continue
        inside = {} if absent else _inside(there)
        if inside is None:
            if not over:
                continue
            inside = {}
        _merge(inside, value, over=over)
        parameters[name] = Raw(_encode(inside))


def _inside(value: Raw | None) -> Tree | None:
    """The parameters inside one; None where it is no object."""
    if value is None or not bytes(value).startswith(b"{"):
        return None
    inside: Tree = _OBJECT.decode(value)
    return inside


def number_of(value: Raw) -> int | float | None:
    """The number that a field says; None: it says none, or one beyond all that can be told."""
    try:
        number = msgspec.json.decode(value)
    except msgspec.ValidationError:
        return None
    return number if isinstance(number, int | float) and not isinstance(number, bool) else None


def _bound(parameters: Tree, length: str, most: int) -> None:
    """No length above `most` is asked for, and one is."""
    asked = []
    for name in ALL_LENGTHS:
        value = parameters.get(name)
        if value is None or bytes(value) == NULL:
            continue
        number = number_of(value)
        # what is no number, or less than 0, is no bound to llama-server
        if number is None or not 0 <= number <= most:
            number = most
            parameters[name] = Raw(_encode(most))
        asked.append(number)
    there = parameters.get(length)
    if there is None or bytes(there) == NULL:
        parameters[length] = Raw(_encode(min(asked, default=most)))
