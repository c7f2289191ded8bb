"""One connection to the router, as a client has it: what is opened here is closed here, whatever happens.

(An HTTP library's pool is no good for this: httpcore leaks the socket of a request that is cancelled while it connects,
and hides what comes when nobody asked.)
"""

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Self

import attrs
import h11
import trio

from benchmarks.chaos.questions import Violation

READ_BYTES = 64 * 1024


class Cut(Exception):
    """Raised when the connection ended before the answer did."""


@attrs.frozen
class Head:
    """How an answer begins."""

    status: int
    headers: dict[str, str]


@attrs.define(eq=False)
class Line:
    """A connection that is kept for the next request if it can be."""

    port: int
    _sock: socket.socket = attrs.field(init=False)
    _stream: trio.SocketStream | None = None
    _parser: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.CLIENT))

    @classmethod
    @asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator[Self]:
        """A line that is closed at the end."""
        line = cls(port)
        try:
            yield line
        finally:
            line.hang_up()

    def hang_up(self) -> None:
        """Close at once."""
        if self._stream is not None:
            self._stream.socket.close()
            self._stream = None

    async def ask(
        self, method: str, target: str, raw: bytes = b"", headers: Sequence[tuple[str, str]] = (), *, pieces: int = 1
    ) -> Head:
        """Send a request; its answer's head. More than one piece: a chunked body. Raises Cut, OSError, Violation."""
        lines = [("Host", "localhost"), *headers]
        lines.append(("Transfer-Encoding", "chunked") if pieces > 1 else ("Content-Length", str(len(raw))))
        stream = await self._connected()
        data = self._parser.send(h11.Request(method=method, target=target, headers=lines)) or b""
        for number in range(pieces):
            piece = raw[len(raw) * number // pieces : len(raw) * (number + 1) // pieces]
            data += self._parser.send(h11.Data(data=piece)) or b""
        data += self._parser.send(h11.EndOfMessage()) or b""
        try:
            await stream.send_all(data)
        except trio.BrokenResourceError as error:
            raise Cut("while the request was sent") from error
        while not isinstance(event := await self._event(), h11.Response):
            pass
        found = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
        return Head(event.status_code, found)

    async def piece(self) -> bytes:
        """The next bytes of the answer's body, b"" at its end. Raises Cut."""
        event = await self._event()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def rest(self) -> bytes:
        """The answer's whole body. Raises Cut."""
        whole = b""
        while piece := await self.piece():
            whole += piece
        return whole

    async def _event(self) -> h11.Event:
        assert self._stream is not None
        while True:
            try:
                event = self._parser.next_event()
                if event is h11.NEED_DATA:
                    self._parser.receive_data(await self._stream.receive_some(READ_BYTES))
                    continue
            except (h11.RemoteProtocolError, trio.BrokenResourceError) as error:
                raise Cut(str(error)) from error
            if isinstance(event, h11.ConnectionClosed):
                raise Cut("closed without an answer")
            assert isinstance(event, h11.Event)
            return event

    async def _connected(self) -> trio.SocketStream:
        if self._stream is not None and (unasked := self._unasked()) is not None:
            self.hang_up()
            if unasked:
                raise Violation(f"bytes that nobody asked for: {unasked[:200]!r}")
        if self._stream is None:
            self._parser = h11.Connection(h11.CLIENT)
            self._sock = socket.socket()
            self._sock.setblocking(False)
            stream = trio.socket.from_stdlib_socket(self._sock)
            try:
                await stream.connect(("127.0.0.1", self.port))
            except BaseException:  # cancelled, too: the socket is nobody's yet
                stream.close()
                raise
            self._stream = trio.SocketStream(stream)
        return self._stream

    def _unasked(self) -> bytes | None:
        """What came since the last answer, b"" for the connection's end; None: it can carry another request."""
        if (self._parser.our_state, self._parser.their_state) != (h11.DONE, h11.DONE):
            return b""
        if left := self._parser.trailing_data[0]:
            return left
        try:
            return self._sock.recv(READ_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            self._parser.start_next_cycle()
            return None
        except ConnectionError:
            return b""
