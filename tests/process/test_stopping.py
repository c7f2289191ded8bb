"""How the router ends, and that nothing of it stays."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.record import Record
from tests.harness.router import chat_body, clean_environment
from tests.harness.toml import router_toml

pytestmark = pytest.mark.process


WAYS: dict[str, dict[str, str]] = {"lean": {}, "quart": {"TE": "trailers"}}
"""Headers that choose a way in."""


def test_idle_it_stops_at_once(start_router: StartRouter) -> None:
    router = start_router(models={"a": [], "b": [], "c": []})
    for alias in "abc":
        router.chat(alias)
    with router.connect():  # an idle client does not hold it up
        began = time.monotonic()
        router.terminate()
        assert router.wait() == 0
        assert time.monotonic() - began < 2
    assert router.children() == set()


def test_sigint_is_the_same(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    router.chat("qwen")
    router.interrupt()
    assert router.wait() == 0
    assert router.children() == set()


@pytest.mark.parametrize("way", WAYS)
def test_drain(start_router: StartRouter, record: Record, way: str) -> None:
    """What runs finishes, what waits is refused, what comes is refused, and then it ends with 0."""
    gate = record.path.with_name("gate")
    router = start_router(qwen=record.flags)
    text = []

    def read_stream() -> None:
        body = chat_body("qwen", stream=True, fake={"hold_until": str(gate), "tokens": 5, "token_seconds": 0.05})
        text.append(router.post("/v1/chat/completions", body, headers=WAYS[way]).text)

    reader = threading.Thread(target=read_stream)
    reader.start()
    record.wait_for("started")
    queued = router.in_background("qwen", fake={"tag": "queued"}, headers=WAYS[way])
    router.wait_for_status("qwen", queued=1)
    router.terminate()
    answer = queued.answer()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert int(answer.headers["retry-after"]) >= 1
    late = router.chat("qwen", headers=WAYS[way])
    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    health = router.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "degraded")
    gate.touch()
    reader.join(10)
    assert text[0].endswith("data: [DONE]\n\n")
    assert router.wait() == 0
    assert router.children() == set()
    assert "queued" not in record.tags("received")


def test_a_command_to_drain_may_be_repeated_and_be_followed_by_a_signal(
    start_router: StartRouter, record: Record
) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=record.flags)
    running = router.in_background("qwen", fake={"hold_until": str(gate)})
    record.wait_for("started")
    for _ in range(3):
        assert router.post("/v1/router/drain", {}).status_code == 200
        wait_until(lambda: router.get("/v1/models/status").json()["server"]["status"] == "draining")
    router.terminate()  # as systemd or Kubernetes do after a hook that drains
    wait_until(lambda: "signal=SIGTERM" in router.stderr)
    gate.touch()
    assert running.answer().status_code == 200
    assert router.wait() == 0


@pytest.mark.parametrize("way", WAYS)
def test_drain_is_bounded(start_router: StartRouter, record: Record, way: str) -> None:
    router = start_router(qwen=record.flags, system={"drain_timeout_sec": 0.5})
    running = router.in_background("qwen", fake={"stall": True}, headers=WAYS[way])
    record.wait_for("started")
    began = time.monotonic()
    router.terminate()
    assert router.wait() == 0
    assert 0.4 < time.monotonic() - began < 4
    answer = running.answer()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert router.children() == set()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/v1/chat/completions", 'data: {"error"'), ("/v1/responses", "event: response.failed\n"),
        ("/v1/messages", "event: error\n"),
    ],
)  # fmt: skip
def test_a_stream_that_drains_too_long_is_told(
    start_router: StartRouter, record: Record, path: str, word: str, way: str
) -> None:
    router = start_router(qwen=record.flags, system={"drain_timeout_sec": 0.5})
    body = chat_body("qwen", stream=True, fake={"tokens": 1000, "token_seconds": 0.05})
    text = []
    reader = threading.Thread(target=lambda: text.append(router.post(path, body, headers=WAYS[way]).text))
    reader.start()
    record.wait_for("started")
    router.terminate()
    reader.join(10)
    assert text[0].count(word) == 1
    assert "shutting down" in text[0].rpartition(word)[2]
    assert router.wait() == 0


@pytest.mark.parametrize("by_quart", [False, True])
def test_who_takes_an_answer_slowly_gets_all_of_it(start_router: StartRouter, *, by_quart: bool) -> None:
    """llama-server is done with it, and its client is not."""
    router = start_router(qwen=[])
    router.chat("qwen")
    body = json.dumps(chat_body("qwen", fake={"tokens": 10, "chunk_bytes": 18_000})).encode()
    with router.start_raw(body, by_quart=by_quart) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        said = connection.recv(2048)
        router.terminate()
        while piece := connection.recv(2048):
            said += piece
            time.sleep(0.02)
    head, _, rest = said.partition(b"\r\n\r\n")
    assert f"content-length: {len(rest)}".encode() in head.lower()
    assert router.wait() == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_cuts(start_router: StartRouter, record: Record, second: signal.Signals, way: str) -> None:
    router = start_router(qwen=record.flags)
    running = router.in_background("qwen", fake={"stall": True}, headers=WAYS[way])
    record.wait_for("started")
    router.terminate()
    wait_until(lambda: router.get("/v1/models/status").json()["server"]["status"] == "draining")
    began = time.monotonic()
    router.process.send_signal(second)
    router.wait(5)
    assert time.monotonic() - began < 4
    assert router.children() == set()
    with contextlib.suppress(httpx.HTTPError):
        assert running.answer().status_code >= 500


def test_while_loading(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=["--fake-never-ready", *record.flags])
    waiting = router.in_background("qwen")
    record.wait_for("spawned")
    began = time.monotonic()
    router.terminate()
    assert router.wait() == 0
    assert time.monotonic() - began < 4
    answer = waiting.answer()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    assert router.children() == set()


def test_during_a_backoff(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=["--fake-exit-at-start", "1", *record.flags], system={"max_load_attempts": 50})
    waiting = router.in_background("qwen")
    record.wait_for("spawned", 2)
    router.terminate()
    assert router.wait(5) == 0
    assert waiting.answer().json()["error"]["code"] == "shutting_down"


@pytest.mark.parametrize("by_quart", [False, True])
def test_a_stalled_reader_does_not_delay_it(start_router: StartRouter, record: Record, *, by_quart: bool) -> None:
    """Hypercorn shields its sends: such a client could not be cancelled."""
    router = start_router(qwen=record.flags, system={"drain_timeout_sec": 0.5})
    body = json.dumps(chat_body("qwen", stream=True, fake={"tokens": 1000, "chunk_bytes": 200_000})).encode()
    with router.start_raw(body, by_quart=by_quart) as connection:
        assert b"200" in connection.recv(100)
        record.wait_for("started")
        time.sleep(0.3)  # every buffer between is full by now
        began = time.monotonic()
        router.terminate()
        assert router.wait() == 0
        assert time.monotonic() - began < 4
    assert router.children() == set()


@pytest.mark.parametrize("by_quart", [False, True])
def test_a_stalled_reader_keeps_nobody_else_waiting(start_router: StartRouter, *, by_quart: bool) -> None:
    router = start_router(qwen=["-np", "2"])
    body = json.dumps(chat_body("qwen", stream=True, fake={"tokens": 1000, "chunk_bytes": 200_000})).encode()
    with router.start_raw(body, by_quart=by_quart) as connection:
        assert b"200" in connection.recv(100)
        for _ in range(5):
            assert router.chat("qwen", timeout=5).status_code == 200
    router.wait_for_status("qwen", active=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_that_nobody_heeds_any_more_do_not_cut_the_end_short(
    start_router: StartRouter, number: signal.Signals
) -> None:
    """It takes some seconds, since llama-server ignores SIGTERM; there is nothing left to be stopped at once."""
    with tempfile.TemporaryDirectory(prefix="tr-") as name:
        router = start_router(qwen=["--fake-ignore-sigterm"], environment={"TMPDIR": name})
        router.chat("qwen")
        router.terminate()
        while router.is_running():
            router.process.send_signal(number)
            time.sleep(0.02)  # as often as somebody who is impatient
        assert router.wait() == 0
        assert list(Path(name).iterdir()) == []
        assert "stopped" in router.stderr
    assert router.children() == set()


@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2)])
def test_without_standard_files(fake_llama: Path, header_gguf: Path, numbers: tuple[int, ...]) -> None:
    """It says nothing, and works; what is written there by number goes into no other file."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="tr-") as name:
        config = Path(name, "router.toml")
        system = {"llama_server_path": fake_llama, "gpu_devices": []}
        config.write_text(router_toml(models={"qwen": {"model_path": header_gguf}}, system=system, api={"port": port}))
        closed = " ".join(f"{number}>&-" for number in numbers)
        command = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "trio_router", "serve"]
        environment = clean_environment({"TMPDIR": name, "XDG_STATE_HOME": name})
        with subprocess.Popen([*command, "--config", str(config)], env=environment) as router:
            try:
                url = f"http://127.0.0.1:{port}/v1/chat/completions"

                def answered() -> bool:
                    with contextlib.suppress(httpx.TransportError):
                        return httpx.post(url, json=chat_body("qwen"), trust_env=False).status_code == 200
                    return False

                wait_until(answered)
                assert answered()
                for number in numbers:
                    assert Path(f"/proc/{router.pid}/fd/{number}").readlink() == Path("/dev/null")
            finally:
                router.terminate()
            assert router.wait(10) == 0


