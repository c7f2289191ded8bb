"""What clients see, on both ways in: the data plane takes plain requests, Quart takes all others."""

import contextlib
import json
import tempfile
from pathlib import Path

import h11
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.backend.peer import answer, read_request, until
from tests.web.site import BODY, CHAT, WAYS, Client, open_site, request
from trio_router.telemetry.events import Outcome
from trio_router.web.admission import INFERENCE_PATHS
from trio_router.web.app import Connection

EVENTS = [b'data: {"n":%d}\n\n' % number for number in range(3)]
STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nServer: llama.cpp\r\n"
    b"Access-Control-Allow-Origin: *\r\nKeep-Alive: timeout=5\r\n\r\n"
)

# any header that asks for more than the plain case: the request goes to Hypercorn and Quart


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Server:
    """A llama-server that answers with what it was told, and remembers what it was asked."""

    def __init__(self, *pieces: bytes | float | trio.Event) -> None:
        self.pieces = pieces or (answer(b'{"ok":true}', headers=b"Content-Type: application/json\r\nServer: x\r\n"),)
        self.asked: list[bytes] = []
        self.cut = 0

    async def __call__(self, stream: trio.SocketStream) -> None:
        while asked := await read_request(stream):
            self.asked.append(asked)
            for piece in self.pieces:
                if isinstance(piece, bytes):
                    await stream.send_all(piece)
                else:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._watch, stream, nursery.cancel_scope)
                        if isinstance(piece, trio.Event):
                            await piece.wait()
                        else:
                            await trio.sleep(piece)
                        nursery.cancel_scope.cancel()

    async def _watch(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            gone = not await stream.receive_some(1)
        except trio.BrokenResourceError:
            gone = True
        assert gone
        self.cut += 1
        scope.cancel()

    def headers(self, number: int = -1) -> dict[str, str]:
        lines = self.asked[number].partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


# --- inference --------------------------------------------------------------------------------------


async def test_an_answer_passes_byte_for_byte(sockets, way):
    server = Server()
    async with open_site(sockets, server) as site, site.client() as client:
        for number in range(3):
            reply = await client.ask("POST", f"{CHAT}?n={number}", [*way, ("X-Own", "ü")], BODY)
            assert (reply.status, reply.body, reply.whole) == (200, b'{"ok":true}', True)
            assert reply.headers["content-length"] == "11"
            assert reply.headers["content-type"] == "application/json"
            assert int(reply.headers["x-queue-time-ms"]) < 1000
            assert "server" not in reply.headers
            assert server.asked[-1].startswith(f"POST {CHAT}?n={number} HTTP/1.1\r\n".encode())
            assert server.asked[-1].endswith(b"\r\n\r\n" + BODY)
            sent = server.headers()
            assert sent["x-own"] == "ü"
            assert sent["x-request-id"] == reply.headers["x-request-id"]
            assert not {"remote-addr", "te", "connection", "authorization"} & set(sent)
        assert [event.outcome for event in await site.told(3)] == [Outcome.OK] * 3


async def test_a_stream_passes_as_it_comes(sockets, way):
    next_one = trio.Event()
    server = Server(STREAM, chunk(EVENTS[0]), next_one, chunk(EVENTS[1]) + chunk(EVENTS[2]) + b"0\r\n\r\n")
    async with open_site(sockets, server) as site, site.client() as client:
        await client.say(request("POST", CHAT, way, BODY))
        got = b""
        with trio.fail_after(2):
            while EVENTS[0] not in got:
                got += await client.stream.receive_some(65536)
        assert EVENTS[1] not in got
        next_one.set()
        client._left = got
        reply = await client.hear("POST")
        assert (reply.status, reply.body, reply.whole) == (200, b"".join(EVENTS), True)
        assert reply.headers["content-type"] == "text/event-stream"
        assert reply.headers["cache-control"] == "no-cache"
        assert reply.headers["x-accel-buffering"] == "no"
        assert "access-control-allow-origin" not in reply.headers
        assert "keep-alive" not in reply.headers


@pytest.mark.parametrize("path", sorted(INFERENCE_PATHS))
async def test_every_path_is_served(sockets, path, way):
    async with open_site(sockets, Server()) as site:
        assert (await site.ask("POST", path, way, BODY)).status == 200
        assert (await site.told())[0].endpoint == path


@pytest.mark.parametrize("status", ["400 Bad", "401 No", "404 Not Found", "500 Oh", "503 Busy"])
async def test_the_backends_own_errors_pass_unchanged(sockets, status, way):
    body = b'{"error":{"code":1,"message":"own words"}}'
    async with open_site(sockets, Server(answer(body, status))) as site:
        reply = await site.ask("POST", CHAT, way, BODY)
        assert (reply.status, reply.body) == (int(status[:3]), body)


async def test_a_backend_that_answers_nonsense(sockets, way):
    for pieces in ((b"nonsense\r\n\r\n",), (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",)):
        async with open_site(sockets, Server(*pieces)) as site:
            reply = await site.ask("POST", CHAT, way, BODY)
            assert reply.code == (502, "bad_backend_response")
        (sockets / "b.sock").unlink()


async def test_a_backend_that_is_silent(sockets, way, autojump_clock: MockClock):
    server = Server(10_000.0)
    async with open_site(sockets, server, request_timeout_sec=7) as site:
        reply = await site.ask("POST", CHAT, way, BODY)
        assert reply.code == (504, "backend_timeout")
        assert (await site.told())[0].outcome is Outcome.TIMEOUT


async def test_a_stream_whose_backend_dies_says_so(sockets, way):
    gone = trio.Event()
    async with open_site(sockets, Server(STREAM, chunk(EVENTS[0]), gone)) as site, site.client() as client:
        await client.say(request("POST", CHAT, way, BODY))
        await wait_all_tasks_blocked()
        assert site.backend is not None
        site.backend.lose("llama-server ended by SIGKILL")
        reply = await client.hear("POST")
        assert reply.whole
        assert reply.body.startswith(EVENTS[0] + b"data: {")
        error = json.loads(reply.body.split(b"data: ")[-1])["error"]
        assert error["code"] == "backend_unavailable"
        assert "SIGKILL" in error["message"]
        assert b"[DONE]" not in reply.body
        assert (await site.told())[0].outcome is Outcome.BACKEND_ERROR


@pytest.mark.parametrize("framing", [b"Content-Length: 300000", b"Transfer-Encoding: chunked"])
async def test_another_answer_that_breaks_off_is_not_completed(sockets, way, framing):
    server = Server(
        b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n" + (chunk(b"half") if b"chunked" in framing else b"half"), 99.0
    )
    async with open_site(sockets, server) as site, site.client() as client:
        await client.say(request("POST", CHAT, way, BODY))
        await wait_all_tasks_blocked()
        assert site.backend is not None
        site.backend.lose("gone")
        reply = await client.hear("POST")
        assert (reply.status, reply.body, reply.whole) == (200, b"half", False)


# --- ids and errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target", "body", "code"),
    [
        ("POST", CHAT, b"", (400, "invalid_json")),
        ("POST", CHAT, b"hello", (400, "invalid_json")),
        ("POST", CHAT, b"[]", (400, "invalid_json")),
        ("POST", CHAT, b"[" * 100_000, (400, "invalid_json")),
        ("POST", CHAT, b'{"model":"\xff"}', (400, "invalid_json")),
        ("POST", CHAT, b"{}", (400, "missing_model")),
        ("POST", CHAT, b'{"model":null}', (400, "missing_model")),
        ("POST", CHAT, b'{"model":7}', (400, "missing_model")),
        ("POST", CHAT, b'{"model":["\\u0000"]}', (400, "missing_model")),
        ("POST", CHAT, b'{"model":"gpt-4"}', (404, "model_not_found")),
        ("POST", CHAT, b'{"model":"' + b"x" * 10_240 + b'"}', (404, "model_not_found")),
        ("POST", CHAT, b'{"model":"\\u0000\\u202e"}', (404, "model_not_found")),
        ("POST", "/v1/nothing", BODY, (404, "not_found")),
        ("POST", "/v1/chat/completions/x", BODY, (404, "not_found")),
        ("GET", "/v2", b"", (404, "not_found")),
        ("GET", "/%ff%00", b"", (404, "not_found")),
        ("GET", "/..%2f..%2fetc/passwd", b"", (404, "not_found")),
        ("GET", "/static/x", b"", (404, "not_found")),
        ("GET", "/v1/models/none", b"", (404, "model_not_found")),
        ("GET", CHAT, b"", (405, "method_not_allowed")),
        ("PUT", CHAT, BODY, (405, "method_not_allowed")),
        ("DELETE", "/v1/models", b"", (405, "method_not_allowed")),
        ("FOO", "/v1/models", b"", (405, "method_not_allowed")),
        ("POST", "/v1/models", b"", (405, "method_not_allowed")),
        ("POST", "/health", b"", (405, "method_not_allowed")),
        ("TRACE", "/health", b"", (405, "method_not_allowed")),
        ("POST", "/v1/models/load", b"[]", (400, "invalid_json")),
        ("POST", "/v1/models/eject", b"{}", (400, "missing_model")),
    ],
    ids=lambda value: repr(value)[:50],
)
async def test_errors_are_json_with_an_id(sockets, way, method, target, body, code):
    async with open_site(sockets, Server()) as site:
        reply = await site.ask(method, target, [*way, ("X-Request-ID", "my-id")], body)
        assert reply.code == code
        assert reply.headers["x-request-id"] == reply.headers["request-id"] == "my-id"
        if reply.status == 405:
            assert set(reply.headers["allow"].split(", ")) <= {"GET", "POST"}
            assert method not in reply.headers["allow"].split(", ")
        again = await site.ask(method, target, way, body)
        assert again.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("target", ["/v1/messages", "/v1/messages?beta=true", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("body", "code"), [(b"nonsense", (400, "invalid_json")), (b'{"model":"b"}', (404, "model_not_found"))]
)
async def test_errors_have_what_anthropics_clients_look_for_too(sockets, way, target, body, code):
    async with open_site(sockets, Server()) as site:
        reply = await site.ask("POST", target, [*way, ("X-Request-ID", "my-id")], body)
        assert reply.code == code
        told = json.loads(reply.body)
        assert (told["type"], told["request_id"]) == ("error", "my-id")
        assert set(told["error"]) >= {"message", "type", "param", "code"}
        other = await site.ask("POST", CHAT, way, body)
        assert set(json.loads(other.body)) == {"error"}


async def test_a_target_without_a_path_is_an_error_like_any_other(sockets):
    async with open_site(sockets, Server()) as site:
        for target in ("*", "x"):
            reply = await site.ask("GET", target)
            assert reply.code in {(404, "not_found"), (400, "invalid_request")}, target
        for target in ("?x", "http://localhost", "http://localhost?x"):
            reply = await site.ask("GET", target)
            assert (reply.status, reply.headers["location"]) == (302, "/ui/"), target


async def test_an_absolute_target_is_the_path_in_it(sockets):
    server = Server()
    async with open_site(sockets, server) as site:
        assert (await site.ask("GET", "http://localhost:8000/health")).status == 200
        assert (await site.ask("POST", f"http://localhost:8000{CHAT}?a=b", [], BODY)).status == 200
        assert server.asked[0].startswith(f"POST {CHAT}?a=b HTTP/1.1\r\n".encode())


@pytest.mark.parametrize("identity", ["a" * 129, "with space", "\xff", "a\tb"])
async def test_an_id_that_is_none_is_replaced(sockets, way, identity):
    async with open_site(sockets, Server()) as site:
        for method, target in (("POST", CHAT), ("GET", "/health")):
            reply = await site.ask(method, target, [*way, ("X-Request-ID", identity)], BODY)
            assert reply.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([("X-Request-Priority", "urgent")], (400, "invalid_priority")),
        ([("X-Request-Deadline-Ms", "1.5")], (400, "invalid_deadline")),
        ([("X-Request-Deadline-Ms", "0")], (400, "invalid_deadline")),
        ([("X-Request-Deadline-Ms", "soon")], (400, "invalid_deadline")),
        ([("X-Request-Deadline-Ms", "0" * 6000 + "1")], (400, "invalid_deadline")),
        ([("X", "a")] * 600, (431, "bad_request")),
        ([("Content-Encoding", "gzip")], (415, "unsupported_media_type")),
        ([("Host", "evil.com")], (403, "host_not_allowed")),
        ([("Host", "localhost:80@evil.com")], (403, "host_not_allowed")),
        ([("Origin", "https://evil.com")], (403, "origin_not_allowed")),
        ([("Origin", "null")], (403, "origin_not_allowed")),
    ],
    ids=str,
)
async def test_refusals_by_header(sockets, way, headers, code):
    server = Server()
    async with open_site(sockets, server) as site:
        assert (await site.ask("POST", CHAT, [*way, *headers], BODY)).code == code
        assert server.asked == []


async def test_keys(sockets, way):
    async with open_site(sockets, Server(), api={"key": "s3cret"}) as site:
        for method, target in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/nowhere"), ("GET", CHAT)):
            for headers in ([], [("Authorization", "Bearer no")], [("X-Api-Key", "no")], [("Authorization", "s3cret")]):
                reply = await site.ask(method, target, [*way, *headers], BODY)
                assert reply.code == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
        for headers in ([("Authorization", "bearer s3cret")], [("X-Api-Key", "s3cret")]):
            assert (await site.ask("POST", CHAT, [*way, *headers], BODY)).status == 200
        assert (await site.ask("GET", "/health")).status == 200


async def test_a_queue_that_is_full(sockets, way):
    async with open_site(sockets, Server(99.0), max_queue_size_per_model=0) as site, site.client() as first:
        await first.say(request("POST", CHAT, [], BODY))
        await wait_all_tasks_blocked()
        assert (await site.ask("POST", CHAT, way, BODY)).code == (503, "queue_full")


async def test_a_place_in_the_queue(sockets, way):
    server = Server(0.3, answer(b"{}"))
    async with open_site(sockets, server) as site, site.client() as first, site.client() as second:
        await first.say(request("POST", CHAT, way, BODY))
        await until(lambda: site.model.scheduler.active == 1)
        await second.say(request("POST", CHAT, [*way, ("X-Request-Deadline-Ms", "60000")], BODY))
        await until(lambda: site.model.scheduler.waiting == 1)
        third = await site.ask("POST", CHAT, [*way, ("X-Request-Priority", "low")], BODY)
        replies = [await first.hear("POST"), await second.hear("POST"), third]
        assert [reply.headers["x-queue-position"] for reply in replies] == ["0", "1", "2"]
        # a wait is estimated for who has a deadline; nothing was measured yet
        assert "x-queue-estimate-ms" not in replies[1].headers
        await site.told(3)
        assert all(0.25 < event.held_seconds < 3 for event in site.finished)
        await first.say(request("POST", CHAT, way, BODY))
        await until(lambda: site.model.scheduler.active == 1)
        last = await site.ask("POST", CHAT, [*way, ("X-Request-Deadline-Ms", "60000")], BODY)
        assert 100 < int(last.headers["x-queue-estimate-ms"]) < 3000
        await first.hear("POST")
        assert not any(b"x-request-deadline-ms" in asked.lower() for asked in server.asked)


async def test_a_deadline_that_cannot_be_met(sockets, way):
    async with open_site(sockets, Server(99.0)) as site, site.client() as first:
        site.model.scheduler.pace.add(200.0, 1, trio.current_time())
        await first.say(request("POST", CHAT, [], BODY))
        await until(lambda: site.model.scheduler.active == 1)
        began = trio.current_time()
        reply = await site.ask("POST", CHAT, [*way, ("X-Request-Deadline-Ms", "30000")], BODY)
        assert trio.current_time() - began < 5
        assert reply.code == (504, "deadline_unreachable")
        assert reply.error["type"] == "timeout_error"
        assert reply.error["queue_position"] == 1
        assert 190_000 < reply.error["estimated_wait_ms"] <= 200_000
        assert (reply.headers["retry-after"], reply.headers["x-queue-position"]) == ("120", "1")
        assert (await site.told())[0].outcome is Outcome.REJECTED


async def test_a_deadline_that_passes(sockets, way):
    async with open_site(sockets, Server(99.0)) as site, site.client() as first:
        await first.say(request("POST", CHAT, [], BODY))
        await until(lambda: site.model.scheduler.active == 1)
        reply = await site.ask("POST", CHAT, [*way, ("X-Request-Deadline-Ms", "50")], BODY)
        assert reply.code == (504, "deadline_exceeded")
        assert (await site.told())[0].outcome is Outcome.TIMEOUT
        assert site.model.scheduler.waiting == 0


async def test_a_bug_is_an_internal_error_without_a_traceback(sockets, way, monkeypatch):
    def bug(*_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr("trio_router.fleet.registry.Registry.ticket", bug)
    async with open_site(sockets, Server()) as site:
        reply = await site.ask("POST", CHAT, way, BODY)
        assert reply.code == (500, "internal_error")
        assert b"secret" not in reply.body
        assert b"Traceback" not in reply.body


async def test_draining(sockets, way):
    async with open_site(sockets, Server()) as site:
        site.registry.enter("draining")
        reply = await site.ask("POST", CHAT, way, BODY)
        assert reply.code == (503, "shutting_down")
        assert reply.headers["connection"] == "close"


# --- browsers, HEAD, OPTIONS ------------------------------------------------------------------------


async def test_a_preflight(sockets):
    api = {"cors_origins": ("https://ui.example",), "key": "k"}
    async with open_site(sockets, Server(), api=api) as site:
        asks = [("Origin", "https://ui.example"), ("Access-Control-Request-Method", "POST")]
        for target in (CHAT, "/v1/models", "/anything"):
            reply = await site.ask("OPTIONS", target, asks)
            assert (reply.status, reply.body) == (204, b"")
            assert reply.headers["access-control-allow-origin"] == "https://ui.example"
            assert "POST" in reply.headers["access-control-allow-methods"]
            allowed = reply.headers["access-control-allow-headers"].lower().split(", ")
            assert {"*", "authorization"} <= set(allowed)  # the star does not stand for that one
            assert reply.headers["vary"] == "Origin"
            assert reply.headers["x-request-id"]
        foreign = await site.ask("OPTIONS", CHAT, [("Origin", "https://evil.com")])
        assert foreign.status == 204
        assert not [name for name in foreign.headers if name.startswith("access-control")]


async def test_an_allowed_page_sees_answers_and_errors(sockets, way):
    async with open_site(sockets, Server(), api={"cors_origins": ("https://ui.example",)}) as site:
        for target, body in ((CHAT, BODY), (CHAT, b"nonsense"), ("/nowhere", b"")):
            reply = await site.ask("POST", target, [*way, ("Origin", "https://ui.example")], body)
            assert reply.headers["access-control-allow-origin"] == "https://ui.example"
            exposed = reply.headers["access-control-expose-headers"]
            assert {"X-Request-ID", "X-Queue-Position", "X-Queue-Estimate-Ms"} <= set(exposed.split(", "))
            assert reply.headers["vary"] == "Origin"
            other = await site.ask("POST", target, way, body)
            assert "access-control-allow-origin" not in other.headers
            assert other.headers["vary"] == "Origin"


async def test_head_and_options(sockets):
    async with open_site(sockets, Server()) as site, site.client() as client:
        for target in ("/health", "/v1/models", "/v1/models/qwen"):
            got = await client.ask("GET", target)
            head = await client.ask("HEAD", target)
            assert (head.status, head.body) == (200, b"")
            assert head.headers["content-length"] == got.headers["content-length"] or target == "/health"
        assert (await client.ask("HEAD", "/nowhere")).status == 404
        options = await client.ask("OPTIONS", "*")
        assert options.status == 204
        assert (await client.ask("GET", "/health")).status == 200


# --- bodies -----------------------------------------------------------------------------------------


async def test_a_body_in_chunks(sockets):
    server = Server()
    async with open_site(sockets, server) as site, site.client() as client:
        await client.say(request("POST", CHAT, [("Transfer-Encoding", "chunked")]))
        for place in range(0, len(BODY), 7):
            await client.say(chunk(BODY[place : place + 7]))
            await wait_all_tasks_blocked()
        await client.say(b"0\r\nX-Trailer: evil\r\n\r\n")
        reply = await client.hear("POST")
        assert reply.status == 200
        assert server.asked[0].endswith(b"\r\n\r\n" + BODY)
        assert "transfer-encoding" not in server.headers()
        assert "x-trailer" not in server.headers()
        assert server.headers()["content-length"] == str(len(BODY))


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit(sockets, way, chunked):
    server = Server()
    async with open_site(sockets, server, api={"max_body_mb": 1}) as site, site.client() as client:
        size = 1024 * 1024 + 1
        framing = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(size))
        await client.say(request("POST", CHAT, [*way, framing]))

        async def upload() -> None:
            try:
                for _ in range(17):
                    await client.say(chunk(b"x" * 65536) if chunked else b"x" * 65536)
                await client.say(b"0\r\n\r\n" if chunked else b"x")
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload)
            with trio.fail_after(5):
                reply = await client.hear("POST")
        assert reply.code == (413, "body_too_large")
        assert "max_body_mb" in reply.error["message"]
        assert server.asked == []


