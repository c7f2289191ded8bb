"""Whole answers, put together from the streams in which llama-server gave them: chats, completions, the Responses API's.

As llama-server would have written them, byte for byte: in the same order, and with its own numbers, digit by digit. That
it is so is shown against the real one in `tests/e2e`. Anthropic's messages and llama-server's own completions are put
together in modules of their own.
"""

import math
from collections.abc import Iterable
from typing import Any, Final, Protocol

import attrs
import msgspec

END: Final = b"\n\n"
MAX_EVENT_BYTES: Final = 1 << 20
"""Of what is longer no answer is put together."""
Raw = dict[str, msgspec.Raw]
CHUNK: Final = msgspec.json.Decoder(Raw)
ONLY_STREAMS: Final = b"Invalid diff: "
"""What llama-server says when what it read in an answer so far does not begin with what it read before."""
CUT: Final = b'"length"'
COUNT: Final = msgspec.json.Decoder(int)
ITEMS: Final = msgspec.json.Decoder(list[Raw])


class NotWhole(Exception):
    """Raised when the stream is not one that a whole answer can be made from."""

    def __init__(self, why: str, *, ever: bool = True) -> None:
        super().__init__(why)
        self.ever = ever
        """Whether that is to be expected of other streams like it."""


class KeptBack(NotWhole):
    """Raised when an answer ended while llama-server kept something of it back, which its stream then lacks."""

    def __init__(self) -> None:
        super().__init__("it ended while something was kept back", ever=False)


class Whole(Protocol):
    """A whole answer, while its stream comes. Each event is taken in when it is there: at the end nothing is left to do."""

    def feed(self, piece: bytes) -> None:
        """Take what came. Raises NotWhole."""

    def whole(self) -> tuple[int, bytes]:
        """The status and the body of the answer whose stream came. Raises NotWhole."""


@attrs.define(eq=False)
class Events:
    """A stream, event by event."""

    _rest: bytes = b""

    def split(self, piece: bytes) -> list[bytes]:
        """The events that end in `piece`. Raises NotWhole if the next is too long."""
        *events, self._rest = (self._rest + piece).split(END)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise NotWhole(f"an event has more than {MAX_EVENT_BYTES} bytes")
        return events


def data_of(event: bytes) -> bytes:
    """What is said in an event that has no name; b"" for a comment, and for what says nothing."""
    data = event.strip().removeprefix(b"data: ")
    return b"" if data in {b"[DONE]", b"null"} or data.startswith(b":") else data


def raw(data: bytes | msgspec.Raw) -> dict[str, bytes]:
    """The fields of an object, as they are written. Raises msgspec.DecodeError."""
    return {name: bytes(value) for name, value in CHUNK.decode(data).items()}


def error_in(data: bytes, error: bytes) -> tuple[int, bytes]:
    """The status and the body of an answer whose stream says `data` at its end, which holds `error`.

    Raises NotWhole if only a stream can go wrong so, msgspec.DecodeError, KeyError.
    """
    if ONLY_STREAMS in error:
        raise NotWhole("llama-server lost the thread of its own stream", ever=False)
    status = COUNT.decode(CHUNK.decode(error)["code"])
    return status if 400 <= status < 600 else 500, data


def inside(text: bytes) -> bytes:
    """What is between the quotation marks of a JSON string. Raises NotWhole."""
    if not text.startswith(b'"'):
        raise NotWhole(f"{text[:50]!r} is no text")
    return text[1:-1]


def made(timings: bytes) -> int:
    """How many tokens there are by llama-server's `timings`; none, if there are none."""
    return COUNT.decode(raw(timings).get("predicted_n", b"0")) if timings else 0


def written(fields: Iterable[tuple[str, bytes | msgspec.Raw]]) -> bytes:
    """A JSON object."""
    return b"{%b}" % b",".join([b'"%b":%b' % (name.encode(), bytes(value)) for name, value in fields])