def test_stubborn_children(start_router: StartRouter) -> None:
    flags = ["--fake-ignore-sigterm", "--fake-fork-child"]
    router = start_router(models={"a": flags, "b": flags, "c": flags})
    for alias in "abc":
        router.chat(alias)
    began = time.monotonic()
    router.terminate()
    assert router.wait() == 0
    assert time.monotonic() - began < 5  # side by side, not one after the other
    assert router.children() == set()


@pytest.mark.parametrize(
    "flags", [[], ["--fake-never-ready"], ["--fake-ignore-sigterm"], ["--fake-fork-child"]], ids=str
)
def test_kill_9_of_the_router(start_router: StartRouter, record: Record, flags: list[str]) -> None:
    router = start_router(a=[*flags, *record.flags], b=record.flags)
    router.chat("b")
    router.in_background("a", fake={"stall": True})
    record.wait_for("spawned" if "--fake-never-ready" in flags else "started", alias="a")
    assert set(router.servers().values()) == {"a", "b"}
    router.kill()
    router.wait()
    wait_until(lambda: not router.children(), timeout_seconds=2.0)


def test_a_wrapper_script_around_llama_server(start_router: StartRouter, fake_llama: Path, tmp_path: Path) -> None:
    """llama-server is a grandchild then: it goes with the script, and with a killed router too."""
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\n"{fake_llama}" "$@" &\nwait\n')
    wrapper.chmod(0o755)
    router = start_router(qwen=[], system={"llama_server_path": wrapper})
    for _ in range(2):
        assert router.chat("qwen").status_code == 200
        assert len(router.children()) == 2
        router.post("/v1/models/eject", {"model": "qwen"})
        assert not router.children()
    router.in_background("qwen", fake={"stall": True})
    wait_until(lambda: router.status("qwen")["active"])
    router.kill()
    router.wait()
    wait_until(lambda: not router.children(), timeout_seconds=2.0)


