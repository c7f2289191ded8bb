"""Requests that llama-server stops at once when their client leaves.

It looks for the client only when it has something to write, or when no request at all got a result for a second
(llama.cpp's `server_response::recv_with_timeout`). So it computes a prompt, or an answer that is to come in one piece,
to the end for nobody, as long as it computes for others beside. What makes it write is a stream with `return_progress`:
a line after each batch of the prompt, and one for each token.

Unless `system.stop_at_once` is off, that is asked for in the place of what the client asked for. The lines on progress
are left out again; a whole answer is put together from its stream as llama-server would have written it: in the same
order, and with its own numbers, digit by digit. A stream that no whole can be made from is asked for again as the client
did, and so is what comes after it on the same path, until there is another llama-server. Whatever stands in a
llama-server's place, and does not say in `/props` which build of llama.cpp it is, gets every request as it came.

Whole answers to requests with tools are not asked for so: the calls come in pieces that say less than the whole. Nor are
streams of several answers, among whose lines those on progress come at any time. Of other paths only the Responses API's
stream says how far it is.
"""

import re
from collections.abc import Iterable
from typing import Final

import attrs
import msgspec

from trio_router.backend.backend import Backend
from trio_router.backend.connection import AnswerHead, Connection, Headers
from trio_router.web.admission import Talk

RESPONSES: Final = frozenset({"/v1/responses", "/responses"})
PATHS: Final = frozenset({"/v1/chat/completions", "/chat/completions", "/v1/completions"}) | RESPONSES
PROGRESS: Final = b'"prompt_progress":'
END: Final = b"\n\n"
MAX_EVENT_BYTES: Final = 1 << 20
"""Of what is longer no answer is put together."""
_BLANKS: Final = b" \t\r\n"
_ITS_PROGRESS: Final = re.compile(rb',"prompt_progress":\{[^{}]*\}')
_STREAM_ONLY: Final = frozenset({b"cache-control", b"x-accel-buffering"})
_Raw = dict[str, msgspec.Raw]
_CHUNK: Final = msgspec.json.Decoder(_Raw)
_ITEMS: Final = msgspec.json.Decoder(list[_Raw])
_COUNT: Final = msgspec.json.Decoder(int)


class NotWhole(Exception):
    """Raised when the stream is not one that a whole answer can be made from."""


@attrs.frozen
class Stoppable:
    """What is sent in a request's place."""

    path: str
    source: bytes | bytearray
    """The body as the client sent it."""
    whole: bool
    """Whether the client wants its answer in one piece."""

    @classmethod
    def of(cls, path: str, body: bytes | bytearray, talk: Talk, *, stream: bool) -> "Stoppable | None":
        """None for a request that is to be sent as it is."""
        if path not in PATHS or talk.wants_progress or (talk.is_several if stream else talk.has_tools):
            return None
        return cls(path, body, whole=not stream)

    @property
    def body(self) -> bytes:
        """What is sent."""
        more = b',"return_progress":true}'
        if self.whole:  # of fields that come twice, llama-server takes the last
            more = b',"stream":true,"stream_options":{"include_usage":true}' + more
        end = len(self.source)
        while self.source[end - 1] in _BLANKS:
            end -= 1
        return b"".join((memoryview(self.source)[: end - 1], more))

    def on(self, backend: Backend) -> "Stoppable | None":
        """None where the request is to be sent as it is: to who is no llama-server, or makes no whole of such answers."""
        return None if not backend.genuine or (self.whole and self.path in backend.unstoppable) else self

    async def begin(self, connection: Connection, head: AnswerHead) -> tuple[AnswerHead, bytes]:
        """The answer's head, and the first bytes of it, as the client is to have them. Raises BackendLost, NotWhole."""
        if not self.whole:
            first = _first_of_response if self.path in RESPONSES else _first_event
            return head, await first(connection)
        assembly: Assembly | ResponseAssembly = ResponseAssembly() if self.path in RESPONSES else Assembly()

        def take(piece: bytes) -> bool:
            assembly.feed(piece)
            return True

        while piece := await connection.receive():
            assembly.feed(piece)
            await connection.stream(take)
        status, body = assembly.whole()
        headers: Headers = [
            (name, b"application/json; charset=utf-8" if name == b"content-type" else value)
            for name, value in head.headers
            if name not in _STREAM_ONLY
        ]
        headers.append((b"content-length", b"%d" % len(body)))
        return AnswerHead(status=status, headers=headers, length=len(body)), body


async def _first_event(connection: Connection) -> bytes:
    """What comes behind the lines on progress, from the first event that is whole."""
    data = b""
    while piece := await connection.receive():
        data += piece
        while (end := data.find(END)) >= 0:
            if PROGRESS not in data[:end]:
                return data
            data = data[end + len(END) :]
    return data


async def _first_of_response(connection: Connection) -> bytes:
    """The first events, the Responses API's, once there are others than those that announce them.

    Progress is said in events that would come anyway, and more of them.
    """
    data = kept = b""
    announced = False
    while piece := await connection.receive():
        data += piece
        while (end := data.find(END)) >= 0:
            event, data = data[: end + len(END)], data[end + len(END) :]
            if PROGRESS not in event:
                kept += event
                if not event.startswith(b"event: response.created"):
                    return kept + data
            elif not announced:
                announced = True
                kept += _ITS_PROGRESS.sub(b"", event)
    return kept + data


def _split(data: bytes) -> list[bytes]:
    """The events in `data`, and the beginning of the next. Raises NotWhole if that is too long."""
    events = data.split(END)
    if len(events[-1]) > MAX_EVENT_BYTES:
        raise NotWhole(f"an event has more than {MAX_EVENT_BYTES} bytes")
    return events


