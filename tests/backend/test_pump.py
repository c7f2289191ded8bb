"""Streams that are read by one task: bytes, ends, errors and cancellation are those of a read each."""

import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.backend.peer import linked, say, until
from trio_router.backend.connection import BULK_BYTES, BackendLost, Connection
from trio_router.backend.pump import AT_ONCE, Pump

REQUEST = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def begin(connection: Connection, peer: trio.SocketStream) -> None:
    await connection.send(REQUEST, b"")
    await say(peer, HEAD + b"1\r\n0\r\n")
    await connection.receive_head()
    assert await connection.receive() == b"0"


async def test_pieces_as_they_come_until_the_end():
    async with linked() as (connection, peer), trio.open_nursery() as nursery:
        await begin(connection, peer)
        pieces: list[bytes] = []
        connection.spoke = False
        nursery.start_soon(say, peer, b"3\r\none\r\n", b"3\r\nt", b"wo\r\n", b"0\r\n\r\n")

        def pass_on(piece: bytes) -> bool:
            pieces.append(piece)
            return True

        with trio.fail_after(5):
            await connection.stream(pass_on)
            assert await connection.receive() == b""
        assert pieces == [b"one", b"t", b"wo"]
        assert not connection.spoke, "signs of life are no shorter"
        connection.finish()
        assert connection.reusable


async def test_it_returns_when_a_piece_was_not_passed_on_and_loses_nothing():
    async with linked() as (connection, peer):
        await begin(connection, peer)
        await say(peer, b"3\r\none\r\n")
        pieces: list[bytes] = []
        for _ in range(2):
            with trio.fail_after(5):
                await connection.stream(lambda piece: bool(pieces.append(piece)))
            await say(peer, b"3\r\ntwo\r\n")
        assert pieces == [b"one", b"two"]
        assert await connection.receive() == b"two"


async def test_bulk_is_left_to_those_who_read_without_waiting():
    async with linked() as (connection, peer):
        await begin(connection, peer)
        size = 2 * BULK_BYTES
        await say(peer, b"%x\r\n%b\r\n" % (size, b"x" * size))
        got: list[bytes] = []

        def pass_on(piece: bytes) -> bool:
            got.append(piece)
            return True

        with trio.fail_after(5):
            while sum(map(len, got)) < size:
                await connection.stream(pass_on)
                if sum(map(len, got)) < size:
                    got.append(await connection.receive())
        assert b"".join(got) == b"x" * size


@pytest.mark.parametrize("fault", ["closed by the backend", "closed by us", "garbage", "silence"])
async def test_what_goes_wrong_is_said_by_the_next_read(fault):
    async with linked() as (connection, peer), trio.open_nursery() as nursery:
        await begin(connection, peer)
        connection.patience_seconds = 10
        nursery.start_soon(connection.stream, lambda _: True)
        await wait_all_tasks_blocked()
        if fault == "closed by the backend":
            await peer.send_eof()
        elif fault == "closed by us":
            connection.close()
        elif fault == "garbage":
            await say(peer, b"zz\r\n")
        else:
            connection.expire_silent(100)
            connection.expire_silent(111)
        with trio.fail_after(5):
            await until(lambda: connection.closed)
            await wait_all_tasks_blocked()
            with pytest.raises(BackendLost) as caught:
                await connection.receive()
        assert caught.value.silent is (fault == "silence")


async def test_cancelled_it_reads_no_more():
    async with linked() as (connection, peer):
        await begin(connection, peer)
        with trio.move_on_after(0.01) as scope:
            await connection.stream(lambda _: True)
        assert scope.cancelled_caught
        await say(peer, b"3\r\none\r\n")
        assert await connection.receive() == b"one"


async def test_an_error_in_what_is_called_is_the_callers():
    async with linked() as (connection, peer), trio.open_nursery() as nursery:
        await begin(connection, peer)
        nursery.start_soon(say, peer, b"3\r\none\r\n")

        def fails(_: bytes) -> bool:
            raise ZeroDivisionError

        with trio.fail_after(5), pytest.raises(ZeroDivisionError):
            await connection.stream(fails)
        assert not connection.awaited, "nobody waits for the backend any more"


async def test_many_take_turns_with_other_tasks():
    """One more than are served at once: the last is served, and others run in between."""
    pump, served, turns = Pump.here(), 0, 0
    pairs = [socket.socketpair() for _ in range(AT_ONCE + 1)]

    def ready() -> bool:
        nonlocal served
        served += 1
        return False

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as attending:
            for ours, theirs in pairs:
                theirs.send(b"x")
                attending.start_soon(pump.attend, ours, ready, lambda _: None)
            nursery.start_soon(other)
        nursery.cancel_scope.cancel()
    assert served == len(pairs)
    assert turns
    for pair in pairs:
        for sock in pair:
            sock.close()
