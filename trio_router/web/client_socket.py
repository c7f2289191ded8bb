"""A client's socket, as the data plane uses it: tried first, waited for only if it would block.

A call that succeeds at once costs one system call and no switch of tasks. Whoever finds its socket always ready
would then keep the thread to itself: after `BURST_BYTES` without a wait there is a checkpoint, so that others get
their turn.
"""

import socket
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from trio_router.web.hangup import Hangups

READ_BYTES = 64 * 1024
BURST_BYTES = 256 * 1024


class ClientLeft(Exception):
    """Raised when the client closed, broke, or stalled the connection."""


@attrs.define(eq=False)
class ClientSocket:
    """One client. `received` holds what came and was not used yet."""

    sock: socket.socket
    hangups: Hangups
    received: bytes = b""
    address: str = attrs.field(init=False)
    """The client's, without a port; empty if it has none, or is gone already."""
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    """Cancelled when the client hangs up, or takes too long."""
    known: Any = None
    """What the data plane knows of the head it had from this client last."""
    asking: bool = False
    """Whether it is the client's turn: to begin a request, or to go on with its head."""
    asking_since: float | None = None
    """Trio time at which `expire_idle` first saw that."""
    unsent: bytes = b""
    """What `say` could not send yet: goes out before anything else."""
    _burst: int = 0
    _closed: bool = False

    def __attrs_post_init__(self) -> None:
        try:
            peer = self.sock.getpeername()
        except OSError:
            peer = None
        self.address = peer[0] if isinstance(peer, tuple) else ""
        self.hangups.watch(self.sock, self.scope.cancel)

    def expire_idle(self, now: float, seconds: float) -> None:
        """Have the connection end, if at trio time `now` it has been the client's turn for more than `seconds`.

        That counts from the first time that this sees it, so that no request has to look at the clock.
        """
        if not self.asking:
            self.asking_since = None
        elif self.asking_since is None:
            self.asking_since = now
        elif now - self.asking_since >= seconds:
            self.scope.cancel()

    async def receive(self, limit: int = READ_BYTES, *, wait: bool = False) -> bytes:
        """What has come, up to `limit` bytes; b"" at the end of the stream. Raises ClientLeft.

        `wait` says that nothing can have come yet: a try would be a system call for nothing.
        """
        while True:
            if wait:
                self._burst = 0
                if self._closed:
                    raise ClientLeft("closed by us")
                try:
                    await trio.lowlevel.wait_readable(self.sock)
                except trio.ClosedResourceError as error:
                    raise ClientLeft("closed by us") from error
            try:
                data = self.sock.recv(limit)
            except BlockingIOError:
                wait = True
            except OSError as error:
                raise ClientLeft(str(error)) from error
            else:
                self._burst += len(data)
                if self._burst >= BURST_BYTES:
                    await self._pace(0)
                return data

    async def receive_into(self, view: memoryview, came: Callable[[int], None]) -> None:
        """Fill `view`, and tell `came` how much of it is there. Raises ClientLeft if the stream ends before."""
        filled = 0
        while filled < len(view):
            try:
                count = self.sock.recv_into(view[filled : filled + BURST_BYTES])
            except BlockingIOError:
                self._burst = 0
                await self._wait(trio.lowlevel.wait_readable)
                continue
            except OSError as error:
                raise ClientLeft(str(error)) from error
            if not count:
                raise ClientLeft("the stream ended in the middle of a body")
            filled += count
            came(filled)
            await self._pace(count)

    def try_send(self, data: bytes) -> bytes:
        """Send as much of `data` as goes at once; returns the rest. Raises ClientLeft."""
        try:
            count = self.sock.send(data)
        except BlockingIOError:
            return data
        except OSError as error:
            raise ClientLeft(str(error)) from error
        return data[count:]

    def say(self, data: bytes) -> None:
        """Send without waiting; nothing, if the client has yet to take what was said before. One that left is told of."""
        if not self.unsent:
            try:
                self.unsent = self.try_send(data)
            except ClientLeft:
                self.scope.cancel()

    async def send(self, data: bytes | bytearray, stall_seconds: float) -> None:
        """Send all of `data`. Raises ClientLeft, also when not one byte is taken for `stall_seconds`."""
        sent = 0
        rest: memoryview | bytes | bytearray = data
        while True:
            try:
                count = self.sock.send(rest)
            except BlockingIOError:
                self._burst = 0
                with trio.move_on_after(stall_seconds) as stall:
                    await self._wait(trio.lowlevel.wait_writable)
                if stall.cancelled_caught:
                    raise ClientLeft("the client reads nothing") from None
                continue
            except OSError as error:
                raise ClientLeft(str(error)) from error
            sent += count
            self._burst += count
            if self._burst >= BURST_BYTES:
                await self._pace(0)
            if sent == len(data):
                return
            rest = memoryview(data)[sent:]

    async def _wait(self, until: Callable[[socket.socket], Awaitable[None]]) -> None:
        if self._closed:
            raise ClientLeft("closed by us")
        try:
            await until(self.sock)
        except trio.ClosedResourceError as error:
            raise ClientLeft("closed by us") from error

    async def _pace(self, count: int) -> None:
        self._burst += count
        if self._burst >= BURST_BYTES:
            self._burst = 0
            await trio.lowlevel.checkpoint()

    def give_away(self) -> socket.socket:
        """The socket, no longer ours."""
        self.hangups.forget(self.sock)
        self._closed = True
        return self.sock

    def close(self) -> None:
        """Close at once; whoever waits on it gets ClientLeft."""
        if not self._closed:
            self._closed = True
            self.hangups.forget(self.sock)
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()
