"""Clients that are odd, and within their rights; and those that are not, on a connection that is Hypercorn's already."""

import contextlib
import json
import tracemalloc

import pytest
import structlog.testing
import trio
import trio.testing

from tests.backend.peer import answer, until
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


@pytest.mark.parametrize("there", [0, 1, 1_000_000, 1_500_000])
async def test_what_is_only_announced_takes_no_memory(sockets, there):
    async with open_site(sockets, Server()) as site, site.client() as client:
        tracemalloc.start()
        try:
            head = request("POST", CHAT, [("Content-Length", "60000000")])
            await client.say(head + b" " * there)
            await trio.testing.wait_all_tasks_blocked()
            assert tracemalloc.get_traced_memory()[0] < 5_000_000
        finally:
            tracemalloc.stop()


async def test_many_empty_lines_before_a_request(sockets):
    async with open_site(sockets, Server()) as site:
        for head in (request("POST", CHAT, [], BODY), LIVE):
            async with site.client() as client:
                await client.say(b"\r\n" * 30_000 + head)
                assert (await client.hear()).status == 200
            async with site.client() as client:
                with contextlib.suppress(trio.BrokenResourceError):
                    await client.say(b"\r\n" * 40_000 + head)
                assert (await client.hear()).code == (400, "bad_request")
                assert await client.ended() == b""


@pytest.mark.parametrize("at", range(30, 45))
async def test_a_bare_line_feed_is_seen_wherever_a_head_was_torn(sockets, at):
    head = b"POST %b HTTP/1.1\r\nHost: a\nb" % CHAT.encode()
    async with open_site(sockets, Server()) as site, site.client() as client:
        for piece in (head[:at], head[at:]):
            await client.say(piece)
            await trio.testing.wait_all_tasks_blocked()
        assert (await client.hear()).code == (400, "bad_request")


