import itertools
import os
import socket
import struct
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.backend.peer import answer, descriptors, linked, listening, no_files_left, read_request, say
from trio_router.backend import connection as module
from trio_router.backend.address import Address
from trio_router.backend.answer import HOP_BY_HOP, MAX_HEAD_BYTES, AnswerHead
from trio_router.backend.connection import BackendLost, Connection

REQUEST = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
    b"5\r\nhello\r\n1;ext=1\r\n \r\n6\r\nworld!\r\n0\r\n\r\n"
)
PLAIN = answer(b'{"a": 1}', headers=b"Content-Type: application/json\r\nKeep-Alive: timeout=5, max=100\r\n")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def receive_all(connection: Connection) -> tuple[AnswerHead, list[bytes]]:
    head = await connection.receive_head()
    body = []
    while piece := await connection.receive():
        body.append(piece)
    return head, body


async def ask(connection: Connection, body: bytes = b"") -> tuple[AnswerHead, list[bytes]]:
    await connection.send(REQUEST, body)
    return await receive_all(connection)


async def exchange(connection: Connection, peer: trio.SocketStream, *pieces: bytes) -> tuple[AnswerHead, list[bytes]]:
    await connection.send(REQUEST, b"")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(say, peer, *pieces)
        with trio.fail_after(5):
            found = await receive_all(connection)
    return found


async def lost(*pieces: bytes, close: bool = False) -> BackendLost:
    """What an answer of `pieces` ends with."""
    async with linked() as (connection, peer):
        await connection.send(REQUEST, b"")

        async def speak() -> None:
            try:
                await say(peer, *pieces)
            except trio.BrokenResourceError:
                return
            if close:
                await peer.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(speak)
            with trio.fail_after(5), pytest.raises(BackendLost) as caught:
                await receive_all(connection)
        assert connection.closed
        assert not connection.reusable
        connection.finish()
        connection.close()
        return caught.value


# --- answers that are right -------------------------------------------------------------------------


async def test_an_answer_of_known_length():
    async with linked() as (connection, peer):
        head, body = await exchange(connection, peer, PLAIN)
        assert head.status == 200
        assert head.headers == [(b"content-type", b"application/json"), (b"content-length", b"8")]
        assert head.get(b"content-type") == b"application/json"
        assert head.get(b"nothing") is None
        assert body == [b'{"a": 1}']
        assert connection.complete
        assert await connection.receive() == b""


async def test_several_chunks_in_one_read_come_out_together_without_their_framing():
    async with linked() as (connection, peer):
        head, body = await exchange(connection, peer, CHUNKED)
        assert head.headers == [(b"content-type", b"text/event-stream")]
        assert body == [b"hello world!"]


async def test_what_comes_apart_comes_out_apart():
    async with linked() as (connection, peer):
        _, body = await exchange(connection, peer, STREAM_HEAD, b"3\r\none\r\n", b"3\r\nt", b"wo\r\n", b"0\r\n\r\n")
        assert body == [b"one", b"t", b"wo"]


@pytest.mark.parametrize("whole", [PLAIN, CHUNKED], ids=["length", "chunked"])
async def test_split_in_two_at_every_byte(whole):
    expected = b'{"a": 1}' if whole is PLAIN else b"hello world!"
    for place in range(1, len(whole)):
        async with linked() as (connection, peer):
            head, body = await exchange(connection, peer, whole[:place], whole[place:])
            assert head.status == 200, place
            assert b"".join(body) == expected, place
            connection.finish()
            assert connection.reusable, place


@pytest.mark.parametrize("whole", [PLAIN, CHUNKED], ids=["length", "chunked"])
async def test_one_byte_a_read(whole):
    async with linked() as (connection, peer):
        _, body = await exchange(connection, peer, *(bytes([byte]) for byte in whole))
        assert b"".join(body) == (b'{"a": 1}' if whole is PLAIN else b"hello world!")


@settings(max_examples=40)
@given(
    chunks=st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    places=st.lists(st.integers(min_value=0, max_value=4000), max_size=6),
)
def test_any_chunks_in_any_pieces(chunks, places):
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    whole = STREAM_HEAD + framed + b"0\r\n\r\n"
    edges = [0, *sorted(place % len(whole) for place in places), len(whole)]
    pieces = [whole[begin:end] for begin, end in itertools.pairwise(edges) if begin < end]

    async def main() -> None:
        async with linked() as (connection, peer):
            _, body = await exchange(connection, peer, *pieces)
            assert b"".join(body) == b"".join(chunks)
            connection.finish()
            assert connection.reusable

    trio.run(main)