async def test_the_largest_body_that_may(sockets, way):
    server = Server()
    body = b'{"model":"qwen","x":"' + b"y" * (1024 * 1024 - 23) + b'"}'
    assert len(body) == 1024 * 1024
    async with open_site(sockets, server, api={"max_body_mb": 1}) as site, site.client() as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.say, request("POST", CHAT, way, body))
            assert (await client.hear("POST")).status == 200
        assert server.asked[0].endswith(body)


async def test_a_body_that_never_comes(sockets, way, autojump_clock: MockClock):
    async with open_site(sockets, Server()) as site, site.client() as client:
        await client.say(request("POST", CHAT, [*way, ("Content-Length", "100")], b"{"))
        began = trio.current_time()
        reply = await client.hear("POST")
        assert reply.code == (408, "request_timeout")
        assert trio.current_time() - began < 60


async def test_a_stream_has_no_length(sockets, way):
    """If its backend says one and breaks, the error event is more than that, or less."""
    begun = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 300000\r\n\r\n" + EVENTS[0]
    server = Server(begun, 0.05)

    async def serve(stream: trio.SocketStream) -> None:
        with trio.move_on_after(0.2):
            await server(stream)
        await stream.aclose()

    async with open_site(sockets, serve) as site, site.client() as client:
        for _ in range(2):
            reply = await client.ask("POST", CHAT, way, b'{"model":"qwen","stream":true}')
            assert "content-length" not in reply.headers
            assert reply.whole
            assert reply.body.startswith(EVENTS[0])
            assert reply.body.count(b"error") >= 1


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_an_answer_that_has_no_body_has_no_end_of_it(sockets, way, status):
    async with open_site(sockets, Server(b"HTTP/1.1 " + status + b"\r\n\r\n")) as site, site.client() as client:
        for _ in range(2):
            reply = await client.ask("POST", CHAT, way, BODY)
            assert (reply.status, reply.body) == (int(status[:3]), b"")
            assert "transfer-encoding" not in reply.headers
        assert (await client.ask("GET", "/livez")).status == 200


