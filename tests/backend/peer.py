"""The other end of a connection: a scripted llama-server in the same loop, virtual time or not."""

import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import trio
from trio.testing import wait_all_tasks_blocked

from trio_router.backend.address import Address
from trio_router.backend.connection import Connection

Script = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Connection, trio.SocketStream]]:
    """A connection as `Connection.open` makes it, and its peer."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(ours)
    async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as peer:
        try:
            yield connection, peer
        finally:
            connection.close()


async def read_request(stream: trio.SocketStream) -> bytes:
    """One request with its body, b"" when the client is done."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = await stream.receive_some(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    while len(body) < length:
        piece = await stream.receive_some(65536)
        if not piece:
            break
        body += piece
    return head + b"\r\n\r\n" + body


def descriptors() -> set[str]:
    """What this process has open."""
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208  (names, of which one is gone before it can be looked at)


@contextmanager
def no_files_left(more: int = 0) -> Iterator[None]:
    """So many descriptors more may be opened, and then no other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(more + 1)]  # the lowest numbers there are
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def until(look: Callable[[], object], seconds: float = 5.0) -> None:
    """Return once `look` returns something true. For what sends no event: other processes, inner states."""
    with trio.fail_after(seconds):
        while not look():  # noqa: ASYNC110  (see above)
            await trio.sleep(seconds / 2000)


async def say(stream: trio.SocketStream, *pieces: bytes) -> None:
    """Each piece is read before the next is sent."""
    for piece in pieces:
        await stream.send_all(piece)
        await wait_all_tasks_blocked()


def answer(body: bytes = b"{}", status: str = "200 OK", headers: bytes = b"") -> bytes:
    """A whole answer."""
    return b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n%s" % (status.encode(), headers, len(body), body)


@asynccontextmanager
async def listening(path: Path, script: Script) -> AsyncIterator[Address]:
    """A server on the socket `path`; `script` speaks on each of its connections."""

    async def speak(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                await script(stream)

    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen(100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, speak, [trio.SocketListener(sock)])
        yield Address(path=str(path))
        nursery.cancel_scope.cancel()
