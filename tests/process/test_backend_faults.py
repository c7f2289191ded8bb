"""llama-server misbehaves while it serves."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import is_alive, stop, wait_until
from tests.harness.record import Record
from tests.harness.router import RouterProcess

pytestmark = pytest.mark.process

WAYS: dict[str, dict[str, str]] = {"lean": {}, "quart": {"TE": "trailers"}}
"""Headers that choose a way in."""


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, str]:
    return WAYS[request.param]


def last_event(text: str) -> dict[str, Any]:
    """The error event a broken stream ends with: exactly one, and no [DONE]."""
    assert text.count('data: {"error"') == 1
    assert "[DONE]" not in text
    assert text.endswith("\n\n")
    found = json.loads(text.rstrip().rpartition("\n\n")[2].removeprefix("data: "))
    assert {"message", "type", "param", "code"} <= set(found["error"])
    error: dict[str, Any] = found["error"]
    return error


def test_kill_9_and_the_next_request_is_answered(start_router: StartRouter, way: dict[str, str]) -> None:
    router = start_router(qwen=[])
    for _ in range(3):
        assert router.chat("qwen", headers=way).status_code == 200
        pid = router.status("qwen")["pid"]
        os.kill(pid, signal.SIGKILL)
        assert router.chat("qwen", headers=way).status_code == 200
        assert not is_alive(pid)
        assert router.status("qwen")["pid"] != pid


def test_kill_9_while_it_loads(start_router: StartRouter, record: Record, way: dict[str, str]) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=["--fake-load-until", str(gate), *record.flags])
    waiting = router.in_background("qwen", headers=way)
    (first,) = record.wait_for("spawned")
    os.kill(first["pid"], signal.SIGKILL)
    second = record.wait_for("spawned", 2)[1]
    assert second["time"] - first["time"] < 5, "its exit is seen, not the end of load_timeout_sec"
    gate.touch()
    assert waiting.answer().status_code == 200


def test_one_that_dies_slowly_takes_nobody_along(
    start_router: StartRouter, record: Record, way: dict[str, str]
) -> None:
    """Its connections are closed, and its memory is given back for seconds before its exit can be waited for."""
    gate = record.path.with_name("gate")
    router = start_router(qwen=["-np", "2", *record.flags])
    killer = router.in_background(
        "qwen", headers=way, fake={"hold_until": str(gate), "die": "before_headers", "die_slowly": 30, "tag": "killer"}
    )
    record.wait_for("started", 1)
    others = [
        router.in_background("qwen", headers=way, fake={"tag": str(n), "hold_until": str(gate)}) for n in range(6)
    ]
    router.wait_for_status("qwen", queued=5)
    gate.touch()
    assert [each.answer().status_code for each in others] == [200] * 6
    answer = killer.answer()
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "backend_crashed")


@pytest.mark.parametrize("stream", [False, True])
def test_kill_9_in_the_middle_of_waiting(
    start_router: StartRouter, record: Record, way: dict[str, str], *, stream: bool
) -> None:
    """Nothing was sent to the client yet: the request survives its backend."""
    gate = record.path.with_name("gate")
    router = start_router(qwen=["-np", "2", *record.flags])
    pending = [
        router.in_background("qwen", stream=stream, headers=way, fake={"hold_until": str(gate), "tag": str(number)})
        for number in range(4)
    ]
    record.wait_for("started", 2)
    router.wait_for_status("qwen", queued=2)
    os.kill(router.status("qwen")["pid"], signal.SIGKILL)
    record.wait_for("started", 4)
    ran = record.tags("started")
    assert set(ran[2:]) == set(ran[:2]), "at their old places"
    gate.touch()
    assert {each.answer().status_code for each in pending} == {200}
    assert len(record.lines("spawned")) == 2


def test_a_stopped_llama_server_is_replaced(start_router: StartRouter, record: Record, way: dict[str, str]) -> None:
    """SIGSTOP: connections are accepted by the kernel, and nothing is ever said."""
    gate = record.path.with_name("gate")
    router = start_router(qwen=record.flags, system={"stall_timeout_sec": 0.8})
    running = router.in_background("qwen", headers=way, fake={"hold_until": str(gate)})
    (line,) = record.wait_for("started")
    queued = router.in_background("qwen", headers=way, stream=True)
    router.wait_for_status("qwen", queued=1)
    stop(line["pid"])
    gate.touch()
    assert running.answer().status_code == 200
    assert queued.answer().text.endswith("data: [DONE]\n\n")
    assert not is_alive(line["pid"])
    assert len(record.lines("spawned")) == 2
    assert "computed nothing for 0.8 s" in router.stderr


def test_one_that_is_well_and_makes_no_token_is_replaced(
    start_router: StartRouter, record: Record, way: dict[str, str]
) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=record.flags, system={"stall_timeout_sec": 0.8})
    running = router.in_background("qwen", headers=way, fake={"hold_until": str(gate)})
    (line,) = record.wait_for("started")
    assert router.get("/health").status_code == 200
    record.wait_for("started", 2)
    gate.touch()
    assert running.answer().status_code == 200
    assert not is_alive(line["pid"])


def test_a_request_that_stalls_two_gets_no_third(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=record.flags, system={"stall_timeout_sec": 0.4})
    answer = router.chat("qwen", fake={"stall": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "backend_crashed")
    assert "computed nothing" in answer.json()["error"]["message"]
    assert router.chat("qwen").status_code == 200


def test_a_stream_that_is_slow_is_no_stall(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=["-np", "2", *record.flags], system={"stall_timeout_sec": 0.4})
    silent = router.in_background("qwen", fake={"tokens": 12, "token_seconds": 0.15})
    answer = router.chat("qwen", stream=True, fake={"tokens": 12, "token_seconds": 0.15})
    assert answer.text.endswith("data: [DONE]\n\n")
    assert silent.answer().status_code == 200
    assert len(record.lines("spawned")) == 1


def test_one_that_cannot_compute_is_replaced(start_router: StartRouter, record: Record, way: dict[str, str]) -> None:
    router = start_router(qwen=record.flags)
    for _ in range(3):
        answer = router.chat("qwen", headers=way, fake={"500": True})
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "Compute error."), "its own words"
    record.wait_for("spawned", 2)
    router.chat("qwen", headers=way, fake={"500": True})
    assert router.chat("qwen", headers=way).status_code == 200  # one success between, and they are not in a row
    for _ in range(2):
        router.chat("qwen", fake={"500": True})
    assert router.chat("qwen", headers=way).status_code == 200
    assert len(record.lines("spawned")) == 2
    assert "answered 'Compute error.' 3 times in a row" in router.stderr


def test_a_crash_loop_hurts_nobody_else(start_router: StartRouter, record: Record, way: dict[str, str]) -> None:
    """Backoff, `failed` with the last words, one more try after a while; another model answers all along."""
    broken = record.path.with_name("broken")
    broken.touch()
    router = start_router(
        models={"bad": ["--fake-exit-at-start-while", str(broken), *record.flags], "good": []},
        system={"failed_retry_sec": 1},
    )
    loop = router.in_background("bad", headers=way)
    answers = 0
    while not loop.done:
        assert router.chat("good", headers=way).status_code == 200
        answers += 1
    answer = loop.answer()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_failed")
    assert "exits while" in answer.json()["error"]["message"], "the last lines of its log"
    assert 0 < int(answer.headers["retry-after"]) <= 1
    times = [line["time"] for line in record.lines("spawned")]
    assert len(times) == 3
    assert times[2] - times[1] > times[1] - times[0] > 0.15
    assert answers > 3
    broken.unlink()
    assert router.chat("bad", headers=way).status_code == 503
    wait_until(lambda: router.chat("bad", headers=way).status_code == 200)
    assert len(record.lines("spawned")) == 4


def test_death_in_a_stream_ends_with_one_error_event(start_router: StartRouter, way: dict[str, str]) -> None:
    router = start_router(qwen=["--fake-die-after-chunks", "3"])
    answer = router.chat("qwen", headers=way, stream=True)
    assert answer.status_code == 200
    assert answer.text.count("tök") == 2
    error = last_event(answer.text)
    assert (error["type"], error["code"]) == ("service_unavailable_error", "backend_unavailable")
    again = router.chat("qwen", headers=way, stream=True)
    assert last_event(again.text)["code"] == "backend_unavailable"


def test_kill_9_in_a_stream_leaves_others_alone(start_router: StartRouter, record: Record, way: dict[str, str]) -> None:
    router = start_router(a=record.flags, b=[])
    with router.client() as client:
        body = {"model": "a", "stream": True, "fake": {"tokens": 1000, "token_seconds": 0.01}}
        with client.stream("POST", "/v1/chat/completions", json=body, headers=way) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            os.kill(router.status("a")["pid"], signal.SIGKILL)
            text += "".join(pieces)
    assert last_event(text)["code"] == "backend_unavailable"
    assert router.chat("b").status_code == 200
    assert router.chat("a").status_code == 200


@pytest.mark.parametrize("fault", [{"close_mid_chunk": True}, {"silent_after": 2}])
def test_a_stream_that_breaks_or_falls_silent(
    start_router: StartRouter, fault: dict[str, Any], way: dict[str, str]
) -> None:
    router = start_router(qwen=[], system={"request_timeout_sec": 0.4})
    answer = router.chat("qwen", headers=way, stream=True, fake=fault)
    expected = "backend_timeout" if "silent_after" in fault else "backend_unavailable"
    assert last_event(answer.text)["code"] == expected
    assert router.chat("qwen").status_code == 200


def test_death_in_a_stream_of_messages_speaks_its_dialect(start_router: StartRouter, way: dict[str, str]) -> None:
    """Anthropic's clients look for `event: error`."""
    router = start_router(qwen=["--fake-die-after-chunks", "3"])
    answer = router.post("/v1/messages", {"model": "qwen", "messages": [], "stream": True}, headers=way)
    last = answer.text.rstrip().rpartition("\n\n")[2]
    assert last.startswith("event: error\ndata: ")
    assert '"message_stop"' not in answer.text


