"""One HTTP/1.1 connection to a llama-server, used by one lease at a time.

There is no pool: a slot keeps its connection, and whoever holds the slot's lease uses it. (httpx's pool is linear
in its connections and does not survive cancellation: httpcore#1093.)

*Error handling.* Whatever goes wrong between us and the backend is a `BackendLost`; nothing of sockets or of the
parser gets out of this module. A backend that neither takes nor says anything for `patience_seconds` is one too: not
by a cancel scope around each read, which would cost as much as the read, but by `expire_silent`, which whoever owns
the connections calls every now and then.
"""

import errno
import math
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import attrs
import httptools
import outcome
import trio

from trio_router.backend.address import Address
from trio_router.backend.answer import MAX_HEAD_BYTES, AnswerHead, Reading, head_of, kept
from trio_router.backend.pump import Attention, Pump

READ_BYTES = 64 * 1024
BULK_BYTES = 4096
BURST_BYTES = 256 * 1024
CONNECT_SECONDS = 10.0
"""A backend whose backlog is full for this long takes no more."""
CONNECT_RETRY_SECONDS = 0.01
PING_BYTES = 20
"""llama-server says `:` in a stream that waits; less than this is no sign that it computes."""
MAX_IDLE_SECONDS = 4.0
"""llama-server closes a connection that was idle for 5 s (cpp-httplib); a request must not cross that."""


class BackendLost(Exception):
    """Raised when the connection to a backend breaks, or carries something that is not HTTP.

    `stale` says that a kept connection was closed under us before one byte of an answer came: llama-server had
    ended an idle connection, and the request can go out again on a fresh one. `silent` says that it said nothing for as
    long as it may. `unsent` says that there was no connection at all: nothing is known of what it would have answered.
    """

    def __init__(self, message: str, *, stale: bool = False, silent: bool = False, unsent: bool = False) -> None:
        super().__init__(message)
        self.stale = stale
        self.silent = silent
        self.unsent = unsent