async def test_a_body_that_nobody_reads_is_not_kept(sockets, monkeypatch):
    """A stream of states goes on, whatever its client sends after it asked."""
    kept: list[int] = []
    given = Connection._kept

    def noting(self, message):
        found = given(self, message)
        kept.append(len(found["body"]))
        return found

    monkeypatch.setattr(Connection, "_kept", noting)
    async with open_site(sockets, Server()) as site, site.client() as client:
        await client.say(request("GET", "/v1/models/status/stream", [("Content-Length", "100000000")]))
        for _ in range(100):
            await client.say(b"x" * 65536)
        assert b"full_status" in await client.stream.receive_some(65536)
        await until(lambda: sum(1 for count in kept if not count) > 10)
        assert sum(kept) <= 1024 * 1024


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_comes_slowly_has_an_end(sockets, way, chunked, autojump_clock: MockClock):
    """A byte now and then is a body for ever."""
    async with open_site(sockets, Server()) as site, site.client() as client:
        framing = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", "100000")
        await client.say(request("POST", CHAT, [*way, framing]))
        began = trio.current_time()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _send() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await client.say(chunk(b" ") if chunked else b" ")
                        await trio.sleep(10)

            reply = await client.hear("POST")
            nursery.cancel_scope.cancel()
        assert reply.code == (408, "request_timeout")
        assert trio.current_time() - began < 60