@attrs.define
class _Choice:
    """One of the answers to a request, while it is put together. All of it is JSON, byte by byte."""

    texts: dict[str, list[bytes]] = attrs.field(factory=dict)
    """What is inside the quotation marks of each string that comes in pieces."""
    logprobs: list[bytes] = attrs.field(factory=list)
    finish: bytes = b""

    def add(self, name: str, value: bytes) -> None:
        if value.startswith(b'"'):
            self.texts.setdefault(name, []).append(value[1:-1])
        elif value != b"null":
            raise NotWhole(f"{name!r} in its stream is no text")

    def text(self, name: str) -> bytes:
        return b'"%b"' % b"".join(self.texts.get(name, ()))

    def probabilities(self) -> bytes:
        return b'{"content":[%b]}' % b",".join(self.logprobs)

    def message(self, index: int) -> bytes:
        """As in the answer to a chat."""
        reasoning = (
            b',"reasoning_content":' + self.text("reasoning_content") if "reasoning_content" in self.texts else b""
        )
        logprobs = b',"logprobs":' + self.probabilities() if self.logprobs else b""
        return b'{"finish_reason":%b,"index":%d,"message":{"role":%b,"content":%b%b}%b}' % (
            self.finish, index, self.text("role"), self.text("content"), reasoning, logprobs,
        )  # fmt: skip

    def completion(self, index: int) -> bytes:
        """As in the answer to a bare prompt."""
        logprobs = self.probabilities() if self.logprobs else b"null"
        return b'{"text":%b,"index":%d,"logprobs":%b,"finish_reason":%b}' % (
            self.text("text"), index, logprobs, self.finish,
        )  # fmt: skip


@attrs.define(eq=False)
class Assembly:
    """A whole answer, while its stream comes. Each event is taken in when it is there: at the end nothing is left to do."""

    _rest: bytes = b""
    _choices: dict[int, _Choice] = attrs.field(factory=dict)
    _last: dict[str, bytes] = attrs.field(factory=dict)
    """What stands in the answer once, as it was said last."""
    _finished: int = 0
    """The choice that was spoken of last."""
    _error: tuple[int, bytes] | None = None

    def feed(self, piece: bytes) -> None:
        """Take what came. Raises NotWhole."""
        *events, self._rest = _split(self._rest + piece)
        try:
            for event in events:
                self._take(event)
        except (msgspec.DecodeError, KeyError) as error:
            raise NotWhole(f"the stream is not as expected ({error})") from error

    def _take(self, event: bytes) -> None:
        data = event.strip().removeprefix(b"data: ")
        if not data or data in {b"[DONE]", b"null"} or data.startswith(b":"):
            return
        chunk = {name: bytes(value) for name, value in _CHUNK.decode(data).items()}
        if "error" in chunk:
            status = _COUNT.decode(_CHUNK.decode(chunk["error"])["code"])
            self._error = (status if 400 <= status < 600 else 500, data)
            return
        if "prompt_progress" in chunk:
            return
        for found in _ITEMS.decode(chunk.pop("choices")):
            self._finished = _COUNT.decode(found["index"])
            _take(self._choices.setdefault(self._finished, _Choice()), found)
        if self._finished != 0 or "usage" not in chunk:  # those of the first choice stand in the answer
            chunk.pop("usage", None)
            chunk.pop("timings", None)
        self._last |= chunk

    def whole(self) -> tuple[int, bytes]:
        """The status and the body of the answer whose stream came. Raises NotWhole."""
        if self._error is not None:
            return self._error
        choices = self._choices
        if not choices or "usage" not in self._last or not all(choice.finish for choice in choices.values()):
            raise NotWhole("the stream ended before the answer did")
        return 200, _written(choices, self._last)


@attrs.define(eq=False)
class ResponseAssembly:
    """The same for the Responses API, whose last event holds the whole, in another order."""

    _rest: bytes = b""
    _end: bytes = b""

    def feed(self, piece: bytes) -> None:
        """Take what came. Raises NotWhole."""
        *events, self._rest = _split(self._rest + piece)
        if events:
            self._end = events[-1]

    def whole(self) -> tuple[int, bytes]:
        """The status and the body of the answer whose stream came. Raises NotWhole."""
        kind, _, data = self._end.partition(b"\ndata: ")
        if kind != b"event: response.completed":
            raise NotWhole("the stream ended before the response did")
        try:
            found = _CHUNK.decode(_CHUNK.decode(data)["response"])
            found["completed_at"] = found["created_at"]
            found["output"] = msgspec.Raw(b"[%b]" % b",".join(map(_message, _ITEMS.decode(found["output"]))))
        except (msgspec.DecodeError, KeyError) as error:
            raise NotWhole(f"the response is not as expected ({error})") from error
        return 200, _object(sorted(found.items()))


def _message(item: _Raw) -> bytes:
    if bytes(item["type"]) != b'"message"':
        raise NotWhole(f"an item of the response is {bytes(item['type'])!r}")
    return _object(sorted(item.items()))


def _object(fields: Iterable[tuple[str, bytes | msgspec.Raw]]) -> bytes:
    return b"{%b}" % b",".join([b'"%b":%b' % (name.encode(), bytes(value)) for name, value in fields])


def _take(choice: _Choice, found: _Raw) -> None:
    for name, value in found.items():
        said = bytes(value)
        match name:
            case "delta":
                for part, text in _CHUNK.decode(value).items():
                    choice.add(part, bytes(text))
            case "logprobs" if said != b"null":
                choice.logprobs.append(bytes(_CHUNK.decode(value)["content"])[1:-1])
            case "finish_reason" if said != b"null":
                choice.finish = said
            case "text":
                choice.add(name, said)


def _written(choices: dict[int, _Choice], last: dict[str, bytes]) -> bytes:
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
    return _object(fields.items())