@attrs.define
class Choice:
    """One of the answers to a request, while it is put together. All of it is JSON, byte by byte."""

    texts: dict[str, list[bytes]] = attrs.field(factory=dict)
    """What is inside the quotation marks of each string that comes in pieces."""
    calls: dict[int, "_Call"] = attrs.field(factory=dict)
    finish: bytes = b""
    spoken: bytes = b""
    """llama-server's timings when it said something of it last."""
    ended: bytes = b""
    """The same at the end."""

    def take(self, found: Raw) -> bool:
        """What a line of the stream says of it; whether that is something. Raises NotWhole."""
        speaks = False
        for name, value in found.items():
            said = bytes(value)
            match name:
                case "delta":
                    for part, text in raw(value).items():
                        speaks |= self._add(part, text)
                case "logprobs" if said != b"null":
                    raise NotWhole("there are log probabilities, which streams have of other tokens", ever=False)
                case "finish_reason" if said != b"null":
                    self.finish = said
                case "text":
                    speaks |= self._add(name, said)
        return speaks

    def _add(self, name: str, value: bytes) -> bool:
        if name == "tool_calls":
            for call in ITEMS.decode(value):
                self.calls.setdefault(COUNT.decode(call["index"]), _Call()).take(call)
            return True
        if value == b"null":
            return False
        pieces = self.texts.setdefault(name, [])
        if name == "role":  # it may be said again
            pieces.clear()
        pieces.append(inside(value))
        return name != "role" and value != b'""'

    def check_cut(self) -> None:
        """Raise NotWhole if it was cut, and something before that was kept back: it stands in whole answers only.

        So does all of an answer of which nothing was said, since it may have been the beginning of something else.
        """
        if not self.ended:
            return
        end = made(self.ended)
        if (self.finish == CUT and made(self.spoken) != end) or (self._is_silent and end > 1):
            raise KeptBack

    @property
    def _is_silent(self) -> bool:
        return not self.calls and not any(any(pieces) for name, pieces in self.texts.items() if name != "role")

    def text(self, name: str) -> bytes:
        return b'"%b"' % b"".join(self.texts.get(name, ()))

    def message(self, index: int) -> bytes:
        """As in the answer to a chat."""
        more = b',"reasoning_content":' + self.text("reasoning_content") if "reasoning_content" in self.texts else b""
        if self.calls:
            more += b',"tool_calls":[%b]' % b",".join([call.written() for _, call in sorted(self.calls.items())])
        return b'{"finish_reason":%b,"index":%d,"message":{"role":%b,"content":%b%b}}' % (
            self.finish, index, self.text("role"), self.text("content"), more,
        )  # fmt: skip

    def completion(self, index: int) -> bytes:
        """As in the answer to a bare prompt."""
        return b'{"text":%b,"index":%d,"logprobs":null,"finish_reason":%b}' % (self.text("text"), index, self.finish)


@attrs.define
class _Call:
    """A tool that the model calls: its name comes first, then the arguments in pieces."""

    fields: dict[str, bytes] = attrs.field(factory=dict)
    arguments: list[bytes] = attrs.field(factory=list)

    def take(self, found: Raw) -> None:
        for name, value in raw(found["function"]).items():
            if name == "arguments":
                self.arguments.append(inside(value))
            else:
                self.fields[name] = value
        self.fields |= {name: bytes(value) for name, value in found.items() if name in {"id", "type"}}

    def written(self) -> bytes:
        return b'{"type":%b,"function":{"name":%b,"arguments":"%b"},"id":%b}' % (
            self.fields["type"], self.fields["name"], b"".join(self.arguments), self.fields["id"],
        )  # fmt: skip


@attrs.define(eq=False)
class OfChunks:
    """What is put together from events that are JSON objects, of which one may tell of an error."""

    _events: Events = attrs.field(factory=Events)
    _error: tuple[int, bytes] | None = None

    def feed(self, piece: bytes) -> None:
        """Take what came. Raises NotWhole."""
        try:
            for event in self._events.split(piece):
                if data := data_of(event):
                    chunk = raw(data)
                    if "error" in chunk:
                        self._error = error_in(data, chunk["error"])
                    else:
                        self._take(chunk)
        except (msgspec.DecodeError, KeyError) as error:
            raise NotWhole(f"the stream is not as expected ({error})") from error

    def _take(self, chunk: dict[str, bytes]) -> None:
        raise NotImplementedError