async def test_headers_one_byte_a_second(sockets, autojump_clock: MockClock):
    """The connection ends after the time a head may take; it never reached a model."""
    server = Server()
    for head in (request("POST", CHAT, [], BODY), request("GET", "/health")):
        async with open_site(sockets, server) as site, site.client() as client:
            began = trio.current_time()
            for byte in head * 10:
                try:
                    await client.say(bytes([byte]))
                except trio.BrokenResourceError:
                    break
                await trio.sleep(1)
            assert trio.current_time() - began < 70
        (sockets / "b.sock").unlink()
    assert server.asked == []


async def test_a_connection_that_says_nothing_is_closed(sockets, autojump_clock: MockClock):
    async with open_site(sockets, Server()) as site, site.client() as client:
        began = trio.current_time()
        assert await client.ended() == b""
        assert trio.current_time() - began == pytest.approx(30, abs=2)
    (sockets / "b.sock").unlink()
    async with open_site(sockets, Server()) as site, site.client() as client:
        await client.ask("GET", "/health")
        began = trio.current_time()
        assert await client.ended() == b""
        assert trio.current_time() - began == pytest.approx(30, abs=2)


async def test_a_client_that_stops_reading_is_cut(sockets, way, autojump_clock: MockClock):
    """Its slot is free after the stall, and nobody waits for it at the end."""
    flood = [chunk(b"x" * 65536)] * 100
    server = Server(STREAM, *flood, b"0\r\n\r\n")
    async with open_site(sockets, server) as site, site.client() as client:
        await client.say(request("POST", CHAT, way, BODY))
        began = trio.current_time()
        await site.told(seconds=1000)
        assert 59 < trio.current_time() - began < 70
        assert (await site.told())[0].outcome is Outcome.CANCELLED
        await site.until_idle()


