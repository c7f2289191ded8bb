import errno
import os
import time

import pytest
import trio
from trio.testing import MockClock

from tests.backend.peer import answer, listening, no_files_left, read_request
from trio_router.backend import client as module
from trio_router.backend.address import Address
from trio_router.backend.client import MAX_ANSWER_BYTES, NoAnswer, NoFiles, backend_client


def always(data: bytes, record: list[bytes] | None = None):
    """A server that answers every request with `data`."""

    async def script(stream: trio.SocketStream) -> None:
        while request := await read_request(stream):
            if record is not None:
                record.append(request)
            await stream.send_all(data)

    return script


@pytest.mark.parametrize(
    ("data", "healthy"),
    [
        (answer(b'{"status":"ok"}'), True),
        (answer(b"whatever"), True),
        (answer(b'{"error":{"message":"Loading model"}}', "503 Service Unavailable"), False),
    ],
)
async def test_healthy(sockets, data, healthy):
    async with listening(sockets / "a.sock", always(data)) as address, backend_client(address) as client:
        assert await client.healthy() is healthy
        assert await client.healthy() is healthy


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (answer(status="404 Not Found"), "/health answered 404"),
        (answer(status="500 Oh"), "/health answered 500"),
        (answer(status="302 Found", headers=b"Location: http://elsewhere/\r\n"), "/health answered 302"),
        (b"not HTTP at all\r\n\r\n", "/health: RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx", "/health did not answer within 5 s"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000, "/health: RemoteProtocolError"),
        (answer(b"x" * (MAX_ANSWER_BYTES + 1)), f"/health answered more than {MAX_ANSWER_BYTES} bytes"),
    ],
    ids=lambda value: repr(value[:30]),
)
async def test_no_answer(sockets, data, what, autojump_clock: MockClock):
    async with listening(sockets / "a.sock", always(data)) as address, backend_client(address) as client:
        with pytest.raises(NoAnswer) as caught:
            await client.healthy()
        assert str(caught.value).startswith(what)


async def test_a_server_that_is_silent_or_gone(sockets, autojump_clock: MockClock):
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with listening(sockets / "a.sock", silent) as address, backend_client(address) as client:
        began = trio.current_time()
        with pytest.raises(NoAnswer, match=r"^/health did not answer within 5 s|ReadTimeout"):
            await client.healthy()
        assert trio.current_time() - began == pytest.approx(5)
    for nobody in (Address(path=str(sockets / "none.sock")), Address(port=1)):
        async with backend_client(nobody) as client:
            with pytest.raises(NoAnswer, match="ConnectError"):
                await client.healthy()


async def test_a_lack_of_descriptors_while_httpx_is_imported(monkeypatch):
    def none(**options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(module.httpx, "AsyncHTTPTransport", none)
    with pytest.raises(NoFiles, match="cannot ask llama-server: Too many open files"):
        async with backend_client(Address(path="/x")):
            pass


async def test_a_lack_of_descriptors_says_nothing_of_the_server(sockets):
    async with listening(sockets / "a.sock", always(answer(b"{}"))) as address, backend_client(address) as client:
        with no_files_left(), pytest.raises(NoFiles, match="/health"):
            await client.healthy()
        assert await client.healthy()


async def test_one_byte_a_second_is_not_an_answer(sockets, autojump_clock: MockClock):
    async def drip(stream: trio.SocketStream) -> None:
        await read_request(stream)
        for byte in answer(b"x" * 100):
            await stream.send_all(bytes([byte]))
            await trio.sleep(1)

    async with listening(sockets / "a.sock", drip) as address, backend_client(address) as client:
        began = trio.current_time()
        with pytest.raises(NoAnswer, match="did not answer within 5 s"):
            await client.healthy()
        assert trio.current_time() - began == pytest.approx(5)


async def test_endless(sockets):
    async def endless(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await stream.send_all(b"x" * 65536)

    async with listening(sockets / "a.sock", endless) as address, backend_client(address) as client:
        with pytest.raises(NoAnswer, match="more than"):
            await client.props()


async def test_props_and_metrics(sockets):
    async with (
        listening(
            sockets / "a.sock", always(answer(b'{"a": 1}', headers=b"Content-Type: application/json\r\n"))
        ) as one,
        backend_client(one) as client,
    ):
        assert await client.props() == {"a": 1}
        assert await client.metrics() == '{"a": 1}'


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (answer(b"[1]"), "/props answered something that is not a JSON object"),
        (answer(b"null"), "/props answered something that is not a JSON object"),
        (answer(b"<html>"), "/props answered something that is not JSON"),
        (answer(b""), "/props answered something that is not JSON"),
        (answer(b'{"a": "\xff"}'), "/props answered something that is not JSON"),
        (answer(b"[" * 100_000), "/props answered something that is not JSON"),
        (answer(b'{"a": 1}', headers=b"Content-Encoding: gzip\r\n"), None),
        (answer(status="501 Not Implemented"), "/props answered 501"),
    ],
    ids=lambda value: repr(value)[:60],
)
async def test_props_that_are_none(sockets, data, what):
    async with listening(sockets / "a.sock", always(data)) as address, backend_client(address) as client:
        if what is None:
            assert await client.props() == {"a": 1}  # it is read as it came
            return
        with pytest.raises(NoAnswer) as caught:
            await client.props()
        assert str(caught.value) == what


async def test_metrics_that_are_none(sockets):
    async with (
        listening(sockets / "a.sock", always(answer(status="501 Not Implemented"))) as address,
        backend_client(address) as client,
    ):
        with pytest.raises(NoAnswer, match="/metrics answered 501"):
            await client.metrics()


async def test_the_key_goes_with_every_question(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    record: list[bytes] = []
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, always(answer(), record), 0)
        port = listeners[0].socket.getsockname()[1]
        async with backend_client(Address(port=port, key="k3y")) as client:
            await client.props()
            await client.healthy()
        nursery.cancel_scope.cancel()
    assert [request.split()[1] for request in record] == [b"/props", b"/health"]
    assert all(b"authorization: bearer k3y" in request.lower() for request in record)


async def test_cancelled_often_it_still_works(sockets):
    """httpcore#1093: a pool with a bound is lost for good."""

    async def slow(stream: trio.SocketStream) -> None:
        while await read_request(stream):
            await trio.sleep(0.002)
            await stream.send_all(answer())

    async with listening(sockets / "a.sock", slow) as address, backend_client(address) as client:

        async def ask(seconds: float) -> None:
            with trio.move_on_after(seconds):
                await client.healthy()

        for _ in range(5):
            async with trio.open_nursery() as nursery:
                for number in range(30):
                    nursery.start_soon(ask, number / 5000)
        assert await client.healthy()


async def test_it_is_made_quickly():
    """`verify=False`: a TLS context that is never used takes 100 ms."""
    fastest = 1.0
    for _ in range(5):
        began = time.perf_counter()
        async with backend_client(Address(port=1)):
            fastest = min(fastest, time.perf_counter() - began)
    assert fastest < 0.05
    assert module.TIMEOUT.read == 5.0