@attrs.define(eq=False)
class Connection:
    """A connection and the state of the exchange on it.

    Socket calls that are likely to succeed are tried first and waited for only if they would block; one that never
    blocks lets others run after `BURST_BYTES`.
    """

    _sock: socket.socket
    """Non-blocking."""
    _news: select.poll = attrs.field(init=False, repr=False)
    """Whether there is anything to read, asked without reading."""
    _reading: Reading = attrs.field(factory=Reading)
    _idle_since: float | None = None
    """When the last exchange ended, `time.monotonic`; None while one is under way."""
    _reused: bool = False
    """Whether the exchange at hand is not the first on this connection."""
    _answered: bool = False
    """Whether a byte of the answer at hand has come."""
    _more: bool = False
    """Whether the next read is worth trying at once; after a token's worth of bytes it would only tell us to wait."""
    _burst: int = 0
    patience_seconds: float = math.inf
    """Longest silence of the backend while we wait for it."""
    _waiting: bool = False
    """Whether we wait for the backend."""
    _quiet_since: float | None = None
    """Trio time at which `expire_silent` first saw the wait under way."""
    spoke: bool = False
    """Whether something of an answer's body came since this was last cleared; signs of life do not count."""
    _attention: Attention | None = None
    """The pump's, while `stream` waits."""
    _loss: BackendLost | None = None
    """What `stream` ended with."""
    expired: bool = False
    closed: bool = False
    _salvaged: bool = False
    """Whether `salvage` took something that a reader has yet to look at."""

    def __attrs_post_init__(self) -> None:
        self._news = select.poll()
        self._news.register(self._sock, select.POLLIN)

    @classmethod
    async def open(cls, address: Address) -> "Connection":
        """Connect. Raises BackendLost."""
        with trio.move_on_after(CONNECT_SECONDS):
            return await cls._open(address)
        raise BackendLost(f"no connection to {address} within {CONNECT_SECONDS:g} s", unsent=True)

    @classmethod
    async def _open(cls, address: Address) -> "Connection":
        family = socket.AF_UNIX if address.path is not None else socket.AF_INET
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError as shortage:  # of file descriptors, or of memory for one
            raise BackendLost(f"cannot connect to {address}: {shortage.strerror}", unsent=True) from shortage
        try:
            if address.path is not None:
                # at once, or not at all: a full backlog is EAGAIN, unix(7)
                while (error := sock.connect_ex(address.path)) == errno.EAGAIN:  # noqa: ASYNC110  (nothing tells)
                    await trio.sleep(CONNECT_RETRY_SECONDS)
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                error = sock.connect_ex((address.host, address.port))
                if error == errno.EINPROGRESS:
                    await trio.lowlevel.wait_writable(sock)
                    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except BaseException:
            sock.close()
            raise
        if error:
            sock.close()
            raise BackendLost(f"cannot connect to {address}: {os.strerror(error)}", unsent=True)
        return cls(sock)

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent: the last exchange ended well, not long ago, and nothing came since."""
        if self.closed or self._idle_since is None or time.monotonic() - self._idle_since > MAX_IDLE_SECONDS:
            return False
        return not self._news.poll(0)  # else it was closed by the backend, or that spoke out of turn

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for the backend to take or say something."""
        return self._waiting and not self.closed

    @property
    def complete(self) -> bool:
        """Whether the whole answer has been read, and handed out."""
        return self._reading.done and not self._reading.body

    async def send(self, head: bytes, body: bytes | bytearray) -> None:
        """Send one request, `head` with its empty line included. Raises BackendLost."""
        self._reused = self._idle_since is not None
        self._idle_since = None
        self._answered = self._more = False
        self._reading = Reading()
        try:
            if len(body) <= READ_BYTES:
                data = head + body
                try:
                    count = self._sock.send(data)
                except BlockingIOError:
                    count = 0
                if count < len(data):
                    await self._send(data[count:])
            else:
                await self._send(head)
                await self._send(body)
        except (OSError, trio.ClosedResourceError) as error:
            self.salvage()  # it may have answered before it had read all of it
            self._salvaged = False
            if not self._reading.done:
                raise self._broke(
                    "the connection broke while the request was sent", stale=self._reused and not self._answered
                ) from error

    async def _send(self, data: bytes | bytearray) -> None:
        rest = memoryview(data)
        while rest:
            try:
                count = self._sock.send(rest[:BURST_BYTES])
            except BlockingIOError:
                self._burst = 0
                self._waiting = True
                await trio.lowlevel.wait_writable(self._sock)
                self._waiting, self._quiet_since = False, None
            else:
                rest = rest[count:]
                await self._pace(count)

    async def _pace(self, count: int) -> None:
        self._burst += count
        if self._burst >= BURST_BYTES:
            self._burst = 0
            await trio.lowlevel.checkpoint()

    def _broke(self, message: str, *, stale: bool) -> BackendLost:
        if self.expired:
            return BackendLost(f"llama-server was silent for {self.patience_seconds:g} s", silent=True)
        return BackendLost(message, stale=stale)

    def expire_silent(self, now: float) -> None:
        """Close, if the backend has been silent for longer than it may at trio time `now`.

        A silence counts from the first time that this sees it, so that no wait has to look at the clock.
        """
        if self._waiting and not self.closed:
            if self._quiet_since is None:
                self._quiet_since = now
            elif now - self._quiet_since >= self.patience_seconds:
                self.expired = True
                self.close()

    async def receive_head(self) -> AnswerHead:
        """The answer's status and headers. Raises BackendLost."""
        reading = self._reading
        while not reading.head_done:
            await self._read()
        if reading.head is None:
            if reading.status < 200:
                self.close()
                raise BackendLost(f"it answered with status {reading.status}")
            reading.head = head_of(reading.status, kept(reading.headers))
            reading.headers = []
        return reading.head

    async def receive(self) -> bytes:
        """The next piece of the body as it came, b"" at its end. Raises BackendLost."""
        reading = self._reading
        while not reading.body and not reading.done:
            await self._read()
        if not reading.body:
            return b""
        body = reading.body
        piece = body[0] if len(body) == 1 else b"".join(body)
        body.clear()
        return piece

    async def stream(self, pass_on: Callable[[bytes], bool]) -> None:
        """Give `pass_on` the pieces of the body as they come, without a task that wakes for each.

        Returns when that returns False, when pieces come in bulk, or when `receive` has more to say: the end, an error.
        *Cancellation*: at once.
        """
        reading = self._reading
        if self.closed or self._more or reading.body or reading.done:
            return

        def ready() -> bool:
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                return True
            self._quiet_since = None
            self._more = len(data) >= BULK_BYTES
            try:
                self._take(data)
            except BackendLost as lost:
                self._loss = lost  # closing has ended the wait already
                return False
            if not reading.body:
                return not reading.done
            if len(data) > PING_BYTES:
                self.spoke = True
            piece = reading.body[0] if len(reading.body) == 1 else b"".join(reading.body)
            reading.body.clear()
            return pass_on(piece) and not reading.done and not self._more

        self._burst = 0
        self._waiting = True
        try:
            await Pump.here().attend(self._sock, ready, self._attended)
        except (OSError, trio.ClosedResourceError):
            self.close()
        finally:  # also when `pass_on` raises: nobody waits for an answer that has no client any more
            self._waiting, self._quiet_since = False, None

    def _attended(self, attention: Attention | None) -> None:
        self._attention = attention

    async def _read(self) -> None:
        """Read once and parse what came."""
        if self.closed:
            raise self._loss or self._broke("the connection broke", stale=False)
        try:
            while True:
                if not self._more:
                    self._burst = 0
                    self._waiting = True
                    await trio.lowlevel.wait_readable(self._sock)
                    self._waiting, self._quiet_since = False, None
                try:
                    data = self._sock.recv(READ_BYTES)
                    break
                except BlockingIOError:
                    self._more = False
            self._more = len(data) >= BULK_BYTES
            self._burst += len(data)
            if self._burst >= BURST_BYTES:
                await self._pace(0)
        except (OSError, trio.ClosedResourceError) as error:
            self.close()
            if self._salvaged:
                self._salvaged = False
                return
            raise self._broke("the connection broke", stale=self._reused and not self._answered) from error
        self._take(data)
        if self._reading.body and len(data) > PING_BYTES:
            self.spoke = True

    def _take(self, data: bytes) -> None:
        """Understand what was read; nothing is the end. Raises BackendLost."""
        if not data:
            self.close()
            raise BackendLost(
                "the connection was closed "
                + ("in the middle of an answer" if self._answered else "without an answer"),
                stale=self._reused and not self._answered,
            )
        reading = self._reading
        if reading.parser is None:
            if reading.head is not None:
                reading.take(data)
                return
            if not self._answered and reading.recognise(data):
                self._answered = True
                return
        self._answered = True
        try:
            reading.feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if reading.done:  # bytes after a complete answer: that one stands, the connection goes
                reading.extra = True
                return
            self.close()
            raise BackendLost(f"it answered with something that is not HTTP ({error})") from error
        reading.barren_bytes = 0 if reading.body or reading.done else reading.barren_bytes + len(data)
        if reading.barren_bytes > MAX_HEAD_BYTES:
            self.close()
            raise BackendLost(f"it answered with headers of more than {MAX_HEAD_BYTES} bytes")

    def finish(self) -> None:
        """The exchange is over: keep the connection for the next one if it can carry one, else close it."""
        if self.closed:
            return
        reading = self._reading
        reading.parser = None  # they refer to each other, and would wait for the garbage collector
        if self.complete and not reading.extra and reading.keep_alive:
            self._idle_since = time.monotonic()
        else:
            self.close()

    async def until_let_go(self) -> None:
        """Say that nobody waits for the answer any more, and return when the backend has closed, whatever it said yet.

        Our half is closed: llama-server takes that for a client that left, as soon as it looks, and closes its own when
        it no longer works on the request. The connection is good for nothing afterwards.
        """
        try:
            self._sock.shutdown(socket.SHUT_WR)
            while not self.closed:
                self._waiting = True
                await trio.lowlevel.wait_readable(self._sock)
                self._waiting, self._quiet_since = False, None
                with suppress(BlockingIOError):
                    if not self._sock.recv(READ_BYTES):
                        break
        except (OSError, trio.ClosedResourceError):
            pass  # it is gone, or silent for too long, or we were told to close
        finally:
            self.close()

    def salvage(self) -> None:
        """Close, but take first what the backend had said before it died; whoever is reading gets that, then BackendLost.

        Its exit is noticed before its last words are read as often as not. `BURST_BYTES` at most: no stream has more.
        """
        taken = 0
        with suppress(OSError, BackendLost):
            while not self.closed and taken < BURST_BYTES and (data := self._sock.recv(READ_BYTES)):
                taken += len(data)
                self._take(data)
        self._salvaged = taken > 0
        self.close()

    def close(self) -> None:
        """Close at once, without waiting; whoever is reading or writing gets a BackendLost."""
        if not self.closed:
            self.closed = True
            if self._attention is not None:
                self._attention.end(outcome.Error(trio.ClosedResourceError()))
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