# --- hostile connections ----------------------------------------------------------------------------

H2C = [
    ("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABkAARAAAAAAAIAAAAA"),
]  # fmt: skip
FIRST = ["fresh", "after lean", "after quart"]
"""Whose a connection is when something odd comes."""
UPGRADE = [
    ("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]  # fmt: skip


@pytest.mark.parametrize("target", ["/", "/health", CHAT, "/v1/models"])
@pytest.mark.parametrize("early", [b"", b"early data" * 10, b"\x81\x85abcdhello"])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
async def test_an_upgrade_ends_nothing_but_itself(sockets, target, early, first, upgrade):
    """pgjones/hypercorn#225: it ended the whole server."""
    async with open_site(sockets, Server()) as site, site.client() as bystander, site.client() as client:
        await bystander.ask("GET", "/health")
        if first != "fresh":
            assert (await client.ask("POST", CHAT, WAYS[first.removeprefix("after ")], BODY)).status == 200
        await client.say(request("GET", target, UPGRADE if upgrade == "websocket" else H2C) + early)
        with trio.move_on_after(0.2):
            await client.ended()
        assert (await bystander.ask("GET", "/health")).status == 200
        assert (await site.ask("POST", CHAT, [], BODY)).status == 200


async def test_an_upgrade_is_refused(sockets):
    async with open_site(sockets, Server(), api={"key": "k"}) as site, site.client() as client:
        await client.say(request("GET", "/v1/models", UPGRADE))
        with trio.fail_after(2):
            data = await client.ended()
        assert data.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), data


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n\r\n",
        b"GET /x\x00y HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nX: a\rInjected: b\r\nContent-Length: 0\r\n\r\n" % CHAT.encode(),
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n" % CHAT.encode(),
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5, 6\r\n\r\n{}{}{}" % CHAT.encode(),
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}" % CHAT.encode(),
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length : 2\r\n\r\n{}" % CHAT.encode(),
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" % CHAT.encode(),
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" % CHAT.encode(),
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" % CHAT.encode(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    ],
    ids=lambda data: repr(data[:80]),
)
@pytest.mark.parametrize("first", FIRST)
async def test_what_is_not_http_reaches_no_backend(sockets, data, first):
    server = Server()
    async with open_site(sockets, server) as site, site.client() as bystander, site.client() as client:
        if first != "fresh":
            assert (await client.ask("POST", CHAT, WAYS[first.removeprefix("after ")], BODY)).status == 200
        asked = len(server.asked)
        await client.say(data)
        with trio.move_on_after(0.2):
            said = await client.ended()
            assert not said or said.split()[1].startswith((b"4", b"501")) or data.startswith(b"PRI"), said
        assert len(server.asked) == asked
        assert (await bystander.ask("GET", "/health")).status == 200


