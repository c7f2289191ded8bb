"""Every inference path: what the client gets is what llama-server said, and what llama-server gets is what it sent."""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.fake import Fake
from tests.harness.record import Record
from tests.harness.router import RouterProcess, chat_body

pytestmark = pytest.mark.process

MESSAGES = [{"role": "user", "content": "Grüße 🙂"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hi"},
    "/completions": {"prompt": "Hi"},
    "/completion": {"prompt": "Hi", "n_predict": 3},
    "/infill": {"input_prefix": "a", "input_suffix": "b"},
    "/v1/responses": {"input": "Hi"},
    "/responses": {"input": "Hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/embeddings": {"input": "a"},
    "/embedding": {"content": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b", "c"]},
    "/v1/reranking": {"query": "a", "documents": ["b", "c"]},
    "/rerank": {"query": "a", "documents": ["b", "c"]},
    "/reranking": {"query": "a", "documents": ["b", "c"]},
    "/tokenize": {"content": "Hi"},
    "/detokenize": {"tokens": [72, 105]},
    "/apply-template": {"messages": MESSAGES},
}
STREAMS = [path for path in BODIES if re.search(r"completion|infill|responses|messages$", path)]


@pytest.fixture(scope="module")
def routers(start_shared_router: StartRouter) -> dict[bool, RouterProcess]:
    """Whether it has llama-server stop at once, and one that does or does not."""
    models = {"org/qwen": ["-np", "4", "--embedding"], "other": ["--embedding"]}
    # a request to a model with several slots names its slot, unless that is not wanted
    return {
        at_once: start_shared_router(models=models, system={"cache_affinity": False, "stop_at_once": at_once})
        for at_once in (True, False)
    }


@pytest.fixture(scope="module")
def router(routers: dict[bool, RouterProcess]) -> RouterProcess:
    return routers[True]


@pytest.fixture(scope="module", params=["plane", "quart", "plane, as it came", "quart, as it came"])
def either_way(routers: dict[bool, RouterProcess], request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A connection whose requests are answered by the data plane, and one that was given to Quart."""
    with routers["as it came" not in request.param].client() as client:
        if "quart" in request.param:
            client.get("/v1/models")
        yield client


@pytest.mark.parametrize("path", BODIES)
def test_whole_answers_are_the_backends_bytes(either_way: httpx.Client, direct: Fake, path: str) -> None:
    body = json.dumps({"model": "org/qwen", **BODIES[path]}, ensure_ascii=False, indent=1).encode()
    answer = either_way.post(path, content=body, headers={"Content-Type": "application/json"})
    with direct.client() as client:
        expected = client.post(path, content=body)
    assert (answer.status_code, answer.content) == (200, expected.content)
    assert answer.headers["content-type"] == expected.headers["content-type"]


@pytest.mark.parametrize("path", STREAMS)
def test_streams_are_the_backends_bytes(either_way: httpx.Client, direct: Fake, path: str) -> None:
    body = json.dumps({"model": "org/qwen", **BODIES[path], "stream": True, "fake": {"tokens": 40}}).encode()
    answer = either_way.post(path, content=body, headers={"Content-Type": "application/json"})
    with direct.client() as client:
        expected = client.post(path, content=body)
    assert answer.content == expected.content
    assert b"data: " in answer.content
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers.get_list("cache-control") == ["no-cache"]
    assert answer.headers.get_list("x-accel-buffering") == ["no"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path", ["/v1/audio/transcriptions", "/audio/transcriptions", "/upstream/org/qwen/v1/audio/transcriptions"]
)
def test_a_form_is_the_clients_bytes(either_way: httpx.Client, direct: Fake, path: str, stream: bool) -> None:
    sound = bytes(range(256)) * 5000 + b"\r\n--"
    fields = {"model": "org/qwen", "language": "Grüße", "stream": str(stream).lower()}
    form = {"data": fields, "files": {"file": ("a.wav", sound, "audio/wav")}}
    answer = either_way.post(path, **form)
    with direct.client() as client:
        expected = client.post("/v1/audio/transcriptions", **form)
    assert (answer.status_code, answer.content) == (200, expected.content)
    assert answer.headers["content-type"] == expected.headers["content-type"]
    assert f"{len(sound)} bytes of Grüße" in answer.text
    assert ("delta" in answer.text) == stream


def test_a_large_body_and_a_large_answer(either_way: httpx.Client, direct: Fake) -> None:
    text = "x" * 6_000_000
    body = json.dumps(chat_body("org/qwen", filler=text, fake={"tokens": 4, "chunk_bytes": 1_000_000})).encode()
    answer = either_way.post("/v1/chat/completions", content=body)
    with direct.client() as client:
        assert client.post("/v1/chat/completions", content=body).content == answer.content
    assert len(answer.content) > 4_000_000


def test_a_chunked_request_body(either_way: httpx.Client, direct: Fake) -> None:
    body = json.dumps(chat_body("org/qwen")).encode()
    answer = either_way.post("/v1/chat/completions", content=(body[at : at + 7] for at in range(0, len(body), 7)))
    with direct.client() as client:
        assert client.post("/v1/chat/completions", content=body).content == answer.content


def test_model_may_stand_anywhere_in_the_body(router: RouterProcess) -> None:
    body = '{"messages":[{"role":"user","content":"\\"model\\":\\"x\\""}],"a":{"model":"no"},"model":"org\\/qwen"}'
    assert router.post("/v1/chat/completions", content=body.encode()).status_code == 200


def test_the_backend_gets_what_was_sent(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=record.flags, environment={"API_KEY": "sesame"}, system={"stop_at_once": False})
    body = b' {"model" : "qwen",\n "messages":[], "odd": 1.0e3, "odd": "\\u00fc" } '
    headers = {
        "Content-Type": "application/json",
        "Authorization": "Bearer sesame",
        "X-Api-Key": "sesame",
        "X-Request-Priority": "high",
        "X-Custom": "kept",
        "Connection": "keep-alive, x-hop",
        "X-Hop": "dropped",
        "X-Request-ID": "id-1",
    }
    answer = router.post("/v1/chat/completions?a=%20b&a=c", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    (line,) = record.wait_for("received")
    assert line["path"] == "/v1/chat/completions?a=%20b&a=c"
    assert (line["sha256"], line["length"]) == (hashlib.sha256(body).hexdigest(), len(body))
    sent = {name.lower(): value for name, value in line["headers"]}
    assert len(sent) == len(line["headers"]), "a header twice"
    assert sent["x-custom"] == "kept"
    assert sent["content-type"] == "application/json"
    assert "sesame" not in json.dumps(line["headers"])
    assert not {"x-hop", "x-api-key", "remote-addr", "transfer-encoding"} & set(sent)


def test_headers_of_an_answer(either_way: httpx.Client) -> None:
    headers = {"X-Request-ID": "mine-42", "X-Request-Priority": "LOW"}
    answer = either_way.post("/v1/chat/completions", json=chat_body("org/qwen"), headers=headers)
    assert answer.headers["x-request-id"] == "mine-42"
    assert float(answer.headers["x-queue-time-ms"]) >= 0
    names = [name.lower() for name, _ in answer.headers.multi_items()]
    assert len(names) == len(set(names)), names
    assert not {"keep-alive", "server", "access-control-allow-origin"} & set(names), names


def test_queue_time_is_the_wait_for_the_slot(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-load-seconds", "0.4"])
    assert float(router.chat("qwen").headers["x-queue-time-ms"]) >= 400
    assert float(router.chat("qwen").headers["x-queue-time-ms"]) < 200


@pytest.mark.parametrize("sent", ["", "with space", "ü", "x" * 129])
def test_an_unfit_request_id_is_replaced(router: RouterProcess, sent: str) -> None:
    answer = router.get("/v1/models", headers={"X-Request-ID": sent.encode()})
    made = answer.headers["x-request-id"]
    assert re.fullmatch(r"[\x21-\x7e]{1,128}", made)
    assert made != sent


def test_request_ids_differ_and_stand_on_errors_too(router: RouterProcess) -> None:
    answers = [
        router.get("/v1/models"),
        router.get("/nowhere"),
        router.get("/v1/chat/completions"),
        router.chat("nobody"),
        router.post("/v1/chat/completions", content=b"{"),
        router.get("/health"),
    ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)


def test_a_stream_is_passed_on_as_it_comes(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=record.flags)
    with router.client() as client:
        body = chat_body("qwen", stream=True, fake={"tokens": 3, "silent_after": 2, "tag": "s"})
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            seen = [next(lines) for _ in range(5)]
            assert [json.loads(line[6:])["choices"][0]["delta"].get("content") for line in seen[::2]] == [
                None,
                "tök0 ",
                "tök1 ",
            ]
            assert record.lines("finished") == []
    record.wait_for("cancelled", tag="s")


@pytest.mark.parametrize("status", [400, 413, 422, 429, 500, 501, 503])
def test_the_backends_own_errors_pass_unchanged(router: RouterProcess, direct: Fake, status: int) -> None:
    body = chat_body("org/qwen", fake={"status": status})
    answer = router.post("/v1/chat/completions", body)
    expected = direct.post("/v1/chat/completions", body)
    assert (answer.status_code, answer.content) == (status, expected.content)
    assert answer.headers["content-type"] == expected.headers["content-type"]
    assert router.chat("org/qwen").status_code == 200


def test_compute_error_passes_and_the_model_stays(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-500"])
    answer = router.chat("qwen", stream=True)
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "Compute error.")
    pid = router.status("qwen")["pid"]
    assert router.chat("qwen").status_code == 500
    assert router.status("qwen")["pid"] == pid


def test_many_requests_on_one_connection(router: RouterProcess) -> None:
    """More than llama-server lets through on one of its connections, 100."""
    with router.client() as client:
        assert {client.post("/v1/completions", json={"model": "org/qwen"}).status_code for _ in range(130)} == {200}


def test_idle_backend_connections_may_close(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=["--fake-close-idle", "0.05", *record.flags])
    for _ in range(6):
        assert router.chat("qwen").status_code == 200
        time.sleep(0.06)  # around the moment the backend closes
    assert len(record.lines("received")) == 6
    assert len(record.lines("spawned")) == 1


def test_models_are_kept_apart(router: RouterProcess) -> None:
    assert router.chat("other").json()["model"] == "other"
    assert router.chat("org/qwen").json()["model"] == "org/qwen"
