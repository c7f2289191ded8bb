"""Clients that speak HTTP badly: each hurts nobody but itself."""

import contextlib
import socket
import threading
import time

import pytest

from tests.conftest import StartRouter
from tests.harness.router import RouterProcess

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def router(start_shared_router: StartRouter) -> RouterProcess:
    router = start_shared_router(qwen=["-np", "2"])
    router.may_log_traceback = True  # Hypercorn's own, about an upgrade with early data
    return router


def everything_of(connection: socket.socket, *, seconds: float = 3.0) -> bytes:
    """What comes until the other side closes, or is silent for so long."""
    connection.settimeout(seconds)
    data = b""
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


UPGRADE = b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"


@pytest.mark.parametrize("path", [b"/", b"/health", b"/v1/chat/completions", b"/v1/models"])
def test_upgrade_with_early_data(router: RouterProcess, path: bytes) -> None:
    """pgjones/hypercorn#225: it ended the whole server."""
    with router.connect() as bystander, router.connect() as connection:
        connection.sendall(b"GET " + path + b" HTTP/1.1\r\n" + UPGRADE + b"early data" * 10)
        everything_of(connection, seconds=0.3)
        bystander.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert everything_of(bystander).startswith(b"HTTP/1.1 200")
    assert router.chat("qwen").status_code == 200
    assert router.is_running()


def test_h2c_upgrade_and_prior_knowledge(router: RouterProcess) -> None:
    for data in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n" + b"early",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    ):
        with router.connect() as connection:
            connection.sendall(data)
            everything_of(connection, seconds=0.2)
    assert router.get("/health").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /nothing HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}",
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_not_http(router: RouterProcess, data: bytes) -> None:
    with router.connect() as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        answer = everything_of(connection, seconds=0.5)
    assert not answer or answer.split()[1] in {b"400", b"431", b"505"}, answer[:200]
    assert router.get("/health").status_code == 200


def test_headers_one_byte_at_a_time_block_nobody(router: RouterProcess) -> None:
    """Twenty such clients; others are answered at once, and the slow ones in the end."""
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(router.connect()) for _ in range(20)]

        def drip() -> None:
            for byte in request[:-1]:
                for connection in slow:
                    connection.sendall(bytes([byte]))
                if stop.wait(1.0):
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            for _ in range(10):
                began = time.monotonic()
                assert router.chat("qwen").status_code == 200
                assert time.monotonic() - began < 1.5
                time.sleep(0.1)
        finally:
            stop.set()
            dripping.join()
    assert router.get("/health").status_code == 200


def begun_by_quart(connection: socket.socket) -> None:
    """From now on the connection is Quart's."""
    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(4096)


@pytest.mark.parametrize("by_quart", [False, True])
def test_a_slow_head_is_answered_once_it_is_there(router: RouterProcess, *, by_quart: bool) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with router.connect() as connection:
        if by_quart:
            begun_by_quart(connection)
        for byte in request:
            connection.sendall(bytes([byte]))
            time.sleep(0.01)
        assert everything_of(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("by_quart", [False, True])
def test_a_body_that_comes_slowly(router: RouterProcess, *, by_quart: bool) -> None:
    body = b'{"model":"qwen","messages":[]}'
    with router.connect() as connection:
        if by_quart:
            begun_by_quart(connection)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n")
        for byte in body:
            connection.sendall(bytes([byte]))
            time.sleep(0.01)
        assert everything_of(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1\r\nHost: localhost\r\nConnection: close", b"HTTP/1.0\r\nHost: localhost", b"HTTP/1.0"],
    ids=["1.1 close", "1.0", "1.0 without Host"],
)
def test_the_connection_is_closed_when_the_client_asks_for_it(router: RouterProcess, head: bytes) -> None:
    """Not only announced: a client of HTTP/1.0 waits for it."""
    with router.connect() as connection:
        connection.sendall(b"GET /health " + head + b"\r\n\r\n")
        connection.settimeout(2)
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200")


def test_expect_100_continue(router: RouterProcess) -> None:
    body = b'{"model":"qwen","messages":[]}'
    with router.connect() as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {len(body)}"
        connection.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n")
        connection.settimeout(3)
        assert connection.recv(4096).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert everything_of(connection).startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_order(router: RouterProcess) -> None:
    with router.connect() as connection:
        for path in (b"/health", b"/v1/models", b"/nowhere"):
            close = b"Connection: close\r\n" if path == b"/nowhere" else b""
            connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + close + b"\r\n")
        answer = everything_of(connection)
    assert [part.split()[0] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"404"]


@pytest.mark.parametrize("by_quart", [False, True])
def test_half_a_body_and_gone(router: RouterProcess, *, by_quart: bool) -> None:
    for _ in range(5):
        with router.connect() as connection:
            if by_quart:
                begun_by_quart(connection)
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert router.chat("qwen").status_code == 200
    status = router.status("qwen")
    assert (status["active"], status["queued"]) == (0, 0)