@pytest.mark.parametrize("rest", [b"x", b"\r\n", b"GET /livez HTTP/1.1\r\n\r\n", b"\0" * 100_000])
@pytest.mark.parametrize("line", [b"HTTP/1.1\r\nConnection: close", b"HTTP/1.0"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_what_comes_behind_the_last_request_costs_no_answer(sockets, line, rest, chunked):
    """RFC 9112 section 9.6: it is not looked at."""
    server = Server(0.05, answer(b'{"ok":true}'))
    async with open_site(sockets, server) as site, site.client() as client:
        head = b"POST %s %b\r\nHost: localhost\r\nTE: trailers\r\n" % (CHAT.encode(), line)
        if chunked and b"1.0" not in line:
            body = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
        else:
            body = b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _say() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    await client.say(head + body + rest)

            with trio.fail_after(5):
                reply = await client.hear("POST")
                assert (reply.status, reply.body, reply.whole) == (200, b'{"ok":true}', True)
                assert await client.ended() == b""
        assert len(server.asked) == 1


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_empty_lines_between_any_requests(sockets, method, times):
    async with open_site(sockets, Server()) as site, site.client() as client:
        said = request("GET", "/livez") if method == "GET" else request("POST", CHAT, [("TE", "trailers")], BODY)
        await client.say((said + b"\r\n" * 3) * times + b"\r\n")
        for _ in range(times):
            with trio.fail_after(5):
                assert (await client.hear(method)).status == 200


HOSTS = [
    "a..b", ".localhost", ".", "x" * 64, "x" * 63 + ".localhost", "localhost..", "a." * 130 + "a", "localhost,evil.example",
    "\xad", "xn--\xfc", "[::1", "localhost:80:80",
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
async def test_a_host_that_is_none(sockets, way, host):
    async with open_site(sockets, Server()) as site:
        for method, path in (("GET", "/v1/models"), ("POST", CHAT)):
            reply = await site.ask(method, path, [*way, ("Host", host)], BODY if method == "POST" else b"")
            assert reply.code == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["a..b", ".localhost", "x" * 64])
async def test_any_host_that_may(sockets, way, host):
    async with open_site(sockets, Server(), api={"allowed_hosts": ["*"]}) as site:
        for method, path in (("GET", "/v1/models"), ("POST", CHAT)):
            reply = await site.ask(method, path, [*way, ("Host", host)], BODY if method == "POST" else b"")
            assert reply.status == 200


EVIL = ("Sec-Fetch-Site", "cross-site")


@pytest.mark.parametrize(
    "path", ["/props?model=qwen", "/slots?model=qwen", "/lora-adapters?model=qwen", "/upstream/qwen/"]
)
async def test_no_foreign_page_has_a_model_loaded_by_what_it_shows(sockets, path):
    async with open_site(sockets) as site:
        for said in (EVIL, ("Origin", "http://evil.example"), ("Referer", "http://evil.example/")):
            assert (await site.ask("GET", path, [said])).code == (403, "origin_not_allowed")
        assert site.model.asked == 0
        async with site.client() as client:
            await client.say(request("GET", path, [("Sec-Fetch-Site", "none")]))
            await until(lambda: site.model.asked == 1)


async def test_no_foreign_page_has_the_configuration_read(sockets):
    async with open_site(sockets, Server()) as site:
        assert (await site.ask("GET", "/models?reload", [EVIL])).code == (403, "origin_not_allowed")
        assert (await site.ask("GET", "/models", [EVIL])).status == 200


async def test_an_empty_body_for_the_default_model(sockets):
    """What is put into an object with nothing in it is not set apart by a comma."""
    bodies = [b"{}", b" { } ", b'{"keep_alive":null}', b'{ "keep_alive":"5m" }']
    for at_once in (False, True):
        server = Server()
        async with open_site(
            sockets, server, slots=2, default_model="qwen", stop_at_once=at_once, cache_affinity=True
        ) as site:
            for path in (CHAT, "/v1/completions", "/infill", "/embeddings"):
                for body in bodies:
                    await site.ask("POST", path, [], body)
                    assert isinstance(json.loads(server.asked[-1].partition(b"\r\n\r\n")[2]), dict)
        (sockets / "b.sock").unlink()


@pytest.mark.parametrize("stream", ["1", '"true"', "[]"])
async def test_a_stream_that_is_no_truth_value_is_for_llama_server_to_judge(sockets, way, stream):
    server = Server()
    body = b'{"model":"qwen","stream":%b}' % stream.encode()
    async with open_site(sockets, server, stop_at_once=True) as site:
        await site.ask("POST", CHAT, way, body)
        assert server.asked[0].endswith(b"\r\n\r\n" + body)


@pytest.mark.parametrize(
    "kind", ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "text/plain", ""]
)
async def test_a_body_is_json_whatever_it_is_called(sockets, way, kind):
    server = Server()
    async with open_site(sockets, server) as site:
        headers = [*way, ("Content-Type", kind), ("Content-Encoding", "identity")]
        assert (await site.ask("POST", CHAT, headers, BODY)).status == 200
        assert server.headers()["content-type"] == "application/json"
        assert "content-encoding" not in server.headers()


@pytest.mark.parametrize("path", [CHAT, f"/upstream/qwen{CHAT}"])
async def test_a_byte_order_mark_is_nothing(sockets, way, path):
    server = Server()
    async with open_site(sockets, server) as site:
        assert (await site.ask("POST", path, way, b"\xef\xbb\xbf" + BODY)).status == 200
        assert server.asked[0].endswith(b"\r\n\r\n" + BODY)


async def test_what_is_too_long_for_llama_server(sockets, way):
    server = Server()
    async with open_site(sockets, server) as site:
        for length in (8191, 60_000):
            assert (await site.ask("POST", f"{CHAT}?{'x' * length}", way, BODY)).code == (414, "bad_request")
            reply = await site.ask("POST", CHAT, [*way, ("X-Long", "x" * length)], BODY)
            assert reply.code == (431, "bad_request")
        assert (await site.ask("GET", f"/props?model=qwen&{'x' * 60_000}")).code == (414, "bad_request")
        assert (await site.ask("POST", CHAT, [*way, ("Cookie", "x" * 20_000)], BODY)).status == 200
        assert len(server.asked) == 1


async def test_what_is_nested_too_deep(sockets, way):
    async with open_site(sockets, Server()) as site:
        for path, deep in ((CHAT, 20_000), ("/models/load", 30_000)):
            reply = await site.ask("POST", path, way, b'{"model":"qwen","x":' + b"[" * deep + b"]" * deep + b"}")
            assert reply.code == (400, "invalid_json")
            assert "too deep" in reply.error["message"]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("said", ["nothing is at", "chunk"])
async def test_who_is_refused_in_the_middle_of_a_body_gets_to_read_why(sockets, chunked, said):
    async with open_site(sockets, Server()) as site, site.client() as client:
        framing = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", "3000000")
        path = "/nope" if said != "chunk" else CHAT
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n" if chunked else b"x" * 65536
        await client.say(request("POST", path, [("TE", "trailers"), framing]))
        if said == "chunk":
            if not chunked:
                return
            await client.say(b"no chunk\r\n")
        for _ in range(40):
            await client.say(piece)
        with trio.fail_after(5):
            reply = await client.hear("POST")
            assert reply.status == (404 if said != "chunk" else 400)
            await client.ended()


SECRET = b"Authorization: Bearer sk-secret\r\n"
H2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"


def h2_headers(block: bytes) -> bytes:
    return H2 + len(block).to_bytes(3, "big") + b"\x01\x05\0\0\0\x01" + block


def h2_literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


@pytest.mark.parametrize("before", [b"", LIVE])
@pytest.mark.parametrize(
    "data",
    [
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + SECRET.replace(b"\r\n", b"\x01\r\n") + b"\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + SECRET.replace(b": ", b" : ") + b"\r\n",
        b"GET /sk-secret\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nsk-secret\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: sk-secret!\r\n" + SECRET + b"\r\n",
        h2_headers(h2_literal(b":method", b"GET") + h2_literal(b"authorization", b"Bearer sk-secret")),
        h2_headers(h2_literal(b"X-Upper sk-secret", b"Bearer sk-secret")),
        h2_headers(b"\x82\x84\x86" + h2_literal(b"authorization", b" sk-secret ")),
        h2_headers(b"\xff\xff\xff\xffsk-secret"),
    ],
    ids=lambda data: repr(data[:50]),
)  # fmt: skip
async def test_no_key_stands_in_the_log(sockets, before, data, caplog, capfd):
    """Whatever breaks a connection, and whatever its parser says of it."""
    caplog.set_level("WARNING")  # as in telemetry.logs
    with structlog.testing.capture_logs() as logs:
        async with open_site(sockets, Server()) as site, site.client() as client:
            await client.say(before + data)
            with trio.move_on_after(0.3):
                await client.ended()
            assert (await site.ask("GET", "/livez")).status == 200
    assert "sk-secret" not in repr(logs) + caplog.text + "".join(capfd.readouterr())


async def test_a_head_that_is_too_large_later(sockets):
    async with open_site(sockets, Server()) as site, site.client() as client:
        assert (await client.ask("GET", "/livez")).status == 200
        await client.say(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Much: " + b"x" * 70_000)
        with trio.fail_after(5):
            refused = await client.hear()
            assert refused.code == (431, "bad_request")
            await client.ended()
        assert (await site.ask("GET", "/livez")).status == 200