async def test_megabytes_both_ways():
    sent = os.urandom(3_000_000)
    async with linked() as (connection, peer):

        async def echo() -> None:
            got = await read_request(peer)
            await peer.send_all(answer(got.partition(b"\r\n\r\n")[2]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            await connection.send(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(sent), sent)
            _, body = await receive_all(connection)
        assert b"".join(body) == sent


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_a_status_without_a_body(status):
    async with linked() as (connection, peer):
        head, body = await exchange(connection, peer, f"HTTP/1.1 {status}\r\n\r\n".encode())
        assert (head.status, body) == (int(status[:3]), [])
        connection.finish()
        assert connection.reusable


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500, 501, 503])
async def test_any_status_is_passed_on(status):
    async with linked() as (connection, peer):
        head, body = await exchange(connection, peer, answer(b"x", f"{status} Whatever It Is"))
        assert (head.status, body) == (status, [b"x"])


# --- headers ----------------------------------------------------------------------------------------


async def test_hop_by_hop_headers_stay_here():
    sent = b"".join(name.title() + b": x\r\n" for name in sorted(HOP_BY_HOP - {b"connection", b"transfer-encoding"}))
    async with linked() as (connection, peer):
        head, _ = await exchange(connection, peer, answer(headers=sent + b"X-Kept: 1\r\nx-kept: 2\r\n"))
        assert head.headers == [(b"x-kept", b"1"), (b"x-kept", b"2"), (b"content-length", b"2")]


@pytest.mark.parametrize(
    "listing",
    [
        b"Connection: X-Secret, keep-alive, x-OTHER\r\n",
        b"connection: x-secret\r\nConnection:x-other , ,\r\n",
        b"CONNECTION: \t x-secret\t,\tx-other \r\n",
    ],
)
async def test_names_in_connection_stay_here(listing):
    async with linked() as (connection, peer):
        headers = listing + b"X-Secret: 1\r\nX-Other: 2\r\nX-Secret-Not: 3\r\n"
        head, _ = await exchange(connection, peer, answer(headers=headers))
        assert head.headers == [(b"x-secret-not", b"3"), (b"content-length", b"2")]


async def test_trailers_are_no_headers():
    whole = STREAM_HEAD + b"1\r\nx\r\n0\r\nX-Late: evil\r\nContent-Type: text/html\r\n\r\n"
    async with linked() as (connection, peer):
        head, body = await exchange(connection, peer, whole)
        assert head.headers == []
        assert body == [b"x"]
        connection.finish()
        assert connection.reusable


@pytest.mark.parametrize(
    "headers",
    [
        b"X: " + b"y" * (MAX_HEAD_BYTES + 1) + b"\r\n",
        b"".join(b"X-%d: y\r\n" % number for number in range(20_000)),
        (b"X" * MAX_HEAD_BYTES) + b": y\r\n",
    ],
    ids=["value", "many", "name"],
)
async def test_huge_headers(headers):
    error = await lost(b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: 0\r\n\r\n")
    assert "not HTTP" in str(error) or "headers" in str(error)


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 "])
async def test_a_head_without_an_end(start):
    """It is refused once it is too long, not when memory is used up."""
    async with linked() as (connection, peer):
        await connection.send(REQUEST, b"")
        sent = 0

        async def flood() -> None:
            nonlocal sent
            await peer.send_all(start)
            with suppress(trio.BrokenResourceError):
                while sent < 10_000_000:
                    await peer.send_all(b"y" * 16384)
                    sent += 16384

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            with trio.fail_after(3), pytest.raises(BackendLost):
                await connection.receive_head()
    assert sent < 1_000_000


# --- answers that are wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x00\x01\x02\x03\xff",
        b"\x16\x03\x01\x02\x00",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 xx OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        STREAM_HEAD + b"zz\r\n",
        STREAM_HEAD + b"-1\r\n",
        STREAM_HEAD + b"5\r\nhelloworld\r\n",
        STREAM_HEAD + b"ffffffffffffffffffff\r\n",
    ],
)
async def test_what_is_not_http(data):
    error = await lost(data)
    assert "not HTTP" in str(error)
    assert not error.stale


