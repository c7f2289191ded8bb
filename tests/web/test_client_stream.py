"""A client's socket as Hypercorn has it: who reads when all is said."""

import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_router.web.client_stream import ClientStream
from trio_router.web.hangup import Hangups
from trio_router.web.listener import Connections


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("first", ["the reader", "the one who lingers"])
async def test_who_lingers_reads_alone(sockets: tuple[socket.socket, socket.socket], first: str) -> None:
    """Whoever reads is told of the end, and only when all was read; nothing that comes now is anybody's."""
    ours, theirs = sockets
    stream = ClientStream(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), Hangups(), b"")
    got = []

    async def read() -> None:
        got.append(await stream.receive_some())

    async with trio.open_nursery() as nursery:
        for task in (read, stream.linger) if first == "the reader" else (stream.linger, read):
            nursery.start_soon(task)
            await wait_all_tasks_blocked()
        assert theirs.recv(1) == b"", "our half is closed at once"
        for _ in range(3):
            theirs.send(b"more")
            await wait_all_tasks_blocked()
        assert got == []
        theirs.close()
        with trio.fail_after(5):
            while nursery.child_tasks:
                await trio.lowlevel.checkpoint()
    assert got == [b""]
    assert await stream.receive_some() == b"", "and so is who comes later"
    stream.abort()


async def test_a_connection_that_comes_when_nobody_watches_any_more():
    """In the tick in which the router ends: it is closed, and nothing is raised."""
    connections = Connections(app=cast(Any, None), plane=cast(Any, None))
    connections.hangups._epoll.close()
    ours, theirs = socket.socketpair()
    with theirs:
        await connections.serve(ours)
        assert theirs.recv(1) == b""
    assert not connections.open