SIZE = str(len(BODY))


@pytest.mark.parametrize(
    "head",
    [
        "HTTP/1.1\nHost: localhost\nContent-Length: SIZE\n\n",
        "HTTP/1.1\r\nHost: localhost\nX: y\r\nContent-Length: SIZE\r\n\r\n",
        "HTTP/1.1\r\nHost: localhost\r\nX: y\r\n z\r\nContent-Length: SIZE\r\n\r\n",
        "HTTP/1.1\r\nHost: localhost\r\nContent-Length:\r\n SIZE\r\n\r\n",
        "HTTP/1.1\r\nHost: localhost\r\nContent-Length: +SIZE\r\n\r\n",
        "HTTP/1.1\r\nHost: localhost\r\nContent-Length: SIZE\r\nContent-Length: 5\r\n\r\n",
        "HTTP/1.1\r\nHost: localhost\r\nContent-Length: SIZE, 5\r\n\r\n",
        "HTTP/1.1\r\nHost: localhost\r\nContent-Length : SIZE\r\n\r\n",
        "HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: identity\r\nContent-Length: SIZE\r\n\r\n",
        "HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: SIZE\r\n\r\n",
        "HTTP/1.1\r\nHost: localhost\r\nTransfer_Encoding: x\r\nTransfer-Encoding:\x0bchunked\r\nContent-Length: SIZE\r\n\r\n",
    ],
)
@pytest.mark.parametrize("first", FIRST)
async def test_what_others_read_differently_is_refused(sockets, head, first):
    """However good the body that goes with it: two opinions on where a request ends are what smuggling is made of."""
    server = Server()
    async with open_site(sockets, server) as site, site.client() as client:
        if first != "fresh":
            assert (await client.ask("POST", CHAT, WAYS[first.removeprefix("after ")], BODY)).status == 200
        asked = len(server.asked)
        await client.say(f"POST {CHAT} {head.replace('SIZE', SIZE)}".encode() + BODY)
        with trio.fail_after(5):
            assert (await client.hear("POST")).status in {400, 501}
            await client.ended()
        assert len(server.asked) == asked


