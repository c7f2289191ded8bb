"""The fake is trusted by every other test here, so it is tested itself; and against the real one where it can be."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.fake import Fake
from tests.harness.processes import is_alive, wait_until
from tests.harness.record import Record

pytestmark = pytest.mark.process

Start = Callable[..., Fake]


@pytest.fixture
def start(fake_llama: Path, header_gguf: Path, tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def begin(*flags: str, model: Path = header_gguf, env: dict[str, str] | None = None) -> Fake:
            command = [str(fake_llama), "-m", str(model), "--alias", "a/b", "--unknown", *flags]
            fake = Fake(command, str(tmp_path / "f.sock"), env)
            stack.callback(fake.close)
            return fake

        yield begin


def test_loads_then_is_ready(start: Start) -> None:
    fake = start("--fake-load-seconds", "0.2")
    wait_until(fake.health)
    with fake.client() as client:
        loading = client.get("/health")
        assert (loading.status_code, loading.json()["error"]["message"]) == (503, "Loading model")
        assert client.post("/v1/chat/completions", json={}).status_code == 503
    fake.ready()


def test_stream_has_llama_servers_shape(start: Start) -> None:
    fake = start().ready()
    body = {"model": "a/b", "stream": True, "stream_options": {"include_usage": True}, "fake": {"tokens": 2}}
    answer = fake.post("/v1/chat/completions", body)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["keep-alive"] == "timeout=5, max=100"
    assert answer.headers["access-control-allow-origin"] == ""
    assert answer.headers["transfer-encoding"] == "chunked"
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(text.removeprefix("data: ")) for text in events]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:3]] == ["tök0 ", "tök1 "]
    assert chunks[3]["choices"][0]["finish_reason"] == "stop"
    assert chunks[4]["usage"]["completion_tokens"] == 2
    assert "timings" in chunks[4]


def test_same_request_same_bytes(start: Start) -> None:
    fake = start().ready()
    first, second = (fake.post("/v1/messages", {"model": "a/b", "stream": True}).content for _ in range(2))
    assert first == second


def test_slots_are_kept_and_a_close_frees_one(start: Start, record: Record) -> None:
    fake = start("-np", "1", *record.flags).ready()
    with socket.socket(socket.AF_UNIX) as holder, fake.client() as client:
        holder.connect(fake.path)
        body = b'{"fake":{"stall":true,"tag":"held"}}'
        holder.sendall(b"POST /completion HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        record.wait_for("started", tag="held")
        assert [slot["is_processing"] for slot in client.get("/slots").json()] == [True]
        holder.close()
        assert client.post("/tokenize", json={"content": "a"}).json() == {"tokens": [97]}
    record.wait_for("cancelled", tag="held")
    assert record.most_at_once() == 1


def test_record_has_the_request(start: Start, record: Record) -> None:
    fake = start(*record.flags).ready()
    with fake.client() as client:
        client.post("/v1/chat/completions?a=1", content=b'{"x": 1}', headers={"X-Odd": "yes"})
    (line,) = record.wait_for("received")
    assert (line["method"], line["path"]) == ("POST", "/v1/chat/completions?a=1")
    assert ["X-Odd", "yes"] in line["headers"]
    assert line["sha256"] == hashlib.sha256(b'{"x": 1}').hexdigest()
    record.wait_for("finished")


def test_key_is_asked_for(start: Start) -> None:
    fake = start(env={"LLAMA_API_KEY": "secret"}).ready()
    with fake.client() as client:
        assert client.get("/slots").status_code == 401
        assert client.get("/slots", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fake-exit-at-start", "3"], "invalid argument"),
        (["--fake-oom"], "out of memory"),
        (["--fake-exit-at-start", "1", "--fake-words", "error: so it is"], "error: so it is"),
    ],
)
def test_dies_at_start_with_words(start: Start, flags: list[str], words: str) -> None:
    fake = start(*flags)
    assert fake.process.wait(5) in {1, 3}
    assert words in fake.said()


def test_refuses_what_is_not_gguf(start: Start, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    fake = start(model=tmp_path / "text.gguf")
    assert fake.process.wait(5) == 1
    assert "failed to load model from" in fake.said()


def test_fails_first_then_loads(start: Start, tmp_path: Path) -> None:
    flags = ["--fake-fail-first", "1", "--fake-state", str(tmp_path / "state")]
    assert start(*flags).process.wait(5) == 1
    start(*flags).ready()


@pytest.mark.parametrize(
    "fault",
    [
        {"die": "before_headers"},
        {"die": "after_headers"},
        {"die_after_chunks": 2},
        {"close_mid_chunk": True},
        {"garbage": True},
        {"answer_101": True},
    ],
)
def test_faults_break_the_answer(start: Start, fault: dict[str, Any]) -> None:
    fake = start().ready()
    with pytest.raises(httpx.RemoteProtocolError):
        fake.post("/v1/chat/completions", {"stream": True, "fake": fault}).raise_for_status()


def test_wrong_length_breaks_a_whole_answer(start: Start) -> None:
    fake = start().ready()
    with pytest.raises(httpx.RemoteProtocolError):
        fake.post("/v1/chat/completions", {"fake": {"wrong_length": True}})


def test_status_is_llama_servers_error(start: Start) -> None:
    fake = start("--fake-500").ready()
    assert fake.post("/completion", {}).json() == {
        "error": {"code": 500, "message": "Compute error.", "type": "server_error"}
    }


def test_sigterm_ends_it_at_once_when_idle(start: Start) -> None:
    fake = start().ready()
    fake.process.send_signal(signal.SIGTERM)
    assert fake.process.wait(2) == 0


def test_sigterm_waits_for_a_request_and_a_second_one_does_not(start: Start, record: Record) -> None:
    fake = start(*record.flags).ready()
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(fake.path)
        holder.sendall(b'POST /completion HTTP/1.1\r\nContent-Length: 23\r\n\r\n{"fake":{"stall":true}}')
        record.wait_for("started")
        fake.process.send_signal(signal.SIGTERM)
        record.wait_for("sigterm")
        assert fake.process.poll() is None
        fake.process.send_signal(signal.SIGTERM)
        assert fake.process.wait(2) == 1


def test_fork_and_ignored_sigterm_need_the_group_killed(start: Start) -> None:
    fake = start("--fake-fork-child", "--fake-ignore-sigterm").ready()
    fake.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert fake.process.poll() is None
    child = int(Path(f"/proc/{fake.process.pid}/task/{fake.process.pid}/children").read_text().split()[0])
    os.killpg(fake.process.pid, signal.SIGKILL)
    fake.process.wait(2)
    wait_until(lambda: not is_alive(child))


def test_idle_connection_is_closed(start: Start) -> None:
    fake = start("--fake-close-idle", "0.1").ready()
    with socket.socket(socket.AF_UNIX) as idle:
        idle.settimeout(2)
        idle.connect(fake.path)
        assert idle.recv(1) == b""


def test_health_hangs_once_ready(start: Start) -> None:
    fake = start("--fake-health-hang-after-ready").ready()
    with fake.client() as client, pytest.raises(httpx.ReadTimeout):
        client.get("/health", timeout=0.1)
