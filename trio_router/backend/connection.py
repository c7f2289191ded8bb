"""One HTTP/1.1 connection to a llama-server, used by one lease at a time.

There is no pool: a slot keeps its connection, and whoever holds the slot's lease uses it. (httpx's pool is linear
in its connections and does not survive cancellation: httpcore#1093.) The answer's body comes out as it came in,
without its framing; several chunks that arrived together come out together.

*Error handling.* Whatever goes wrong between us and the backend is a `BackendLost`; nothing of sockets or of the
parser gets out of this module. A backend that neither takes nor says anything for `patience_seconds` is one too: not
by a cancel scope around each read, which would cost as much as the read, but by `expire_silent`, which whoever owns
the connections calls every now and then.

llama-server's plain answers begin with the same bytes again and again but for the length. Such a head is parsed once,
by llhttp like all others, and known by its bytes from then on.
"""

import errno
import math
import os
import re
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import attrs
import httptools
import outcome
import trio

from trio_router.backend.address import Address
from trio_router.backend.pump import Attention, Pump

READ_BYTES = 64 * 1024
BULK_BYTES = 4096
BURST_BYTES = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024
CONNECT_SECONDS = 10.0
"""A backend whose backlog is full for this long takes no more."""
CONNECT_RETRY_SECONDS = 0.01
PING_BYTES = 20
"""llama-server says `:` in a stream that waits; less than this is no sign that it computes."""
MAX_IDLE_SECONDS = 4.0
"""llama-server closes a connection that was idle for 5 s (cpp-httplib); a request must not cross that."""

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110 section 7.6.1, and what older clients send."""

Headers = list[tuple[bytes, bytes]]

_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\nContent-Length: ([0-9]{1,15})\r\n")
_MOST_KNOWN: Final = 256
_MAX_KNOWN_BYTES: Final = 2048
_BODILESS: Final = frozenset({204, 304})


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


@attrs.define(eq=False, kw_only=True)
class AnswerHead:
    """The first part of an answer; names are lower case, hop-by-hop headers are gone."""

    status: int
    headers: Headers
    length: int | None = None
    """Of the body, bytes, where the answer says so beforehand."""
    memo: dict[str, Any] = attrs.field(factory=dict)
    """For whoever passes answers on: shared by all whose heads are the same but for the length."""

    def get(self, name: bytes) -> bytes | None:
        """The first value of `name` (lower case), or None."""
        return next((value for key, value in self.headers if key == name), None)


@attrs.define(eq=False)
class _Kind:
    """Heads that are the same but for the length."""

    status: int
    before: Headers
    after: Headers
    """Headers before and after the length."""
    memo: dict[str, Any] = attrs.field(factory=dict)


_known: Final[dict[tuple[bytes, bytes], _Kind]] = {}
"""By their bytes before and after the length. All of them are llama-server's, so they are few."""

_heads: Final[dict[tuple[int | tuple[bytes, bytes], ...], AnswerHead]] = {}
"""Heads that do not say how long the body is, by what they say."""