@given(st.binary(min_size=1, max_size=200))
@settings(max_examples=60)
def test_nothing_but_backend_lost_gets_out(data):
    async def main() -> None:
        async with linked() as (connection, peer):
            await connection.send(REQUEST, b"")
            await peer.send_all(data)
            await peer.aclose()
            with pytest.raises(BackendLost):
                await receive_all(connection)

    trio.run(main)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nearly data",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN,
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + CHUNKED,
    ],
)
async def test_a_status_below_200_is_refused(data):
    assert "answered with status 10" in str(await lost(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nno framing at all",
        b"HTTP/1.0 200 OK\r\n\r\nold",
        STREAM_HEAD,
        STREAM_HEAD + b"5\r\nhel",
        STREAM_HEAD + b"5\r\nhello\r\n",
        STREAM_HEAD + b"5\r\nhello\r\n0\r\n",
    ],
)
async def test_an_end_before_the_end(data):
    error = await lost(data, close=True)
    assert str(error).startswith("the connection was closed")
    assert ("without an answer" in str(error)) == (data == b"")
    assert not error.stale


async def test_what_came_before_a_chunk_broke_off_was_handed_out():
    async with linked() as (connection, peer):
        await connection.send(REQUEST, b"")
        await peer.send_all(STREAM_HEAD + b"5\r\nhello\r\n5\r\nwo")
        await connection.receive_head()
        assert await connection.receive() == b"hellowo"
        await peer.send_eof()
        with pytest.raises(BackendLost, match="in the middle of an answer"):
            await connection.receive()
        assert not connection.complete


async def test_a_reset():
    async with linked() as (connection, peer):
        del peer
        await connection.send(REQUEST, b"")
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        connection = await Connection.open(Address(port=listener.getsockname()[1]))
        other, _ = listener.accept()
        await connection.send(REQUEST, b"")
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        other.close()
        with pytest.raises(BackendLost) as caught:
            await connection.receive_head()
        assert not caught.value.stale
        assert connection.closed


async def test_nobody_reads_what_is_sent():
    async with linked() as (connection, peer):
        await peer.aclose()
        with pytest.raises(BackendLost, match="broke while the request was sent"):
            await connection.send(REQUEST, b"x" * 1_000_000)
        assert connection.closed


# --- keep-alive -------------------------------------------------------------------------------------


async def test_one_connection_carries_many():
    async with linked() as (connection, peer):
        assert not connection.reusable  # nothing was asked yet: whoever opened it uses it
        for number in range(20):
            _, body = await exchange(connection, peer, answer(b"%d" % number) if number % 2 else CHUNKED)
            assert not connection.reusable  # not before `finish`
            connection.finish()
            assert connection.reusable
            assert body == [b"%d" % number if number % 2 else b"hello world!"]
            assert await read_request(peer) == REQUEST


@pytest.mark.parametrize(
    "whole",
    [
        answer(headers=b"Connection: close\r\n"),
        answer().replace(b"HTTP/1.1", b"HTTP/1.0"),
        answer() + b"\x00",
        answer() + answer(),
        answer() + b"HTTP/1.1 408 Request Timeout\r\n",
        CHUNKED + CHUNKED,
        CHUNKED + b"junk",
    ],
)
async def test_not_reusable_after(whole):
    async with linked() as (connection, peer):
        head, body = await exchange(connection, peer, whole)
        assert head.status == 200
        assert head.headers in ([(b"content-length", b"2")], [(b"content-type", b"text/event-stream")])
        assert body in ([b"{}"], [b"hello world!"])
        connection.finish()
        assert connection.closed
        assert not connection.reusable


async def test_not_reusable_once_something_came_out_of_turn():
    async with linked() as (connection, peer):
        await exchange(connection, peer, PLAIN)
        connection.finish()
        assert connection.reusable
        await peer.send_all(answer(b"poison"))
        assert not connection.reusable


async def test_not_reusable_once_the_other_side_closed():
    async with linked() as (connection, peer):
        await exchange(connection, peer, PLAIN)
        connection.finish()
        await peer.aclose()
        assert not connection.reusable
        assert not connection.closed


