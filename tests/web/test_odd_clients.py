"""Clients that are odd, and within their rights; and those that are not, on a connection that is Hypercorn's already."""

import pytest
import trio
import trio.testing

from tests.web.site import BODY, CHAT, open_site, request
from tests.web.test_app import Server

LIVE = request("GET", "/livez")
WEBSOCKET = [
    ("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        b"hello world\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" % CHAT.encode(),
        request("GET", "/livez", WEBSOCKET),
        request("GET", "/livez", [*WEBSOCKET[:2], ("Sec-WebSocket-Version", "1")]),
    ],
    ids=lambda data: repr(data[:60]),
)
async def test_what_is_refused_later_is_refused_as_at_the_beginning(sockets, data):
    async with open_site(sockets, Server()) as site, site.client() as client:
        await client.say(LIVE + data)
        assert (await client.hear()).status == 200
        refused = await client.hear()
        assert refused.code == (400, "bad_request")
        assert refused.headers["connection"] == "close"
        assert refused.headers["request-id"] == refused.headers["x-request-id"]
        with trio.fail_after(5):
            assert await client.ended() == b""


async def test_a_websockets_early_frames_after_another_request(sockets):
    async with open_site(sockets, Server()) as site, site.client() as client:
        await client.say(LIVE + request("GET", "/livez", WEBSOCKET) + b"\x81\x85abcdhello")
        assert (await client.hear()).status == 200
        with trio.fail_after(5):
            await client.ended()
        assert (await site.ask("GET", "/livez")).status == 200


@pytest.mark.parametrize(
    ("method", "path", "same"),
    [
        ("GET", "/v1/models/", "/v1/models"),
        ("GET", "/v1/models/qwen/", "/v1/models/qwen"),
        ("GET", "/v1/models/qwen/status/", "/v1/models/qwen/status"),
        ("POST", "/v1/models/qwen/reset/", "/v1/models/qwen/reset"),
        ("GET", "http://localhost/v1/models/qwen/", "/v1/models/qwen"),
        ("GET", "/v1/models/qwen/?x=y", "/v1/models/qwen"),
        ("GET", "/livez/", "/livez"),
        ("GET", "/v1/health", "/health"),
    ],
)
async def test_a_slash_at_the_end_makes_no_difference(sockets, method, path, same):
    async with open_site(sockets, Server()) as site:
        one, other = await site.ask(method, path), await site.ask(method, same)
        assert one.status == other.status == 200
        assert len(one.body) == pytest.approx(len(other.body), abs=8)  # but for clocks


@pytest.mark.parametrize(
    "target", ["http://evil.example", "http://localhost@evil.example", "http://", "http://localhost:x"]
)
async def test_a_host_in_the_target_counts(sockets, target):
    async with open_site(sockets, Server()) as site:
        for method, path in (("GET", "/v1/models"), ("POST", CHAT)):
            reply = await site.ask(method, target + path, [], BODY if method == "POST" else b"")
            assert reply.code == (403, "host_not_allowed")
        assert (await site.ask("GET", "http://localhost:8080/v1/models", [("Host", "evil.example")])).status == 200


async def test_an_old_client_is_answered_without_chunks(sockets):
    async with open_site(sockets, Server()) as site, site.client() as client:
        head = b"POST %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(BODY))
        await client.say(head + BODY)
        said = await client.ended()
        assert said.startswith(b"HTTP/1.1 200 ")
        assert b"transfer-encoding" not in said.lower()


async def test_options_has_no_body_and_no_length(sockets):
    async with open_site(sockets, Server()) as site:
        for target in (CHAT, "*", "/v1/models"):
            reply = await site.ask("OPTIONS", target)
            assert (reply.status, reply.body) == (204, b"")
            assert "content-length" not in reply.headers
            assert "content-type" not in reply.headers
            assert reply.headers["x-request-id"]


@pytest.mark.parametrize("empty", [b"\r\n", b"\r\n\r\n"])
async def test_empty_lines_before_a_request_are_nothing(sockets, empty):
    async with open_site(sockets, Server()) as site, site.client() as client:
        for _ in range(2):  # the second head is one that is known
            await client.say(empty + request("POST", CHAT, [], BODY))
            assert (await client.hear("POST")).status == 200
            await client.say(empty)  # as after a body
            await trio.testing.wait_all_tasks_blocked()
        for byte in empty + LIVE:
            await client.say(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
        assert (await client.hear()).status == 200


async def test_a_head_that_is_too_large_later(sockets):
    async with open_site(sockets, Server()) as site, site.client() as client:
        assert (await client.ask("GET", "/livez")).status == 200
        await client.say(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Much: " + b"x" * 70_000)
        with trio.fail_after(5):
            refused = await client.hear()
            assert refused.code == (431, "bad_request")
            await client.ended()
        assert (await site.ask("GET", "/livez")).status == 200
