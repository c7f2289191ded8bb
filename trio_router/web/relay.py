"""The way of an answer's bytes from a llama-server to its client."""

import json
from collections.abc import Callable
from typing import Final

import attrs
import structlog
import trio

from trio_router.backend.answer import BODILESS, Headers
from trio_router.backend.connection import BackendLost
from trio_router.errors import BackendBroken, BackendTimeout, BackendUnavailable, RouterError
from trio_router.fleet.scheduler import Lease
from trio_router.web.error_events import error_event, told_event
from trio_router.web.outgoing import EVENT_STREAM, WHOLE_BYTES, Opened, is_event_stream

log = structlog.get_logger("trio_router.web")

NOT_RETURNED: Final = frozenset({b"content-length", b"date", b"server"})
"""The length is told anew, where there is one."""
CORS_PREFIX: Final = b"access-control-"
TAIL_BYTES: Final = 2048
"""How much of an answer's end is kept, for the token counts that stand there."""

MAX_PIECES: Final = 12
MAX_EVENTS: Final = 4
"""How many of the last pieces are kept, of a stream: each is an event or more, and the token counts are in the last
but one at the latest."""
EVENT_ENDS: Final = (b"\n\n", b"\n\r\n")
MAX_HALF_BYTES: Final = 16 * 1024
"""An event whose end has not come is held back up to this: if it never comes, no client has to make sense of half of it."""

STREAM_HEADERS: Final[Headers] = [
    (b"content-type", EVENT_STREAM), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"),
]  # fmt: skip
"""Of a stream that began before llama-server's."""