@pytest.mark.parametrize("first", FIRST)
async def test_a_length_beside_chunks_is_refused(sockets, first):
    """RFC 9112 section 6.1: it is what request smuggling begins with."""
    server = Server()
    async with open_site(sockets, server) as site, site.client() as client:
        if first != "fresh":
            assert (await client.ask("POST", CHAT, WAYS[first.removeprefix("after ")], BODY)).status == 200
        asked = len(server.asked)
        await client.say(
            request("POST", CHAT, [("Transfer-Encoding", "chunked"), ("Content-Length", "4")])
            + chunk(BODY)
            + b"0\r\n\r\n"
            + request("POST", CHAT, [], BODY)
        )
        assert (await client.hear("POST")).code == (400, "bad_request")
        with trio.fail_after(5):
            await client.ended()
        assert len(server.asked) == asked


async def test_requests_that_come_together_are_answered_in_order(sockets):
    async with open_site(sockets, Server()) as site, site.client() as client:
        await client.say(
            request("POST", CHAT, [("X-Request-ID", "1")], BODY)
            + request("POST", CHAT, [("X-Request-ID", "2"), ("TE", "trailers")], BODY)
            + request("GET", "/health", [("X-Request-ID", "3")])
            + request("POST", CHAT, [("X-Request-ID", "4")], BODY)
        )
        with trio.fail_after(5):
            replies = [await client.hear(method) for method in ("POST", "POST", "GET", "POST")]
        assert [reply.headers["x-request-id"] for reply in replies] == ["1", "2", "3", "4"]
        assert {reply.status for reply in replies} == {200}


async def test_an_old_client_without_a_host(sockets):
    async with open_site(sockets, Server()) as site, site.client() as client:
        await client.say(b"GET /health HTTP/1.0\r\n\r\n")
        with trio.fail_after(2):
            assert (await client.ended()).split()[1] == b"200"
    (sockets / "b.sock").unlink()
    async with open_site(sockets, Server()) as site, site.client() as client:
        await client.say(b"GET /health HTTP/1.0\r\nHost: evil.com\r\n\r\n")
        assert (await client.ended()).split()[1] == b"403"