def test_death_in_a_stream_of_responses_speaks_its_dialect(start_router: StartRouter, way: dict[str, str]) -> None:
    router = start_router(qwen=["--fake-die-after-chunks", "3"])
    answer = router.post("/v1/responses", {"model": "qwen", "input": "Hi", "stream": True}, headers=way)
    last = answer.text.rstrip().rpartition("\n\n")[2]
    assert last.startswith("event: response.failed\ndata: ")
    told = json.loads(last.partition("data: ")[2])
    assert (told["type"], told["response"]["status"]) == ("response.failed", "failed")
    assert told["response"]["error"]["message"] == told["error"]["message"]
    assert "response.completed" not in answer.text


@pytest.mark.parametrize("when", ["before_headers", "after_headers"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_kills_gets_no_third(
    start_router: StartRouter, record: Record, when: str, way: dict[str, str], *, stream: bool
) -> None:
    router = start_router(qwen=record.flags)
    answer = router.chat("qwen", headers=way, stream=stream, fake={"die": when})
    assert answer.status_code == 502, answer.text
    assert answer.json()["error"]["code"] == "backend_crashed"
    assert len(record.lines("spawned")) in {2, 3}
    assert router.chat("qwen").status_code == 200


@pytest.mark.parametrize("fault", [{"garbage": True}, {"answer_101": True}])
def test_what_is_not_an_answer(
    start_router: StartRouter, record: Record, fault: dict[str, Any], way: dict[str, str]
) -> None:
    router = start_router(qwen=record.flags)
    answer = router.chat("qwen", headers=way, fake=fault)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "bad_backend_response"), answer.text
    assert len(record.lines("spawned")) == 1
    assert router.chat("qwen").status_code == 200
    assert router.status("qwen")["active"] == 0


@pytest.mark.parametrize(
    ("fault", "at_once"),
    [({"wrong_length": True}, False), ({"close_mid_chunk": True}, False), ({"close_mid_chunk": True}, True)],
)
@pytest.mark.parametrize("size", [10, 300_000])
def test_a_whole_answer_that_is_cut(
    start_router: StartRouter, fault: dict[str, Any], size: int, way: dict[str, str], *, at_once: bool
) -> None:
    """Small ones are held back and become an error; of a large one the client can see that it was cut."""
    router = start_router(qwen=[], system={"stop_at_once": at_once})
    try:
        answer = router.chat("qwen", headers=way, fake={**fault, "chunk_bytes": size})
    except httpx.RemoteProtocolError:
        assert size > 100_000
        assert not at_once
    else:
        assert answer.status_code in {502, 503}
    assert router.chat("qwen").status_code == 200


def test_backend_timeout(start_router: StartRouter, record: Record, way: dict[str, str]) -> None:
    router = start_router(qwen=record.flags, system={"request_timeout_sec": 0.4})
    answer = router.chat("qwen", headers=way, fake={"stall": True, "tag": "stalled"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "backend_timeout")
    assert answer.json()["error"]["type"] == "timeout_error"
    record.wait_for("cancelled", tag="stalled")
    assert router.chat("qwen").status_code == 200


def test_backend_timeout_of_a_stream_before_its_first_event(start_router: StartRouter, way: dict[str, str]) -> None:
    router = start_router(qwen=[], system={"request_timeout_sec": 0.4})
    answer = router.chat("qwen", headers=way, stream=True, fake={"stall": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "backend_timeout")


def test_a_stream_that_keeps_producing_is_not_cut(start_router: StartRouter, way: dict[str, str]) -> None:
    router = start_router(qwen=[], system={"request_timeout_sec": 0.5})
    answer = router.chat("qwen", headers=way, stream=True, fake={"tokens": 8, "token_seconds": 0.15})
    assert answer.text.endswith("data: [DONE]\n\n")


def test_an_exit_while_idle_is_healed(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=["--fake-exit-after-ready", "0.2", *record.flags])
    assert router.chat("qwen").status_code == 200
    record.wait_for("spawned", 2)
    assert router.chat("qwen").status_code == 200


def test_a_health_that_hangs_is_healed(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=["--fake-health-hang-after-ready", *record.flags], system={"health_interval_sec": 0.1})
    assert router.chat("qwen").status_code == 200
    record.wait_for("spawned", 2, timeout_seconds=20)
    assert router.chat("qwen").status_code == 200


@pytest.mark.parametrize("everything", [True, False])
def test_sockets_that_somebody_removed(
    start_router: StartRouter, record: Record, way: dict[str, str], *, everything: bool
) -> None:
    """systemd-logind takes `$XDG_RUNTIME_DIR` away at a user's last logout; the router goes on in another folder."""
    with tempfile.TemporaryDirectory(prefix="tr-") as name:  # pytest's own would be too long for a socket
        runtime, temporary = Path(name, "run"), Path(name, "tmp")
        runtime.mkdir()
        temporary.mkdir()
        environment = {"XDG_RUNTIME_DIR": str(runtime), "TMPDIR": str(temporary)}
        router = start_router(a=["-np", "2", *record.flags], b=[], environment=environment)
        gate = Path(name, "gate")
        running = router.in_background("a", headers=way, fake={"hold_until": str(gate)})
        record.wait_for("started")
        (folder,) = runtime.iterdir()
        if everything:
            shutil.rmtree(runtime)
        else:
            (folder / "0-1.sock").unlink()
        other = router.in_background("a", headers=way)  # has to connect
        record.wait_for("spawned", 2)
        gate.touch()
        assert other.answer().status_code == 200
        assert running.answer().status_code == 200
        assert router.chat("b", headers=way).status_code == 200
        assert len(record.lines("spawned")) == 2
        assert "its socket was removed" in router.stderr
        assert ("the folder of the sockets is gone" in router.stderr) == everything
        assert bool(list(temporary.iterdir())) == everything
        router.terminate()
        assert router.wait() == 0
        assert list(temporary.iterdir()) == []


def test_sigterm_is_ignored(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-ignore-sigterm"])
    router.chat("qwen")
    (pid,) = router.servers()
    assert router.post("/v1/models/eject", {"model": "qwen"}).json()["status"] == "success"
    assert not is_alive(pid)


def test_what_it_forked_goes_with_it(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-fork-child"])
    router.chat("qwen")
    assert len(router.children()) == 2
    router.post("/v1/models/eject", {"model": "qwen"})
    wait_until(lambda: not router.children())


def test_what_a_dead_one_forked_goes_too(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-fork-child"])
    router.chat("qwen")
    before = router.children()
    os.kill(router.status("qwen")["pid"], signal.SIGKILL)
    assert router.chat("qwen").status_code == 200
    wait_until(lambda: not before & router.children())


def all_idle(router: RouterProcess) -> None:
    status = router.status("qwen")
    assert (status["active"], status["queued"]) == (0, 0)


def test_faults_one_after_another_leak_nothing(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=["-np", "2", *record.flags], system={"request_timeout_sec": 0.3})
    faults: list[dict[str, Any]] = [
        {"status": 500},
        {"garbage": True},
        {"wrong_length": True},
        {"stall": True},
        {"close_mid_chunk": True},
        {"die_after_chunks": 1},
    ]
    pending = [router.in_background("qwen", stream=stream, fake=fault) for stream in (True, False) for fault in faults]
    for each in pending:
        each.answer()
    assert router.chat("qwen").status_code == 200
    all_idle(router)
