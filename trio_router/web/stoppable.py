"""Requests that llama-server stops at once when their client leaves.

It looks for the client only when it has something to write, or when no request at all got a result for a second
(llama.cpp's `server_response::recv_with_timeout`). So it computes a prompt, or an answer that is to come in one piece,
to the end for nobody, as long as it computes for others beside. What makes it write is a stream with `return_progress`:
a line after each batch of the prompt, and one for each token.

Unless `system.stop_at_once` is off, that is asked for in the place of what the client asked for. The lines on progress
are left out again; a whole answer is put together from its stream as llama-server would have written it: in the same
order, and with its own numbers, digit by digit. A stream that no whole can be made from is asked for again as the client
did, and so is what comes after it on the same path, until there is another llama-server. What llama-server does not
stream, or words otherwise there, is asked for again likewise, but only that: an error in the middle of a message or a
response, an answer that is cut at its greatest length while something of it is kept back (half a character, or what may
be the beginning of a stop word), one of which nothing was said (it may have been the beginning of a thought, or of a tool's
call), a stream that goes on with what the model had said. What is asked for twice finds its own prompt in the cache, and
says so. Whatever stands in a llama-server's place, and does not say in `/props` which
build of llama.cpp it is, gets every request as it came.

Left alone is what gains nothing or lacks something. A message's stream (`/v1/messages`) does not say how far its prompt
is, so a message stops at once only from its first token on. Streams of several answers have lines on progress anywhere,
and a response's stream with `timings_per_token` says with them what it would not say. Several responses are a list in one
piece. Of llama-server's own completions, several at once, and those with `response_fields` or `return_tokens`, say other things
in one piece, and so do answers with log probabilities, with `continue_final_message` and with `verbose`. Embeddings, rankings and audio have no stream.
"""

import re
from typing import Final

import attrs

from trio_router.backend.answer import AnswerHead, Headers
from trio_router.backend.backend import Backend
from trio_router.backend.connection import BackendLost, Connection
from trio_router.web.admission import Talk
from trio_router.web.assembly import END, Assembly, NotWhole, ResponseAssembly, Whole
from trio_router.web.continuing import Continuing, NotContinued, PartAssembly
from trio_router.web.message_assembly import MessageAssembly
from trio_router.web.native_assembly import NativeAssembly

CHATS: Final = frozenset({"/v1/chat/completions", "/chat/completions", "/v1/completions"})
RESPONSES: Final = frozenset({"/v1/responses", "/responses"})
MESSAGES: Final = frozenset({"/v1/messages"})
NATIVE: Final = frozenset({"/completion", "/completions", "/infill"})
PATHS: Final = CHATS | RESPONSES | MESSAGES | NATIVE
PROGRESS: Final = b'"prompt_progress":'
ROLE: Final = b'"content":null'
"""In the event of a chat that says who speaks, and nothing else."""
DELTA: Final = b'"delta":'
ANNOUNCING: Final = b"event: response.in_progress"
_BLANKS: Final = b" \t\r\n"
_OPENS: Final = ord("{")
_ITS_PROGRESS: Final = re.compile(rb',"prompt_progress":\{[^{}]*\}')
_STREAM_ONLY: Final = frozenset({b"cache-control", b"x-accel-buffering"})


