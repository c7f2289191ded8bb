"""One HTTP/1.1 connection to a llama-server, used by one lease at a time.

There is no pool: a slot keeps its connection, and whoever holds the slot's lease uses it. (httpx's pool is linear
in its connections and does not survive cancellation: httpcore#1093.) The answer's body comes out as it came in,
without its framing; several chunks that arrived together come out together.

*Error handling.* Whatever goes wrong between us and the backend is a `BackendLost`; nothing of sockets or of the
parser gets out of this module.
"""

import select
import socket
import time

import attrs
import httptools
import trio

from trio_router.backend.address import Address

READ_BYTES = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024
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


class BackendLost(Exception):
    """Raised when the connection to a backend breaks, or carries something that is not HTTP.

    `stale` says that a kept connection was closed under us before one byte of an answer came: llama-server had
    ended an idle connection, and the request can go out again on a fresh one.
    """

    def __init__(self, message: str, *, stale: bool = False) -> None:
        super().__init__(message)
        self.stale = stale


@attrs.frozen(kw_only=True)
class AnswerHead:
    """The first part of an answer; names are lower case, hop-by-hop headers are gone."""

    status: int
    headers: Headers

    def get(self, name: bytes) -> bytes | None:
        """The first value of `name` (lower case), or None."""
        return next((value for key, value in self.headers if key == name), None)


@attrs.define(eq=False)
class _Reading:
    """What the parser has told us of the answer at hand."""

    headers: Headers = attrs.field(factory=list)
    head_bytes: int = 0
    head_done: bool = False
    body: list[bytes] = attrs.field(factory=list)
    done: bool = False
    extra: bool = False
    """Something came after the end: the connection cannot be trusted with another request."""
    parser: httptools.HttpResponseParser = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head_bytes += len(name) + len(value)
        if self.head_bytes > MAX_HEAD_BYTES:
            raise ValueError(f"headers of more than {MAX_HEAD_BYTES} bytes")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.head_done = True

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_begin(self) -> None:
        self.extra = self.done

    def on_message_complete(self) -> None:
        self.done = True


@attrs.define(eq=False)
class Connection:
    """A connection and the state of the exchange on it."""

    _stream: trio.SocketStream
    _reading: _Reading = attrs.field(factory=_Reading)
    _idle_since: float | None = None
    """When the last exchange ended, `time.monotonic`; None while one is under way."""
    _reused: bool = False
    """Whether the exchange at hand is not the first on this connection."""
    _answered: bool = False
    """Whether a byte of the answer at hand has come."""
    closed: bool = False

    @classmethod
    async def open(cls, address: Address) -> "Connection":
        """Connect. Raises BackendLost."""
        family = socket.AF_UNIX if address.path is not None else socket.AF_INET
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            await sock.connect(address.path if address.path is not None else (address.host, address.port))
            if family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            sock.close()
            raise BackendLost(f"cannot connect to {address}: {error.strerror or error}") from error
        except BaseException:
            sock.close()
            raise
        return cls(trio.SocketStream(sock))

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent: the last exchange ended well, not long ago, and nothing came since."""
        if self.closed or self._idle_since is None or time.monotonic() - self._idle_since > MAX_IDLE_SECONDS:
            return False
        return not _readable_now(self._stream.socket.fileno())

    @property
    def complete(self) -> bool:
        """Whether the whole answer has been read, and handed out."""
        return self._reading.done and not self._reading.body

    async def send(self, head: bytes, body: bytes) -> None:
        """Send one request, `head` with its empty line included. Raises BackendLost."""
        self._reused = self._idle_since is not None
        self._idle_since = None
        self._answered = False
        self._reading = _Reading()
        try:
            if len(body) <= READ_BYTES:
                await self._stream.send_all(head + body)
            else:
                await self._stream.send_all(head)
                await self._stream.send_all(body)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.close()
            raise BackendLost("the connection broke while the request was sent", stale=self._reused) from error

    async def receive_head(self) -> AnswerHead:
        """The answer's status and headers. Raises BackendLost."""
        reading = self._reading
        while not reading.head_done:
            await self._read()
        status = reading.parser.get_status_code()
        if status < 200:
            self.close()
            raise BackendLost(f"answered with status {status}")
        listed = {
            name.strip().lower() for key, value in reading.headers if key == b"connection" for name in value.split(b",")
        }
        kept = [(key, value) for key, value in reading.headers if key not in HOP_BY_HOP and key not in listed]
        return AnswerHead(status=status, headers=kept)

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

    async def _read(self) -> None:
        """Read once and parse what came."""
        try:
            data = await self._stream.receive_some(READ_BYTES)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.close()
            raise BackendLost("the connection broke", stale=self._reused and not self._answered) from error
        if not data:
            self.close()
            raise BackendLost(
                "the connection was closed "
                + ("in the middle of an answer" if self._answered else "without an answer"),
                stale=self._reused and not self._answered,
            )
        self._answered = True
        try:
            self._reading.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._reading.done:  # bytes after a complete answer: that one stands, the connection goes
                self._reading.extra = True
                return
            self.close()
            raise BackendLost(f"answered with something that is not HTTP ({error})") from error

    def finish(self) -> None:
        """The exchange is over: keep the connection for the next one if it can carry one, else close it."""
        if self.closed:
            return
        reading = self._reading
        if self.complete and not reading.extra and reading.parser.should_keep_alive():
            self._idle_since = time.monotonic()
        else:
            self.close()

    def close(self) -> None:
        """Close at once, without waiting; whoever is reading or writing gets a BackendLost."""
        if not self.closed:
            self.closed = True
            self._stream.socket.close()


def _readable_now(descriptor: int) -> bool:
    """Whether a read would not block: the peer closed, or spoke out of turn."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP | select.POLLERR)
    return bool(poll.poll(0))