def test_the_next_one_sweeps_what_a_killed_one_left(start_router: StartRouter, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tr-") as name:  # pytest's own would be too long for a socket
        folder = Path(name)
        environment = {"TMPDIR": name}
        router = start_router(qwen=[], environment=environment)
        router.chat("qwen")
        (left,) = folder.iterdir()
        assert list(left.glob("*.sock"))
        router.kill()
        router.wait()
        wait_until(lambda: not router.children(), timeout_seconds=2.0)
        assert left.exists()
        again = start_router(qwen=[], environment=environment)
        assert again.chat("qwen").status_code == 200
        assert not left.exists()
        (mine,) = folder.iterdir()
        third = start_router(qwen=[], environment=environment)  # beside one that lives
        assert third.chat("qwen").status_code == again.chat("qwen").status_code == 200
        assert mine.exists()
        for each in (again, third):
            each.terminate()
            assert each.wait() == 0
        assert list(folder.iterdir()) == []


def test_a_child_outlives_trios_thread_cache(start_router: StartRouter) -> None:
    """A child bound to a worker thread that trio retires would die 10 s after its start."""
    router = start_router(qwen=[])
    router.chat("qwen")
    (pid,) = router.servers()
    time.sleep(11)
    assert router.servers() == {pid: "qwen"}
