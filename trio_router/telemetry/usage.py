r"""How many tokens an answer took, read from its ends without parsing it.

llama-server says so itself, in an object `usage` and one called `timings`: behind everything else in whatever holds
generated text, before the data of embeddings and of a reranking, and in two places of an Anthropic stream. So the
first and the last few KiB of an answer are enough, JSON or events alike.

A quotation mark inside a JSON string is always written `\"`. A name that stands after `{` or `,`, in bare quotation
marks and before a colon, is therefore never part of what a model said, wherever the piece begins. The numbers are
still llama-server's word and nothing more: what is odd is left out, and nothing here raises.
"""

import math
import re
from typing import Annotated, Final

import attrs
import msgspec

HEAD_BYTES: Final = 2048
"""How much of an answer's beginning is looked at."""

MAX_BLANKS: Final = 16
_NAMES: Final = (b'"usage"', b'"timings"')
_OBJECT: Final = re.compile(
    rb""""(?:usage|timings)"\s*:\s*\{"""  # its name
    rb"""([^{}]{0,2000}+(?:\{[^{}]{0,500}+\}[^{}]{0,500}+){0,4})\}"""  # what is in it, objects one level deep
)
_NUMBER: Final = re.compile(
    rb'"(prompt_tokens|completion_tokens|cached_tokens|input_tokens|output_tokens|cache_read_input_tokens'
    rb"|cache_n|prompt_n|predicted_n|prompt_ms|predicted_ms|predicted_per_token_ms)"
    rb'"\s*:\s*([0-9]{1,15}(?:\.[0-9]{1,25})?(?:[eE][+-]?[0-9]{1,3})?)\s*(?=[,}]|\Z)'
)


@attrs.define(kw_only=True)
class Usage:
    """What llama-server said of one answer; None where it said nothing."""

    input_tokens: int | None = None
    """The whole prompt, cached or not."""
    output_tokens: int | None = None
    cached_tokens: int | None = None
    """The part of the prompt that was not computed again."""
    prompt_seconds: float | None = None
    """From the slot to the first token."""
    seconds_per_output_token: float | None = None


NOTHING: Final = Usage()


_Count = Annotated[int, msgspec.Meta(ge=0, lt=10**15)]
_Time = Annotated[float, msgspec.Meta(ge=0)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None


class _Tokens(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    cache_read_input_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Timings(msgspec.Struct):
    cache_n: _Count | None = None
    prompt_n: _Count | None = None
    predicted_n: _Count | None = None
    prompt_ms: _Time | None = None
    predicted_ms: _Time | None = None
    predicted_per_token_ms: _Time | None = None


class _Answer(msgspec.Struct):
    usage: _Tokens | None = None
    timings: _Timings | None = None


_ANSWER: Final = msgspec.json.Decoder(_Answer)


def usage_of(head: bytes, tail: bytes) -> Usage:
    """The usage in an answer that begins with `head` and ends with `tail`; they may overlap. Never raises.

    Of numbers that are told several times the last counts. A small answer that is one JSON object is parsed, which
    takes a tenth of the time that a search does.
    """
    if len(head) < HEAD_BYTES and len(tail) <= len(head):
        if b'"usage"' not in head and b'"timings"' not in head:
            return NOTHING
        if head.startswith(b"{"):
            try:
                return _told(_ANSWER.decode(head))
            except (msgspec.DecodeError, ValueError, RecursionError):
                pass  # cut off, not as we know it, or more than one object: whatever can be found then
    said: dict[bytes, float] = {}
    for piece in (tail,) if tail.startswith(head) else (head, tail):
        for name in _NAMES:
            at = piece.find(name)
            while at >= 0:
                if found := _OBJECT.match(piece, at) if _begins_a_member(piece, at) else None:
                    _note(found[1], said)
                at = piece.find(name, at + len(name))
    return _read(said) if said else NOTHING


def _told(answer: _Answer) -> Usage:
    """The same as `_read` makes of what a search finds."""
    usage, timings = answer.usage, answer.timings
    found = Usage()
    if usage is not None:
        details = usage.prompt_tokens_details or usage.input_tokens_details
        whole = usage.prompt_tokens
        if whole is None and usage.input_tokens is not None:
            whole = usage.input_tokens + (usage.cache_read_input_tokens or 0)
        found.input_tokens = whole
        found.output_tokens = usage.output_tokens if usage.completion_tokens is None else usage.completion_tokens
        found.cached_tokens = usage.cache_read_input_tokens if details is None else details.cached_tokens
    if timings is not None:
        if found.input_tokens is None and timings.prompt_n is not None:
            found.input_tokens = timings.prompt_n + (timings.cache_n or 0)
        if found.output_tokens is None:
            found.output_tokens = timings.predicted_n
        if found.cached_tokens is None:
            found.cached_tokens = timings.cache_n
        if timings.prompt_ms is not None:
            found.prompt_seconds = timings.prompt_ms / 1000
        if timings.predicted_per_token_ms:
            found.seconds_per_output_token = timings.predicted_per_token_ms / 1000
        elif timings.predicted_n and timings.predicted_ms:
            found.seconds_per_output_token = timings.predicted_ms / timings.predicted_n / 1000
    return found


def _begins_a_member(piece: bytes, at: int) -> bool:
    """Whether what stands at `at` follows `{` or `,`: inside a string its quotation mark would follow a backslash."""
    return piece[max(0, at - MAX_BLANKS) : at].rstrip(b" \t\r\n")[-1:] in {b"{", b","}


def _note(members: bytes, said: dict[bytes, float]) -> None:
    for name, digits in _NUMBER.findall(members):
        number = float(digits)
        if math.isfinite(number):
            said[name] = number


def _read(said: dict[bytes, float]) -> Usage:
    def count(name: bytes) -> int | None:
        return int(said[name]) if name in said and said[name] < 1e15 else None

    def first(*names: bytes) -> int | None:
        return next((number for name in names if (number := count(name)) is not None), None)

    whole, new = count(b"prompt_tokens"), count(b"input_tokens")
    if whole is None:
        # Anthropic's `input_tokens` are those beside the cached ones; in OpenAI's Responses they are all
        whole = new if new is None else new + (count(b"cache_read_input_tokens") or 0)
    if whole is None and b"prompt_n" in said:
        whole = (count(b"prompt_n") or 0) + (count(b"cache_n") or 0)
    return Usage(
        input_tokens=whole,
        output_tokens=first(b"completion_tokens", b"output_tokens", b"predicted_n"),
        cached_tokens=first(b"cached_tokens", b"cache_read_input_tokens", b"cache_n"),
        prompt_seconds=said[b"prompt_ms"] / 1000 if b"prompt_ms" in said else None,
        seconds_per_output_token=_pace(said),
    )


def _pace(said: dict[bytes, float]) -> float | None:
    if said.get(b"predicted_per_token_ms"):
        return said[b"predicted_per_token_ms"] / 1000
    tokens, milliseconds = said.get(b"predicted_n"), said.get(b"predicted_ms")
    return milliseconds / tokens / 1000 if tokens and milliseconds else None