async def test_not_reusable_when_it_was_idle_too_long(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    async with linked() as (connection, peer):
        await exchange(connection, peer, PLAIN)
        connection.finish()
        now += 3.9
        assert connection.reusable
        now += 0.2
        assert not connection.reusable


async def test_an_answer_that_was_not_read_to_its_end_ends_the_connection():
    async with linked() as (connection, peer):
        await connection.send(REQUEST, b"")
        await peer.send_all(STREAM_HEAD + b"5\r\nhello\r\n")
        await connection.receive_head()
        connection.finish()
        assert connection.closed
        assert await read_request(peer) == REQUEST
        assert await peer.receive_some(10) == b""


async def test_an_answer_that_came_whole_but_was_not_handed_out_ends_it_too():
    async with linked() as (connection, peer):
        await connection.send(REQUEST, b"")
        await peer.send_all(PLAIN)
        await connection.receive_head()
        assert not connection.complete
        connection.finish()
        assert connection.closed


@pytest.mark.parametrize("reset", [False, True])
async def test_a_kept_connection_that_was_closed_under_us_is_stale(reset):
    async with linked() as (connection, peer):
        await exchange(connection, peer, PLAIN)
        connection.finish()
        assert connection.reusable
        if not reset:  # closed with our first request unread is a reset
            await read_request(peer)
        await connection.send(REQUEST, b"")  # crosses the peer's close
        if not reset:
            await read_request(peer)
        await peer.aclose()
        with pytest.raises(BackendLost) as caught:
            await connection.receive_head()
        assert caught.value.stale


async def test_closed_before_the_second_request_is_sent_is_stale():
    async with linked() as (connection, peer):
        await exchange(connection, peer, PLAIN)
        connection.finish()
        await peer.aclose()
        with pytest.raises(BackendLost) as caught:
            await ask(connection)
        assert caught.value.stale


async def test_not_stale_once_a_byte_of_the_second_answer_came():
    async with linked() as (connection, peer):
        await exchange(connection, peer, PLAIN)
        connection.finish()
        await read_request(peer)
        await connection.send(REQUEST, b"")
        await read_request(peer)
        await peer.send_all(b"H")
        await peer.aclose()
        with pytest.raises(BackendLost) as caught:
            await connection.receive_head()
        assert not caught.value.stale


# --- closing and cancelling -------------------------------------------------------------------------


async def test_close_while_someone_reads():
    async with linked() as (connection, peer):
        await connection.send(REQUEST, b"")
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(BackendLost):
                    await connection.receive_head()

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            connection.close()
        del peer
        with pytest.raises(BackendLost):
            await connection.receive()
        with pytest.raises(BackendLost):
            await connection.send(REQUEST, b"")


async def test_close_while_someone_sends():
    async with linked() as (connection, _), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(BackendLost, match="broke while the request was sent"):
                await connection.send(REQUEST, b"x" * 10_000_000)

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        connection.close()
        connection.close()


@pytest.mark.parametrize("stage", ["sending", "head", "body"])
async def test_cancelled_at_each_stage(stage):
    async with linked() as (connection, peer):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def use() -> None:
                    await connection.send(REQUEST, b"x" * (10_000_000 if stage == "sending" else 10))
                    await receive_all(connection)

                nursery.start_soon(use)
                if stage == "body":
                    await peer.send_all(STREAM_HEAD + b"5\r\nhello\r\n")
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        connection.finish()
        assert connection.closed


async def test_a_backend_that_never_stops_lets_others_run():
    async with linked() as (connection, peer):
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async def flood() -> None:
            await peer.send_all(STREAM_HEAD)
            for _ in range(200):
                await peer.send_all(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await peer.send_all(b"0\r\n\r\n")

        await connection.send(REQUEST, b"")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            nursery.start_soon(other)
            _, body = await receive_all(connection)
            nursery.cancel_scope.cancel()
        assert sum(map(len, body)) == 200 * 65536
        assert turns > 20


# --- silence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sending", "head", "body"])
async def test_a_silence_that_is_too_long_is_noticed(stage, autojump_clock: MockClock):
    async with linked() as (connection, peer):
        connection.patience_seconds = 10

        async def use() -> None:
            with pytest.raises(BackendLost, match="silent for 10 s") as caught:
                await ask(connection, b"x" * (10_000_000 if stage == "sending" else 10))
            assert caught.value.silent
            assert not caught.value.stale

        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            if stage == "body":
                await peer.send_all(STREAM_HEAD + b"5\r\nhello\r\n")
            await wait_all_tasks_blocked()
            seen = trio.current_time() + 1000  # a silence counts from the first time that it is seen
            connection.expire_silent(seen)
            connection.expire_silent(seen + 9.9)
            assert not connection.closed
            connection.expire_silent(seen + 10.1)
            assert connection.closed


async def test_each_byte_ends_a_silence_and_an_idle_connection_has_none(autojump_clock: MockClock):
    async with linked() as (connection, peer):
        connection.patience_seconds = 10
        connection.expire_silent(trio.current_time() + 1000)  # nothing was asked

        async def drip() -> None:
            for byte in PLAIN:
                await trio.sleep(9)
                await peer.send_all(bytes([byte]))

        async def look() -> None:
            while True:
                await trio.sleep(1)
                connection.expire_silent(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await connection.send(REQUEST, b"")
            nursery.start_soon(drip)
            _, body = await receive_all(connection)
            assert body == [bytes([byte]) for byte in b'{"a": 1}']
            connection.finish()
            await trio.sleep(100)
            assert not connection.closed
            nursery.cancel_scope.cancel()


# --- connecting -------------------------------------------------------------------------------------


async def test_open_over_unix_and_tcp(sockets):
    async def script(stream: trio.SocketStream) -> None:
        while await read_request(stream):
            await stream.send_all(PLAIN)

    async with listening(sockets / "a.sock", script) as address:
        connection = await Connection.open(address)
        await connection.send(REQUEST, b"")
        assert (await receive_all(connection))[1] == [b'{"a": 1}']
        connection.close()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, script, 0)
        connection = await Connection.open(Address(port=listeners[0].socket.getsockname()[1]))
        await connection.send(REQUEST, b"")
        assert (await receive_all(connection))[1] == [b'{"a": 1}']
        connection.close()
        nursery.cancel_scope.cancel()


async def test_nobody_listens(sockets):
    before = descriptors()
    with pytest.raises(BackendLost, match=r"cannot connect to .*gone.sock: No such file"):
        await Connection.open(Address(path=str(sockets / "gone.sock")))
    (sockets / "file.sock").touch()
    with no_files_left(), pytest.raises(BackendLost, match=r"cannot connect to .*: Too many open files") as caught:
        await Connection.open(Address(path=str(sockets / "gone.sock")))
    assert caught.value.unsent
    with pytest.raises(BackendLost, match="Connection refused"):
        await Connection.open(Address(path=str(sockets / "file.sock")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(BackendLost, match=f"cannot connect to 127.0.0.1:{port}: Connection refused"):
            await Connection.open(Address(port=port))
    assert descriptors() == before


async def test_cancelled_while_the_backlog_is_full(sockets):
    path = str(sockets / "full.sock")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as other:
        server.bind(path)
        server.listen(0)
        other.connect(path)  # the backlog of 0 has room for one
        before = descriptors()
        with trio.move_on_after(0.05) as scope:
            await Connection.open(Address(path=path))
        assert scope.cancelled_caught
        assert descriptors() == before
        async with trio.open_nursery() as nursery:

            async def make_room() -> None:
                await trio.sleep(0.03)
                server.accept()[0].close()

            nursery.start_soon(make_room)
            began = time.monotonic()
            connection = await Connection.open(Address(path=path))
            assert time.monotonic() - began < 1
            connection.close()


async def test_what_a_dead_backend_had_said_is_salvaged():
    """Its exit is noticed before its last words are read: they are handed out, and then it is lost."""
    async with linked() as (connection, peer):
        await connection.send(REQUEST, b"")
        await say(peer, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await connection.receive_head()
        assert await connection.receive() == b"a"
        await peer.send_all(b"1\r\nb\r\n1\r\nc\r\n")
        connection.salvage()
        assert await connection.receive() == b"bc"
        with pytest.raises(BackendLost):
            await connection.receive()


async def test_an_answer_before_the_body_was_read():
    """It is taken, although the rest of the request is nobody's."""
    async with linked() as (connection, peer), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _answer_early() -> None:
            await peer.receive_some(10)
            await peer.send_all(answer(b"too large", status="413 Payload Too Large"))
            await peer.aclose()

        await connection.send(REQUEST, b"x" * 4_000_000)
        assert (await connection.receive_head()).status == 413
        assert await connection.receive() == b"too large"
        assert connection.complete
        connection.finish()
        assert not connection.reusable


@pytest.mark.parametrize(
    ("sent", "body", "whole"), [(answer(b"all"), b"all", True), (STREAM_HEAD + b"1\r\na\r\n", b"a", False)]
)
async def test_who_waits_for_a_dead_backend_gets_its_last_words(sent, body, whole):
    async with linked() as (connection, peer), trio.open_nursery() as nursery:
        await connection.send(REQUEST, b"")
        said = []

        async def read():
            said.append((await connection.receive_head()).status)
            said.append(await connection.receive())
            try:
                said.append(await connection.receive())
            except BackendLost:
                said.append(None)

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        os.write(peer.socket.fileno(), sent)  # and in the same breath
        connection.salvage()
    assert said == [200, body, b"" if whole else None]
