"""What is refused, in OpenAI's words, without touching a model."""

import json
from typing import Any

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import memory_bytes, reset_highest_memory
from tests.harness.record import Record
from tests.harness.router import RouterProcess, chat_body

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def router(start_shared_router: StartRouter) -> RouterProcess:
    """Nothing here may start its model: the llama-server would fail."""
    return start_shared_router(
        qwen=["--fake-exit-at-start", "1"],
        api={"max_body_mb": 1, "cors_origins": ["https://ui.example"]},
    )


@pytest.fixture(autouse=True)
def _no_model_was_touched(router: RouterProcess) -> Any:
    yield
    assert router.status("qwen")["status"] == "off"


def error_of(answer: httpx.Response, status: int, kind: str, code: str) -> dict[str, Any]:
    """The error object, checked for everything that all of them share."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert (error["type"], error["code"]) == (kind, code)
    assert isinstance(error["message"], str)
    assert len(error["message"]) < 600
    assert "Traceback" not in error["message"]
    assert (status in {429, 503}) == ("retry-after" in answer.headers)
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b'{"model": "qwen"',
        b'{"model": "qwen"} trailing',
        b"[1, 2]",
        b'"qwen"',
        b"null",
        b'{"model": "qwen", "x": NaN}',
        b'{"model": "qwen", "x": "\xff\xfe"}',
        b"{" * 100_000,
        b'{"a":' * 100_000,
        b"\x00" * 100,
        "{'model': 'qwen'}".encode("utf-16"),
    ],
    ids=lambda body: repr(body[:24]),
)
def test_not_a_json_object(router: RouterProcess, body: bytes) -> None:
    error_of(router.post("/v1/chat/completions", content=body), 400, "invalid_request_error", "invalid_json")


@pytest.mark.parametrize("model", [None, 5, 1.5, True, ["qwen"], {"model": "qwen"}])
def test_model_is_no_string(router: RouterProcess, model: Any) -> None:
    error = error_of(router.chat(model), 400, "invalid_request_error", "missing_model")
    assert error["param"] == "model"


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"Model": "qwen"}])
def test_model_is_missing_even_if_there_is_only_one(router: RouterProcess, body: dict[str, Any]) -> None:
    answer = router.post("/v1/chat/completions", body)
    error = error_of(answer, 400, "invalid_request_error", "missing_model")
    assert error["param"] == "model"


@pytest.mark.parametrize("model", ["nobody", "", "QWEN", "qwen ", "../qwen", "x" * 10_000, "ü\n\r\0"])
def test_unknown_model(router: RouterProcess, model: str) -> None:
    error = error_of(router.chat(model), 404, "not_found_error", "model_not_found")
    assert error["param"] == "model"


@pytest.mark.parametrize("priority", ["urgent", "", "1", "high,low", "höch".encode()])
def test_a_priority_that_does_not_exist(router: RouterProcess, priority: str | bytes) -> None:
    answer = router.chat("qwen", headers={"X-Request-Priority": priority})
    error_of(answer, 400, "invalid_request_error", "invalid_priority")


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v2/chat/completions", "/v1/chat/completions/x", "/v1/tokenize/x", "/%00", "/" + "x" * 4000],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_path(router: RouterProcess, method: str, path: str) -> None:
    error_of(router.request(method, path), 404, "not_found_error", "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("PUT", "/tokenize", "POST"),
        ("POST", "/v1/models", "GET"),
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/health", "GET"),
        ("BREW", "/v1/embeddings", "POST"),
    ],
)
def test_wrong_method(router: RouterProcess, method: str, path: str, allowed: str) -> None:
    answer = router.request(method, path)
    error_of(answer, 405, "invalid_request_error", "method_not_allowed")
    assert allowed in answer.headers["allow"].split(", ")


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
def test_a_compressed_body(router: RouterProcess, coding: str) -> None:
    headers = {"Content-Encoding": coding}
    answer = router.chat("qwen", headers=headers)
    error_of(answer, 415, "invalid_request_error", "unsupported_media_type")


def test_a_body_over_the_limit_is_refused_by_its_length(router: RouterProcess) -> None:
    """Before one byte of it was sent."""
    with router.connect() as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048577\r\n\r\n{")
        answer = b""
        while b"}}" not in answer and (piece := connection.recv(4096)):
            answer += piece
    assert answer.split()[1] == b"413"
    assert b"body_too_large" in answer


def test_a_body_over_the_limit_that_is_sent_whole(router: RouterProcess) -> None:
    answer = router.chat("qwen", filler="x" * 3_000_000)
    error_of(answer, 413, "invalid_request_error", "body_too_large")


def test_a_body_of_exactly_the_limit_is_read(router: RouterProcess) -> None:
    body = json.dumps(chat_body("nobody", filler="")).encode()
    body = body.replace(b'"filler": ""', b'"filler": "' + b"x" * (1024 * 1024 - len(body)) + b'"')
    assert len(body) == 1024 * 1024
    error_of(router.post("/v1/chat/completions", content=body), 404, "not_found_error", "model_not_found")


def test_a_chunked_body_over_the_limit_is_not_kept(router: RouterProcess) -> None:
    """A hundred megabytes that announce no length: Quart alone would queue them all."""
    reset_highest_memory(router.pid)
    before = memory_bytes(router.pid, "VmHWM")
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer = b""
    with router.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(1600):
                connection.sendall(piece)
            connection.sendall(b"0\r\n\r\n")
            answer = connection.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it hung up on us: as good
    assert not answer or b" 413 " in answer.split(b"\r\n")[0]
    assert memory_bytes(router.pid, "VmHWM") - before < 24 * 1024 * 1024


def test_a_chunked_body_a_little_over_the_limit_gets_its_answer(router: RouterProcess) -> None:
    answer = router.post("/v1/chat/completions", content=(b"x" * 65536 for _ in range(20)))
    error_of(answer, 413, "invalid_request_error", "body_too_large")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_a_foreign_host(router: RouterProcess, host: str) -> None:
    for answer in (router.get("/v1/models", headers={"Host": host}), router.chat("qwen", headers={"Host": host})):
        error_of(answer, 403, "permission_error", "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:99", "[::1]:8000"])
def test_a_loopback_host(router: RouterProcess, host: str) -> None:
    assert router.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://ui.example", "https://ui.example.evil"])
def test_a_foreign_origin(router: RouterProcess, origin: str) -> None:
    for path in ("/v1/chat/completions", "/v1/models/load", "/v1/models/eject", "/v1/models/qwen/reset"):
        answer = router.post(path, {"model": "qwen"}, headers={"Origin": origin})
        error_of(answer, 403, "permission_error", "origin_not_allowed")
        assert "access-control-allow-origin" not in answer.headers


def test_an_allowed_origin(router: RouterProcess) -> None:
    origin = "https://ui.example"
    answer = router.chat("nobody", headers={"Origin": origin})
    error_of(answer, 404, "not_found_error", "model_not_found")
    assert answer.headers.get_list("access-control-allow-origin") == [origin]
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
    preflight = router.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert preflight.status_code in {200, 204}
    assert preflight.headers["access-control-allow-origin"] == origin
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()


def test_our_own_origin(router: RouterProcess) -> None:
    answer = router.chat("nobody", headers={"Origin": router.url})
    error_of(answer, 404, "not_found_error", "model_not_found")


@pytest.fixture(scope="module")
def guarded(start_shared_router: StartRouter) -> RouterProcess:
    return start_shared_router(qwen=["--fake-exit-at-start", "1"], environment={"API_KEY": "open-sesame"})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic open-sesame"},
        {"Authorization": "open-sesame"},
        {"Authorization": "Bearer öpen-sesame".encode()},
        {"X-Api-Key": ""},
        {"X-Api-Key": "open-sesam"},
        {"Authorization": "Bearer " + "x" * 5000},
    ],
    ids=lambda headers: repr(headers)[:40],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/models/status", "/nowhere"])
def test_wrong_key(guarded: RouterProcess, path: str, headers: dict[str, str]) -> None:
    method = "POST" if path.endswith("completions") else "GET"
    answer = guarded.request(method, path, headers=headers)
    error_of(answer, 401, "authentication_error", "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "open-sesame" not in answer.text


@pytest.mark.parametrize("header", ["Authorization", "authorization", "X-Api-Key", "x-api-key"])
def test_right_key(guarded: RouterProcess, header: str) -> None:
    value = "open-sesame" if "api" in header.lower() else "Bearer open-sesame"
    assert guarded.get("/v1/models", headers={header: value}).status_code == 200


def test_health_needs_none(guarded: RouterProcess) -> None:
    assert guarded.get("/health").status_code == 200


def test_key_from_dotenv(start_router: StartRouter, record: Record) -> None:
    folder = record.path.parent / "router-0"
    folder.mkdir()
    (folder / ".env").write_text("# ours\nAPI_KEY=from-file\nOTHER=x\n")
    router = start_router(qwen=[])
    assert router.get("/v1/models").status_code == 401
    assert router.get("/v1/models", headers={"X-Api-Key": "from-file"}).status_code == 200