@attrs.define(eq=False)
class _Reading:
    """What we know of the answer at hand: by its bytes, or because the parser has told us."""

    status: int = 0
    headers: Headers = attrs.field(factory=list)
    head_bytes: int = 0
    head_done: bool = False
    barren_bytes: int = 0
    """What came since there was last something for the client: a head, trailers or a chunk's name without an end."""
    keep_alive: bool = False
    """Whether the connection may carry another request; the parser knows until the answer's end."""
    body: list[bytes] = attrs.field(factory=list)
    done: bool = False
    extra: bool = False
    """Something came after the end: the connection cannot be trusted with another request."""
    head: AnswerHead | None = None
    left: int = 0
    """Bytes of the body to come, of an answer whose head was known."""
    parser: httptools.HttpResponseParser | None = None

    def recognise(self, data: bytes) -> bool:
        """Take the first bytes of an answer, if its head is one we know."""
        end = data.find(_END)
        if end < 0 or (length := _LENGTH.search(data, 0, end + 2)) is None:
            return False
        kind = _known.get((data[: length.start(1)], data[length.end(1) : end]))
        if kind is None:
            return False
        digits = length[1]
        self.left = int(digits)
        self.head = AnswerHead(
            status=kind.status,
            headers=[*kind.before, (b"content-length", digits), *kind.after],
            length=self.left,
            memo=kind.memo,
        )
        self.head_done = self.keep_alive = True
        self.done = not self.left
        if len(data) > end + len(_END):
            self.take(data[end + len(_END) :])
        return True

    def take(self, data: bytes) -> None:
        """Take more bytes of an answer whose head was known."""
        if len(data) > self.left:
            self.extra = True
            data = data[: self.left]
        if data:
            self.left -= len(data)
            self.body.append(data)
            self.done = not self.left

    def feed(self, data: bytes) -> None:
        """Have the parser take more bytes. Raises httptools' errors."""
        if self.parser is None:
            self.parser = httptools.HttpResponseParser(self)
            self.parser.feed_data(data)
            self._get_to_know(data)
        else:
            self.parser.feed_data(data)

    def _get_to_know(self, data: bytes) -> None:
        """Remember the head that `data`, the first bytes of an answer, begins with, if it is a plain one."""
        end = data.find(_END)
        if end < 0 or not self.head_done or not self.keep_alive or self.status < 200 or self.status in _BODILESS:
            return
        names = [name for name, _ in self.headers]
        length = _LENGTH.search(data, 0, end + 2)
        if length is None or b"transfer-encoding" in names or names.count(b"content-length") != 1:
            return
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        headers = kept(self.headers)
        place = [name for name, _ in headers].index(b"content-length")
        kind = _Kind(self.status, headers[:place], headers[place + 1 :])
        _known[data[: length.start(1)], data[length.end(1) : end]] = kind

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head_done:  # a trailer, which is no header (RFC 9110 section 6.5.1), or part of something extra
            return
        self.head_bytes += len(name) + len(value)
        if self.head_bytes > MAX_HEAD_BYTES:
            raise ValueError(f"headers of more than {MAX_HEAD_BYTES} bytes")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.parser is not None and not self.head_done:
            self.head_done = True
            self.status = self.parser.get_status_code()
            self.keep_alive = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        if not self.extra:
            self.body.append(body)

    def on_message_begin(self) -> None:
        self.extra = self.done

    def on_message_complete(self) -> None:
        self.done = True


def head_of(status: int, headers: Headers) -> AnswerHead:
    """What an answer begins with. Those of streams are all the same, and then the same object."""
    head = _heads.get((status, *headers))
    if head is None:
        head = AnswerHead(status=status, headers=headers)
        length = head.get(b"content-length")
        if length is not None:
            head.length = int(length) if length.isdigit() else None
        elif sum(len(name) + len(value) for name, value in headers) <= _MAX_KNOWN_BYTES:
            if len(_heads) >= _MOST_KNOWN:
                _heads.clear()
            _heads[status, *headers] = head
    return head


def kept(headers: Headers) -> Headers:
    """`headers` without those that concern the connection alone."""
    listed = {name.strip().lower() for key, value in headers if key == b"connection" for name in value.split(b",")}
    return [(key, value) for key, value in headers if key not in HOP_BY_HOP and key not in listed]


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
    _reading: _Reading = attrs.field(factory=_Reading)
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
        self._reading = _Reading()
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
            self.close()
            raise self._broke("the connection broke while the request was sent", stale=self._reused) from error

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
                raise BackendLost(f"answered with status {reading.status}")
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
            raise BackendLost(f"answered with something that is not HTTP ({error})") from error
        reading.barren_bytes = 0 if reading.body or reading.done else reading.barren_bytes + len(data)
        if reading.barren_bytes > MAX_HEAD_BYTES:
            self.close()
            raise BackendLost(f"answered with headers of more than {MAX_HEAD_BYTES} bytes")

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