@attrs.define(eq=False)
class Assembly(OfChunks):
    """A chat's answer, or that to a bare prompt in OpenAI's words."""

    _choices: dict[int, Choice] = attrs.field(factory=dict)
    _last: dict[str, bytes] = attrs.field(factory=dict)
    """What stands in the answer once, as it was said last."""
    _timings: bytes | None = None
    """At the last token, if it says so."""
    _finished: int = 0
    """The choice that was spoken of last."""

    def _take(self, chunk: dict[str, bytes]) -> None:
        if "__verbose" in chunk:
            raise NotWhole("it says `__verbose`, which in a stream is without the text")
        timings = chunk.get("timings", b"")
        for found in ITEMS.decode(chunk.pop("choices")):
            self._finished = COUNT.decode(found["index"])
            choice = self._choices.setdefault(self._finished, Choice())
            if choice.take(found):
                choice.spoken = timings
        if "prompt_progress" in chunk:  # what an answer goes on with comes with it
            return
        if "usage" in chunk and self._finished in self._choices:
            self._choices[self._finished].ended = timings
        self._timings = timings or self._timings
        if self._finished != 0 or "usage" not in chunk:  # those of the first choice stand in the answer
            chunk.pop("usage", None)
            chunk.pop("timings", None)
        self._last |= chunk

    def whole(self) -> tuple[int, bytes]:
        """The status and the body of the answer whose stream came. Raises NotWhole."""
        if self._error is not None:
            return self._error
        choices, last = self._choices, self._last
        if not choices or "usage" not in last or not all(choice.finish for choice in choices.values()):
            raise NotWhole("the stream ended before the answer did")
        try:
            for choice in choices.values():
                choice.check_cut()
            return 200, self._in_order(choices, last)
        except msgspec.DecodeError as error:
            raise NotWhole(f"the timings are not as expected ({error})") from error
        except KeyError as error:
            raise NotWhole(f"a call of a tool lacks its {error}") from error

    @staticmethod
    def _in_order(choices: dict[int, Choice], last: dict[str, bytes]) -> bytes:
        """In llama-server's order."""
        is_chat = last.pop("object", b"").endswith(b'.chunk"')
        kind = b'"chat.completion"' if is_chat else b'"text_completion"'
        all_of_them = b",".join(
            choice.message(index) if is_chat else choice.completion(index) for index, choice in sorted(choices.items())
        )
        fields = {"choices": b"[%b]" % all_of_them}
        fields |= {name: last.pop(name) for name in ("created", "model", "system_fingerprint") if name in last}
        fields |= {"object": kind, "usage": last.pop("usage"), "id": last.pop("id", b'""')}
        timings = last.pop("timings", None)
        fields |= last
        if timings is not None:
            fields["timings"] = timings
        return written(fields.items())


@attrs.define(eq=False)
class ResponseAssembly:
    """The Responses API's, whose last event holds the whole, in another order."""

    _source: bytes | bytearray
    """The request's body."""
    _longest: int | None = None
    """Tokens of an answer that does not say itself how long it may be."""
    _context: int | None = None
    """Tokens of question and answer together."""
    _events: Events = attrs.field(factory=Events)
    _end: bytes = b""
    _spoken: bytes = b""
    """The last event that said something of the text."""

    def feed(self, piece: bytes) -> None:
        """Take what came. Raises NotWhole."""
        for event in self._events.split(piece):
            self._end = event
            if b'"delta":' in event:
                self._spoken = event

    def whole(self) -> tuple[int, bytes]:
        """The status and the body of the answer whose stream came. Raises NotWhole."""
        kind, _, data = self._end.partition(b"\ndata: ")
        if kind != b"event: response.completed":
            raise NotWhole("the stream ended before the response did", ever=b'"error":' not in self._end)
        try:
            found = CHUNK.decode(CHUNK.decode(data)["response"])
            usage = CHUNK.decode(found["usage"])
            output = ITEMS.decode(found["output"])
            read, count = COUNT.decode(usage["input_tokens"]), COUNT.decode(usage["output_tokens"])
            if self._is_cut(read, count) or (not output and count > 1):
                raise KeptBack
            found["completed_at"] = found["created_at"]
            found["output"] = msgspec.Raw(b"[%b]" % b",".join(map(_item, output)))
        except (msgspec.DecodeError, KeyError) as error:
            raise NotWhole(f"the response is not as expected ({error})") from error
        return 200, written(sorted(found.items()))

    def _is_cut(self, read: int, count: int) -> bool:
        """Whether it was cut, and something kept back. That it was cut is said nowhere: it is as long as it may be."""
        spoken = raw(self._spoken.partition(b"\ndata: ")[2]).get("timings", b"") if self._spoken else b""
        if made(spoken) == count:
            return False
        try:
            bounds = msgspec.structs.astuple(msgspec.json.decode(self._source, type=_Bounds))
        except (msgspec.DecodeError, RecursionError) as error:
            raise KeptBack from error  # who knows
        full = self._context is not None and read + count >= self._context - 1
        return any(_says(bound, count) for bound in bounds) or count == self._longest or full


def _says(bound: object, count: int) -> bool:
    """llama-server takes 3.5 for 3."""
    return bound == count or (isinstance(bound, float) and math.isfinite(bound) and int(bound) == count)


class _Bounds(msgspec.Struct):
    """Any of them holds."""

    max_output_tokens: Any = None
    max_completion_tokens: Any = None
    max_tokens: Any = None
    n_predict: Any = None


def _item(item: Raw) -> bytes:
    match bytes(item["type"]):
        case b'"message"':
            return written(sorted(item.items()))
        case b'"reasoning"':
            return written((item | {"status": msgspec.Raw(b'"completed"')}).items())
        case b'"function_call"':
            return written(item.items())
        case kind:
            raise NotWhole(f"an item of the response is {kind!r}")
