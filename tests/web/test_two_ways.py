"""The two ways in side by side: the same bytes out, the same bytes to the backend, the same care with both."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.backend.peer import answer, read_request, until
from tests.web.site import BODY, CHAT, WAYS, Client, Headers, Site, open_site, request
from tests.web.test_app import EVENTS, STREAM, Server, chunk
from trio_router.telemetry.events import Outcome

THEIRS = {"date", "x-queue-time-ms", "x-queue-position", "connection"}
"""What may differ: the time of day, that Hypercorn says when it closes, a wait, which is measured, and its place."""
KIB = 1024


async def raw_answer(site: Site, way: Headers, headers: Headers, body: bytes, target: str = CHAT):
    """Status line, headers and body of an answer, as it came."""
    async with site.client() as client:
        await client.say(request("POST", target, [*way, *headers, ("X-Request-ID", "same")], body))
        with trio.fail_after(5):
            reply = await client.hear("POST")
    return reply.status, {name: value for name, value in reply.headers.items() if name not in THEIRS}, reply.body


JSON = b"Content-Type: application/json; charset=utf-8\r\n"
ANSWERS = {
    "plain": (answer(b'{"ok":true}', headers=JSON + b"Server: llama.cpp\r\nX-Own: 1\r\nX-Own: 2\r\n"),),
    "error": (answer(b'{"error":{"code":500}}', "500 Internal Server Error", JSON),),
    "empty": (answer(b"", headers=JSON),),
    "cors": (answer(b"{}", headers=JSON + b"Access-Control-Allow-Origin: *\r\n"),),
    "hop by hop": (
        answer(
            b"{}", headers=JSON + b"Connection: X-Secret\r\nX-Secret: 1\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c\r\n"
        ),
    ),
    "chunked": (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        chunk(b'{"a":'),
        chunk(b"1}") + b"0\r\n\r\n",
    ),
    "trailers": (STREAM + chunk(EVENTS[0]) + b"0\r\nX-Late: evil\r\nContent-Length: 3\r\n\r\n",),
    "stream": (STREAM, chunk(EVENTS[0]), 0.01, chunk(EVENTS[1]) + chunk(EVENTS[2]), 0.01, b"0\r\n\r\n"),
    "large": (answer(b"x" * 300_000, headers=JSON),),
    "stream without an end": (STREAM + chunk(EVENTS[0]), 0.05, b"zz\r\n"),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_the_same_answer(sockets, name):
    async with open_site(sockets, Server(*ANSWERS[name])) as site:
        lean, quart = [await raw_answer(site, way, [], BODY) for way in WAYS.values()]
        again = await raw_answer(site, WAYS["lean"], [], BODY)
    assert lean == quart == again
    assert "x-secret" not in lean[1]
    assert "x-late" not in lean[1]


@pytest.mark.parametrize(
    ("headers", "body", "target"),
    [
        ([], b"{", CHAT),
        ([], b"[]", CHAT),
        ([], b'{"model":"nobody"}', CHAT),
        ([], b'{"model":1}', CHAT),
        ([("X-Request-Priority", "urgent")], BODY, CHAT),
        ([("Content-Encoding", "gzip")], BODY, CHAT),
        ([("Host", "evil.example")], BODY, CHAT),
        ([("Origin", "https://evil.example")], BODY, CHAT),
        ([(f"X-{number}", "y") for number in range(200)], BODY, CHAT),
        ([], b'{"model":"qwen","keep_alive":1e400}', CHAT),
        ([], b'{"model":"qwen","keep_alive":' + b"9" * 400 + b"}", CHAT),
    ],
)
async def test_the_same_refusal(sockets, headers, body, target):
    server = Server()
    async with open_site(sockets, server) as site:
        lean, quart = [await raw_answer(site, way, headers, body, target) for way in WAYS.values()]
        assert [event.outcome for event in await site.told(2)] == [Outcome.CLIENT_ERROR] * 2
    assert lean == quart
    assert server.asked == []


async def test_the_same_request(sockets):
    """Name by name and in order, but for the header that chose the way."""
    headers: Headers = [
        ("Accept", "*/*"), ("X-Own", "1"), ("User-Agent", "a b"), ("x-own", "2"), ("Authorization", "Bearer k"),
        ("X-Api-Key", "k"), ("Cookie", "c=1"), ("Keep-Alive", "5"), ("Proxy-Authorization", "x"),
        ("Accept-Encoding", "gzip"), ("Content-Type", "application/json"), ("Traceparent", "00-1"),
    ]  # fmt: skip
    server = Server()
    async with open_site(sockets, server) as site:
        for way in WAYS.values():
            await raw_answer(site, way, headers, BODY)
            await raw_answer(site, way, [("Connection", "x-own, close"), *headers], BODY, CHAT + "?a=b&c=%20")
    assert server.asked[0] == server.asked[2]
    assert server.asked[1] == server.asked[3]
    heads = [asked.partition(b"\r\n\r\n")[0].lower() for asked in server.asked]
    assert all(b"authorization" not in head and b"cookie" not in head and b"keep-alive" not in head for head in heads)
    assert b"x-own" in heads[0]
    assert b"x-own" not in heads[1]


async def test_a_byte_at_a_time(sockets, way):
    server = Server()
    async with open_site(sockets, server) as site, site.client() as client:
        for number in range(2):
            for byte in request("POST", CHAT, [*way, ("X-Number", str(number))], BODY):
                await client.say(bytes([byte]))
                await trio.lowlevel.checkpoint()
            with trio.fail_after(5):
                assert (await client.hear("POST")).status == 200
            assert server.asked[-1].endswith(b"\r\n\r\n" + BODY)


async def test_a_known_head_with_another_length(sockets):
    """A head that was seen before is known by its bytes: the body that goes with it is still its own."""
    server = Server()
    async with open_site(sockets, server) as site:
        bodies = [BODY, BODY[:-1] + b',"n":1}', BODY[:-1] + b',"text":"%s"}' % (b"x" * 5000), BODY]
        async with site.client() as first, site.client() as second:
            for client in (first, second, first):
                for body in bodies:
                    assert (await client.ask("POST", CHAT, [], body)).status == 200
                    assert server.asked[-1].endswith(b"\r\n\r\n" + body)
                    assert server.headers()["content-length"] == str(len(body))
            # the bytes around the length are known, and yet this is none
            for length in (b"-1", b"+5", b"5 5", b"0x5", b"", b"9" * 16, b"5,5"):
                async with site.client() as client:
                    asked = len(server.asked)
                    assert (await client.ask("POST", CHAT, [], BODY)).status == 200
                    head = request("POST", CHAT, [], BODY).partition(b"\r\n\r\n")[0]
                    await client.say(head.replace(b"%d" % len(BODY), length) + b"\r\n\r\n" + BODY)
                    with trio.fail_after(5):
                        assert (await client.hear("POST")).status in {400, 413}
                    assert len(server.asked) == asked + 1


async def test_a_body_that_belongs_to_the_next_request_is_not_taken(sockets, way):
    server = Server()
    async with open_site(sockets, server) as site, site.client() as client:
        other = BODY[:-1] + b',"n":2}'
        await client.say(request("POST", CHAT, way, BODY) + request("POST", CHAT, way, other))
        with trio.fail_after(5):
            assert [(await client.hear("POST")).status for _ in range(2)] == [200, 200]
        assert [asked.partition(b"\r\n\r\n")[2] for asked in server.asked] == [BODY, other]


@pytest.mark.parametrize("how", ["close", "half"])
async def test_who_leaves_is_seen_although_more_was_sent(sockets, way, how):
    """RFC 9112 section 9.3.2: what was pipelined stands before the end of the stream, and hides it."""
    async with open_site(sockets, Server(trio.Event())) as site, site.client() as client:
        await client.say(request("POST", CHAT, way, BODY) + request("POST", CHAT, way, BODY))
        await until(lambda: site.model.scheduler.active == 1)
        if how == "half":
            await client.stream.send_eof()
        else:
            await client.stream.aclose()
        await until(lambda: site.model.scheduler.idle, 0.3)


@asynccontextmanager
async def narrow(site: Site) -> AsyncIterator[Client]:
    """A client whose socket holds little."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KIB)
    ours.setblocking(False)
    site.nursery.start_soon(site.connections.serve, ours)
    async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as stream:
        yield Client(stream)


async def test_a_slow_reader_slows_its_own_stream_alone(sockets, way):
    """Not more is taken from its backend than 256 KiB and what the kernel holds; others go on."""
    sent = 0

    async def server(stream: trio.SocketStream) -> None:
        nonlocal sent
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KIB)
        while asked := await read_request(stream):
            if b"endless" not in asked:
                await stream.send_all(answer())
                continue
            await stream.send_all(STREAM)
            while True:
                await stream.send_all(chunk(b"x" * 8000))
                sent += 8000

    async with open_site(sockets, server, slots=2) as site, narrow(site) as client:
        await client.say(request("POST", CHAT, way, BODY[:-1] + b',"endless":1}'))
        await wait_all_tasks_blocked(0.05)
        assert sent < 512 * KIB
        before = sent
        assert (await site.ask("POST", CHAT, way, BODY)).status == 200
        assert sent == before
        await client.stream.receive_some(200_000)
        await until(lambda: sent > before)
        await client.stream.aclose()