@settings(max_examples=30)
@given(
    name=st.text("abcXYZ-_", min_size=1, max_size=10),
    value=st.binary(max_size=30).filter(lambda value: b"\n" not in value),
)
def test_no_header_of_a_client_can_become_two(name, value):
    """Either it is refused, or the backend sees it as the one header that it is."""

    async def main() -> None:
        server = Server()
        with tempfile.TemporaryDirectory(prefix="tr-") as folder:
            async with open_site(Path(folder), server) as site, site.client() as client:
                head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nX-{name}: ".encode() + value
                await client.say(head + b"\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)
                with trio.fail_after(5):
                    reply = await client.hear("POST")
                assert reply.status in {200, 400}
        if reply.status == 200:
            (asked,) = server.asked
            parser = h11.Connection(h11.SERVER)
            parser.receive_data(asked)
            event = parser.next_event()
            assert isinstance(event, h11.Request)
            sent = dict(event.headers)
            assert sent.pop(f"x-{name}".lower().encode()) == value.strip(b" \t")
            assert set(sent) == {b"host", b"content-type", b"x-request-id", b"content-length"}

    trio.run(main)


# --- clients that leave -----------------------------------------------------------------------------


async def leave(client: Client, how: str) -> None:
    if how == "half":
        await client.stream.send_eof()
    else:
        await client.stream.aclose()


@pytest.mark.parametrize("how", ["close", "half"])
@pytest.mark.parametrize("stage", ["queued", "loading", "headers", "streaming", "stalled body"])
async def test_a_client_that_leaves_frees_everything(sockets, way, stage, how):
    never = trio.Event()
    pieces = {
        "queued": (never,), "headers": (never,), "streaming": (STREAM, chunk(EVENTS[0]), never),
        "stalled body": (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", never),
    }  # fmt: skip
    server = None if stage == "loading" else Server(*pieces[stage])
    async with open_site(sockets, server) as site:
        async with site.client() as holder:
            if stage == "queued":
                await holder.say(request("POST", CHAT, [], BODY))
                await wait_all_tasks_blocked()
            before = site.model.scheduler.statistics()
            async with site.client() as client:
                await client.say(request("POST", CHAT, way, BODY))
                await wait_all_tasks_blocked()
                during = site.model.scheduler.statistics()
                assert (during.waiting, during.active) != (before.waiting, before.active)
                await leave(client, how)
                await until(lambda: site.model.scheduler.statistics() == before, 2)
            assert [event.outcome for event in await site.told()] == [Outcome.CANCELLED]
        await site.until_idle()
        if server is not None:
            await until(lambda: server.cut >= len(server.asked), 2)  # the generation stops, too


@pytest.mark.parametrize("pieces", range(1, 8))
async def test_a_client_that_leaves_while_its_answer_begins(sockets, way, pieces):
    """Between the handler's return and the body: whatever was borrowed for it goes back."""
    async with open_site(sockets, Server(STREAM + chunk(EVENTS[0]), 99.0)) as site:
        async with site.client() as client:
            await client.say(request("POST", CHAT, way, BODY))
            for _ in range(pieces * 3):  # some switches of tasks later, wherever the request is then
                await trio.lowlevel.checkpoint()
        await site.until_idle()


async def test_many_come_and_go(sockets, autojump_clock: MockClock):
    """Whatever the moment: every lease comes back."""
    async with open_site(sockets, Server(0.05, STREAM, chunk(EVENTS[0]), 0.05, b"0\r\n\r\n"), slots=4) as site:

        async def visit(number: int) -> None:
            await trio.sleep(number % 7 / 100)
            with trio.move_on_after(number % 31 / 100):
                await site.ask("POST", CHAT, WAYS["quart"] if number % 2 else [], BODY)

        async with trio.open_nursery() as nursery:
            for number in range(120):
                nursery.start_soon(visit, number)
        await site.until_idle(60)
        assert len(site.finished) <= 120
        assert {event.outcome for event in site.finished} <= {Outcome.OK, Outcome.CANCELLED}
        assert (await site.ask("POST", CHAT, [], BODY)).status == 200


async def test_the_end_of_the_listener_cuts_a_client_that_does_not_read(sockets, way):
    flood = [chunk(b"x" * 65536)] * 100
    async with open_site(sockets, Server(STREAM, *flood)) as site, site.client() as client:
        await client.say(request("POST", CHAT, way, BODY))
        await wait_all_tasks_blocked()
        site.connections.close_all()
        await until(lambda: not site.connections.open, 2)
        await site.until_idle()


async def test_a_kept_connection_that_the_backend_closed_is_no_error(sockets, way):
    """Case 1 of `fleet.dispatch`: llama-server ends idle connections."""
    asked = 0

    async def once(stream: trio.SocketStream) -> None:
        nonlocal asked
        await read_request(stream)
        asked += 1
        await stream.send_all(answer())

    async with open_site(sockets, once) as site, site.client() as client:
        for _ in range(5):
            assert (await client.ask("POST", CHAT, way, BODY)).status == 200
    assert asked == 5
