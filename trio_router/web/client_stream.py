"""A client's socket as Hypercorn has it: bounded, watched, and read to its end where that lets an answer arrive."""

import contextlib
import socket
from typing import Final

import attrs
import trio

from trio_router.web.dataplane import LINGER_BYTES, LINGER_SECONDS, WRITE_STALL_SECONDS
from trio_router.web.hangup import Hangups

GONE_SECONDS: Final = 0.1
READ_BYTES: Final = 64 * 1024


@attrs.define(eq=False)
class ClientStream(trio.abc.HalfCloseableStream):
    """A client's socket for Hypercorn. What was read of it already comes first.

    Its sends are bounded from within: that works under Hypercorn's shield too.
    """

    stream: trio.SocketStream
    hangups: Hangups
    read_already: bytes = b""
    gone: trio.Event = attrs.field(factory=trio.Event)
    """Set when the client hung up."""
    requests: int = 0
    """How many are being answered."""
    idle_since: float | None = None
    """Trio time at which `expire_idle` first saw that there are none."""
    lingering: bool = False
    """Whether all is said, and what still comes is read for nobody."""
    _reading: bool = False
    _read_out: trio.Event = attrs.field(factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self.hangups.watch(self.stream.socket, self.gone.set)

    async def abort_when_gone(self, scope: trio.CancelScope) -> None:
        """Close, and cancel `scope`, soon after the client hung up: Hypercorn does not see it while a request is pipelined.

        Not at once: there are clients that close their half as soon as they have asked, and what they ask is answered
        in less.
        """
        await self.gone.wait()
        await trio.sleep(GONE_SECONDS)
        self.abort()
        scope.cancel()

    def expire_idle(self, now: float, seconds: float) -> None:
        """Have the connection end, if at trio time `now` no request has been answered on it for more than `seconds`.

        Whatever else came: half a head, or HTTP/2 frames of any kind. That counts from the first time that this sees it.
        """
        if self.requests:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now
        elif now - self.idle_since >= seconds:
            self.gone.set()

    @property
    def socket(self) -> trio.socket.SocketType:
        """What Hypercorn asks for its addresses."""
        return self.stream.socket

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with trio.move_on_after(WRITE_STALL_SECONDS) as stall:
            await self.stream.send_all(data)
        if stall.cancelled_caught:
            self.abort()
            raise trio.BrokenResourceError("the client reads nothing")

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self.lingering:  # somebody else reads, for nobody
            await self._read_out.wait()
            return b""
        if self.read_already:
            data, self.read_already = self.read_already[:max_bytes], self.read_already[max_bytes:] if max_bytes else b""
            return data
        return await self._read(max_bytes)

    async def _read(self, max_bytes: int | None) -> bytes | bytearray:
        self._reading = True
        try:
            received = await self.stream.receive_some(max_bytes)
            if self.lingering and received:
                await self._read_to_the_end()
                received = b""
            return received
        finally:
            self._reading = False
            if self.lingering:
                self._read_out.set()

    async def _read_to_the_end(self) -> None:
        left = LINGER_BYTES
        while left > 0 and (received := await self.stream.receive_some(READ_BYTES)):
            left -= len(received)

    async def linger(self) -> None:
        """Let the client get to our last words: the kernel resets a connection that is closed while there is more to read."""
        self.lingering = True
        with (
            trio.move_on_after(LINGER_SECONDS),
            contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError),
        ):
            await self.send_eof()
            if self._reading:
                await self._read_out.wait()
            else:
                await self._read_to_the_end()
        self._read_out.set()

    async def send_eof(self) -> None:
        # without a checkpoint: Hypercorn calls this in tasks that are cancelled, and closes only afterwards
        with contextlib.suppress(OSError):
            self.stream.socket.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        self.hangups.forget(self.stream.socket)
        await self.stream.aclose()

    def abort(self) -> None:
        """Close at once; whoever is sending or receiving is woken with ClosedResourceError."""
        self.hangups.forget(self.stream.socket)
        self.stream.socket.close()

    close = abort
