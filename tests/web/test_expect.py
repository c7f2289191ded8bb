"""Clients that send a body only when they are told to (RFC 9110 section 10.1.1), and what each answer says of the time."""

import time
from email.utils import parsedate_to_datetime

import pytest
import trio

from tests.web.site import BODY, CHAT, WAYS, Client, open_site, request
from tests.web.test_app import EVENTS, STREAM, Server, chunk
from trio_router.web.date import DateLine

LIVE = request("GET", "/livez")
EXPECT = ("Expect", "100-continue")


@pytest.fixture(params=["first", "later"])
def begin(request):
    """What is done on a connection before: the head is read by the data plane first, or by Hypercorn alone."""

    async def begun(client: Client) -> None:
        if request.param == "later":
            assert (await client.ask("GET", "/livez")).status == 200

    return begun


async def start_of_answer(client: Client) -> bytes:
    with trio.fail_after(5):
        data = b""
        while b"\r\n\r\n" not in data:
            data += await client.stream.receive_some(65536)
    return data


async def test_who_may_is_told_to(sockets, begin):
    server = Server()
    async with open_site(sockets, server) as site, site.client() as client:
        await begin(client)
        for _ in range(2):
            await client.say(request("POST", CHAT, [EXPECT, ("Content-Length", str(len(BODY)))]))
            assert (await start_of_answer(client)).startswith(b"HTTP/1.1 100 ")
            await client.say(BODY)
            with trio.fail_after(5):
                assert (await client.hear("POST")).status == 200
        assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("path", "headers", "limits", "status"),
    [
        (CHAT, [("Content-Length", "2000001")], {"api": {"max_body_mb": 1}}, b"413"),
        ("/v1/models/load", [("Content-Length", "100000")], {}, b"413"),
        (CHAT, [("Content-Length", "10"), ("Host", "evil.example")], {}, b"403"),
        (CHAT, [("Content-Length", "10"), ("Origin", "http://evil.example")], {}, b"403"),
        ("/nowhere", [("Content-Length", "10")], {}, b"404"),
    ],
    ids=["too large", "too large a command", "host", "origin", "path"],
)
async def test_who_is_refused_by_its_head_is_not(sockets, begin, path, headers, limits, status):
    server = Server()
    async with open_site(sockets, server, **limits) as site, site.client() as client:
        await begin(client)
        await client.say(request("POST", path, [EXPECT, *headers]))
        assert (await start_of_answer(client)).startswith(b"HTTP/1.1 " + status)
        assert server.asked == []


async def test_the_next_one_is_asked_again(sockets):
    """A refused request that sent no body leaves nothing behind for a connection that goes on."""
    async with open_site(sockets, Server(), api={"max_body_mb": 1}) as site:
        for _ in range(2):
            async with site.client() as client:
                await client.say(request("POST", CHAT, [EXPECT, ("Content-Length", "2000001")]))
                assert (await start_of_answer(client)).startswith(b"HTTP/1.1 413")
                with trio.fail_after(5):
                    await client.ended()
        await site.until_idle()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("target", "body"),
    [(CHAT, BODY), (CHAT, b"{"), (CHAT, b'{"model":"qwen","stream":true}')],
    ids=["ok", "400", "stream"],
)
async def test_every_answer_says_the_time(sockets, way, target, body):
    server = Server(STREAM, chunk(EVENTS[0]), b"0\r\n\r\n")
    async with open_site(sockets, server) as site:
        reply = await site.ask("POST", target, WAYS[way], body)
    assert abs(parsedate_to_datetime(reply.headers["date"]).timestamp() - time.time()) < 10


def test_the_time_is_written_once_a_second(monkeypatch):
    line = DateLine()
    monkeypatch.setattr(time, "time", lambda: 784_111_777.9)
    first = line()
    assert first == b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
    assert line() is first
    monkeypatch.setattr(time, "time", lambda: 784_111_778.0)
    assert line() == b"date: Sun, 06 Nov 1994 08:49:38 GMT\r\n"