@attrs.define(eq=False)
class Answer:
    """An answer on its way to a client: `receive` until it returns b"", then `close`, whatever happened."""

    endpoint: str
    lease: Lease
    opened: Opened
    queue_seconds: float
    queue_position: int = 0
    """Its request's place in the queue when it arrived."""
    estimate_seconds: float | None = None
    """How long it was expected to wait, if that was asked."""
    error: RouterError | None = None
    """What ended it before its time, if something did."""
    refusal: RouterError | None = None
    """Why it is not to go on."""
    _last: list[bytes] = attrs.field(factory=list)
    """The last pieces that went out, and maybe a few more than `tail` needs."""
    status: int = attrs.field(init=False)
    """The backend's own."""
    is_stream: bool = attrs.field(init=False)
    """Whether the body is a stream of events."""
    length: int | None = attrs.field(init=False)
    """Of the body, as its client is to be told. A stream's is not: it may end with more than its backend had to say."""
    given_back_at: float | None = None
    """Trio time at which its slot was."""
    _whole: bool = False
    """Whether every byte had been handed out by then."""
    _begun: bool = False
    _over: bool = False
    _half: bytes = b""
    """The beginning of an event whose end has not come."""

    def __attrs_post_init__(self) -> None:
        head = self.opened.head
        self.status = head.status
        known = head.memo.get("stream")
        if known is None:
            known = head.memo["stream"] = is_event_stream(head)
        self.is_stream = known
        self.length = None if known or self.status in BODILESS else head.length

    @property
    def chunked(self) -> bool:
        """Whether it has to be said where the body ends."""
        return self.length is None and self.status not in BODILESS

    @property
    def handed_out(self) -> bool:
        """Whether `receive` has returned every byte there is."""
        if self.given_back_at is not None:
            return self._whole
        return self._begun and self.error is None and self.opened.connection.complete and not self._half

    def _kept(self) -> Headers:
        headers = [
            (name, value)
            for name, value in self.opened.head.headers
            if name not in NOT_RETURNED and not name.startswith(CORS_PREFIX)
        ]
        if self.is_stream:
            headers = [(name, value) for name, value in headers if name not in {b"cache-control", b"x-accel-buffering"}]
            headers += STREAM_HEADERS[1:]
        return headers

    def headers(self) -> Headers:
        """The backend's headers, less what concerns only us and it, and what a stream needs beside them."""
        headers = self._kept()
        if self.length is not None:
            headers.append((b"content-length", b"%d" % self.length))
        headers.append((b"x-queue-time-ms", b"%d" % round(self.queue_seconds * 1000)))
        headers.append((b"x-queue-position", b"%d" % self.queue_position))
        if self.estimate_seconds is not None:
            headers.append((b"x-queue-estimate-ms", b"%d" % round(self.estimate_seconds * 1000)))
        return headers

    def header_lines(self) -> bytes:
        """The same as lines, for those who write them."""
        head = self.opened.head
        lines: bytes | None = head.memo.get("lines")
        if lines is None:
            lines = head.memo["lines"] = b"".join([b"%b: %b\r\n" % header for header in self._kept()])
        if self.estimate_seconds is not None:
            lines += b"x-queue-estimate-ms: %d\r\n" % round(self.estimate_seconds * 1000)
        wait, position = round(self.queue_seconds * 1000), self.queue_position
        if self.length is None:
            return b"%bx-queue-time-ms: %d\r\nx-queue-position: %d\r\n" % (lines, wait, position)
        return b"%bcontent-length: %d\r\nx-queue-time-ms: %d\r\nx-queue-position: %d\r\n" % (
            lines, self.length, wait, position,
        )  # fmt: skip

    async def receive(self) -> bytes:
        """The next bytes for the client, b"" at the end.

        A stream comes event by event, and if its backend dies it ends with one error event in the words of its
        endpoint. Raises RouterError for any other answer that cannot be completed: its client must not take what it
        has for the whole. With the last of it the slot is given back: its client may take its time.
        """
        while not self._over:
            try:
                piece = await self.opened.connection.receive() if self._begun else self.opened.first
            except BackendLost as lost:
                self._over, self._half = True, b""
                self.error = self._lost(lost)
                if not self.is_stream:
                    raise self.error from lost
                return self._passed(error_event(self.endpoint, self.error, cut=not self.tail.endswith(EVENT_ENDS)))
            self._over = self._begun and not piece
            self._begun = True
            if self._half or not piece.endswith(EVENT_ENDS):
                piece = self._ended(piece)
            if piece:
                if self.handed_out:
                    self.close()
                return self._passed(piece)
        self.close()
        return b""

    def _ended(self, piece: bytes) -> bytes:
        """What has come of a stream up to the end of an event, or all there will be; of another answer all."""
        if not self.is_stream:
            return piece
        piece, self._half = self._half + piece, b""
        if self._over or piece.endswith(EVENT_ENDS):
            return piece
        end = max(piece.rfind(mark) + len(mark) if mark in piece else 0 for mark in EVENT_ENDS)
        if len(piece) - end > MAX_HALF_BYTES:
            return piece
        self._half = piece[end:]
        return piece[:end]

    async def as_event(self) -> bytes:
        """The whole of an answer that is no stream, as an event of a stream that has begun: it tells of an error."""
        body = b""
        try:
            while (piece := await self.receive()) and len(body) < WHOLE_BYTES:
                body += piece
        except RouterError as error:
            return error_event(self.endpoint, error, cut=False)
        try:
            told = json.loads(body)
            message = str(told["error"]["message"])
        except (ValueError, LookupError, TypeError):
            where = f"the llama-server of model {self.lease.slot.backend.alias!r}"
            broken = BackendBroken(f"{where} answered a request for a stream with status {self.status} and no stream")
            return error_event(self.endpoint, broken, cut=False)
        return told_event(self.endpoint, told, message, cut=False)

    async def stream(self, pass_on: Callable[[bytes], bool]) -> None:
        """Give `pass_on` what comes next, piece by piece, for as long as that is all there is to do.

        Returns when `pass_on` returned False, or when `receive` is to be asked again.
        """
        if self._over:
            return

        def passed(piece: bytes) -> bool:
            if self._half or not piece.endswith(EVENT_ENDS):
                piece = self._ended(piece)
            return not piece or pass_on(self._passed(piece))

        await self.opened.connection.stream(passed)

    def cut(self, error: RouterError) -> None:
        """Have it end with `error`, if it has not ended."""
        if self.given_back_at is None:
            self.refusal = error
            self.opened.connection.close()
            self._give_back()  # its client may be taking nothing

    def _lost(self, lost: BackendLost) -> RouterError:
        if self.refusal is not None:
            return self.refusal
        backend = self.lease.slot.backend
        backend.look_for_its_end()
        if lost.silent:
            return BackendTimeout(f"model {backend.alias!r}: {lost}", param="model")
        why = f"the llama-server of model {backend.alias!r} was lost in the middle of an answer"
        return BackendUnavailable(f"{why}: {backend.lost or lost}", param="model")

    def _passed(self, piece: bytes) -> bytes:
        if piece:
            self._last.append(piece if len(piece) <= TAIL_BYTES else piece[-TAIL_BYTES:])
            if len(self._last) > MAX_EVENTS:
                if self.is_stream:
                    del self._last[0]
                elif len(self._last) > MAX_PIECES:
                    self._last = [self.tail]
        return piece

    @property
    def tail(self) -> bytes:
        """The last bytes that went out."""
        return b"".join(self._last)[-TAIL_BYTES:]

    @property
    def end(self) -> bytes:
        """The last piece that went out, or its end."""
        return self._last[-1] if self._last else b""

    def close(self) -> None:
        """Give the slot back, once; an answer that was not read to its end is cut off, so that llama-server stops."""
        self._whole, self._over = self.handed_out, True
        if self.given_back_at is None:  # else the connection may be another request's
            self._give_back()

    def _give_back(self) -> None:
        self.given_back_at = trio.current_time()
        self.opened.connection.finish()
        self.lease.release()
