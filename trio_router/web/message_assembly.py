"""Whole answers of Anthropic's Messages API, put together from their streams."""

import json
from typing import Any

import attrs
import msgspec

from trio_router.web.assembly import COUNT, Events, KeptBack, NotWhole, inside, raw, written

_PIECES = {b'"text_delta"': "text", b'"thinking_delta"': "thinking", b'"input_json_delta"': "partial_json"}


@attrs.define
class _Block:
    """One of the blocks of an answer: text, thinking, or the use of a tool."""

    fields: dict[str, bytes]
    pieces: list[bytes] = attrs.field(factory=list)
    """What is inside the quotation marks of the string that comes in pieces."""

    def take(self, delta: dict[str, bytes]) -> None:
        kind = delta["type"]
        if kind == b'"signature_delta"':
            self.fields["signature"] = delta["signature"]
        elif kind in _PIECES:
            self.pieces.append(inside(delta[_PIECES[kind]]))
        else:
            raise NotWhole(f"a piece of a block is {kind!r}")

    def written(self) -> bytes:
        fields, said = self.fields, b'"%b"' % b"".join(self.pieces)
        match fields["type"]:
            case b'"text"':
                return written((fields | {"text": said}).items())
            case b'"thinking"':
                return written((fields | {"thinking": said}).items())
            case b'"tool_use"':
                return written((fields | {"input": _input(msgspec.json.decode(said, type=str))}).items())
            case kind:
                raise NotWhole(f"a block is {kind!r}")


@attrs.define(eq=False)
class MessageAssembly:
    """An answer, while its stream comes. One that ends with an error is asked for again: the stream words it otherwise."""

    _source: bytes | bytearray
    """The request's body."""
    _events: Events = attrs.field(factory=Events)
    _message: dict[str, bytes] | None = None
    _blocks: dict[int, _Block] = attrs.field(factory=dict)
    _end: dict[str, bytes] | None = None

    def feed(self, piece: bytes) -> None:
        """Take what came. Raises NotWhole."""
        try:
            for event in self._events.split(piece):
                kind, _, data = event.strip().partition(b"\ndata: ")
                self._take(kind.removeprefix(b"event: "), data)
        except (msgspec.DecodeError, KeyError) as error:
            raise NotWhole(f"the stream is not as expected ({error})") from error

    def _take(self, kind: bytes, data: bytes) -> None:
        match kind:
            case b"message_start":
                self._message = raw(raw(data)["message"])
            case b"content_block_start":
                found = raw(data)
                self._blocks[COUNT.decode(found["index"])] = _Block(raw(found["content_block"]))
            case b"content_block_delta":
                found = raw(data)
                self._blocks[COUNT.decode(found["index"])].take(raw(found["delta"]))
            case b"message_delta":
                found = raw(data)
                self._end = raw(found["delta"]) | raw(found["usage"])
            case b"error":
                raise NotWhole("the stream ended with an error", ever=False)

    def whole(self) -> tuple[int, bytes]:
        """The status and the body of the answer whose stream came. Raises NotWhole."""
        if self._message is None or self._end is None:  # no first event: llama-server keeps half a character back
            raise NotWhole("the stream lacks its beginning or its end", ever=self._end is None)
        end = self._end
        try:
            self._check_cut(end)
            blocks = b",".join([block.written() for _, block in sorted(self._blocks.items())])
            usage = raw(self._message["usage"]) | {"output_tokens": end["output_tokens"]}
            stopped = {name: end[name] for name in ("stop_reason", "stop_sequence")}
        except (msgspec.DecodeError, KeyError) as error:
            raise NotWhole(f"the stream is not as expected ({error})") from error
        fields = self._message | {"content": b"[%b]" % blocks, **stopped, "usage": written(usage.items())}
        return 200, written(fields.items())

    def _check_cut(self, end: dict[str, bytes]) -> None:
        """Raise NotWhole if it was cut, and may have begun to say one of the request's stop words, or if nothing was said.

        As far as is known: not every token says something. Half a character that is lost at the end is not missed.
        """
        cut, count = end.get("stop_reason") == b'"max_tokens"', COUNT.decode(end.get("output_tokens", b"0"))
        said = sum(len(block.pieces) for block in self._blocks.values())
        if (cut and b'"stop_sequences"' in self._source and said != count) or (not self._blocks and count > (not cut)):
            raise KeptBack


def _input(arguments: str) -> bytes:
    """A tool's arguments as llama-server writes what it reads in them; nothing, if that is no JSON."""
    try:
        found = json.loads(arguments, parse_int=_number, parse_float=_number, parse_constant=_no_json)
        return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError):  # what was broken off, and half of a surrogate pair
        return b"{}"


def _no_json(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _number(text: str) -> int | float:
    """Raises NotWhole for one that Python would write otherwise."""
    if text.lstrip("-").isdigit() and abs(int(text)) < 1 << 63:
        return int(text)
    value = float(text)
    if value and not 1e-4 <= abs(value) < 1e15:
        raise NotWhole(f"a tool is called with {text}", ever=False)
    return value