@attrs.frozen
class Stoppable:
    """What is sent in a request's place."""

    path: str
    source: bytes | bytearray
    """The body as the client sent it."""
    whole: bool
    """Whether the client wants its answer in one piece."""
    tools: bool = False
    """Whether the model may call some."""
    continuing: Continuing | None = None
    """Keeps what came of a whole answer, if it is interrupted."""
    backend: Backend | None = None
    """Where it is asked."""

    @classmethod
    def of(cls, path: str, body: bytes | bytearray, talk: Talk, *, stream: bool) -> "Stoppable | None":
        """None for a request that is to be sent as it is."""
        if path not in PATHS or talk.is_odd or talk.wants_progress:
            return None
        if (talk.is_several and (stream or path in NATIVE)) or (talk.is_list and path in RESPONSES):
            return None
        if stream and (path in MESSAGES or (path in RESPONSES and talk.wants_timings)):
            return None
        if not stream and (talk.is_told_otherwise or (path in NATIVE and talk.is_cut_out)):
            return None
        return cls(path, body, whole=not stream, tools=talk.has_tools)

    @property
    def name(self) -> str:
        """Of requests like it."""
        return f"{self.path} with tools" if self.tools else self.path

    @property
    def in_prompt(self) -> bool:
        """Whether it stops before its first token, too."""
        return self.path not in MESSAGES

    @property
    def body(self) -> bytes:
        """What is sent."""
        more = b',"return_progress":true}'
        if self.whole:  # of fields that come twice, llama-server takes the last
            more = b',"stream":true,"stream_options":{"include_usage":true}' + more
            if self.path in CHATS or self.path in RESPONSES:  # the others do not say it, or say it in another way
                more = b',"timings_per_token":true' + more
        source = self.source if self.continuing is None else self.continuing.body
        end = _end(source, len(source)) - 1
        if source[_end(source, end) - 1] == _OPENS:  # there is nothing in it
            more = more[1:]
        return b"".join((memoryview(source)[:end], more))

    def on(self, backend: Backend) -> "Stoppable | None":
        """None where the request is to be sent as it is: to who is no llama-server, or makes no whole of such answers."""
        if not backend.genuine or (self.whole and self.name in backend.unstoppable):
            return None
        continuing = None if self.path in backend.beginning else self.continuing
        if self.path in RESPONSES:
            return attrs.evolve(self, continuing=continuing, backend=backend)
        return self if continuing is self.continuing else attrs.evolve(self, continuing=None)

    def otherwise(self, backend: Backend, error: NotWhole) -> "Stoppable | None":
        """What is sent since this was no way to ask that one; None: the request as it is."""
        if isinstance(error, NotContinued) and self.continuing is not None:
            backend.beginning.add(self.path)
            self.continuing.parts.clear()
            return self
        if error.ever:
            backend.unstoppable.add(self.name)
        return None

    def check(self, head: AnswerHead) -> None:
        """Raise NotWhole if the answer is a refusal that may be the stream's only, NotContinued if it may be a part's."""
        if head.status >= 400 and self.continuing is not None and self.continuing.parts:
            raise NotContinued(f"it answers with status {head.status}")
        if self.whole and self.tools and head.status >= 400:
            raise NotWhole(f"a stream was answered with status {head.status}", ever=False)

    async def begin(self, connection: Connection, head: AnswerHead) -> tuple[AnswerHead, bytes]:
        """The answer's head, and the first bytes of it, as the client is to have them.

        Raises BackendLost, NotWhole, NotContinued.
        """
        if not self.whole:
            first = _first_of_response if self.path in RESPONSES else _first_event
            return head, await first(connection)
        assembly = self._assembly()

        def take(piece: bytes) -> bool:
            assembly.feed(piece)
            return True

        try:
            while piece := await connection.receive():
                assembly.feed(piece)
                await connection.stream(take)
        except BackendLost:
            if isinstance(assembly, PartAssembly):
                assembly.keep()
            raise
        status, body = assembly.whole()
        headers: Headers = [
            (name, b"application/json; charset=utf-8" if name == b"content-type" else value)
            for name, value in head.headers
            if name not in _STREAM_ONLY
        ]
        headers.append((b"content-length", b"%d" % len(body)))
        return AnswerHead(status=status, headers=headers, length=len(body)), body

    def _assembly(self) -> Whole:
        if self.continuing is not None:
            return PartAssembly(continuing=self.continuing)
        if self.path in RESPONSES:
            longest, context = (None, None) if self.backend is None else (self.backend.longest, self.backend.context)
            return ResponseAssembly(self.source, longest, context)
        if self.path in MESSAGES:
            return MessageAssembly(self.source)
        return NativeAssembly() if self.path in NATIVE else Assembly()


def _end(source: bytes | bytearray, end: int) -> int:
    """Of what stands before `end`, without blanks behind it."""
    while source[end - 1] in _BLANKS:
        end -= 1
    return end


async def _first_event(connection: Connection) -> bytes:
    """What comes behind the lines on progress, from the first event that is whole.

    Raises NotWhole if there was something before them: the answer goes on with a last message of the model's own, which
    is repeated with them, and in other pieces than without.
    """
    data = kept = b""
    told = begun = False
    while piece := await connection.receive():
        *events, data = (data + piece).split(END)
        for event in events:
            if PROGRESS in event:
                _check_new(kept)
                told = True
            else:
                kept += event + END
                begun |= ROLE not in event
        if kept and (told or begun):
            return kept + data
    return kept + data


async def _first_of_response(connection: Connection) -> bytes:
    """The first events, the Responses API's, once there are others than those that announce them.

    Progress is said in events that would come anyway, and more of them. Raises NotWhole as above.
    """
    data = kept = b""
    told = False
    while piece := await connection.receive():
        data += piece
        while (end := data.find(END)) >= 0:
            event, data = data[: end + len(END)], data[end + len(END) :]
            if PROGRESS not in event:
                kept += event
                if told or DELTA in event:
                    return kept + data
            else:
                if not event.startswith(ANNOUNCING):
                    _check_new(event)
                if not told:
                    told = True
                    kept += _ITS_PROGRESS.sub(b"", event)
    return kept + data


def _check_new(said: bytes) -> None:
    if said:
        raise NotWhole("it goes on with what the model had said", ever=False)
