"""llama-server misbehaves while it serves."""

import json
import os
import signal
from typing import Any

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import is_alive, wait_until
from tests.harness.record import Record
from tests.harness.router import RouterProcess

pytestmark = pytest.mark.process


def last_event(text: str) -> dict[str, Any]:
    """The error event a broken stream ends with: exactly one, and no [DONE]."""
    assert text.count('data: {"error"') == 1
    assert "[DONE]" not in text
    assert text.endswith("\n\n")
    found = json.loads(text.rstrip().rpartition("\n\n")[2].removeprefix("data: "))
    assert {"message", "type", "param", "code"} <= set(found["error"])
    error: dict[str, Any] = found["error"]
    return error


def test_kill_9_and_the_next_request_is_answered(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    for _ in range(3):
        assert router.chat("qwen").status_code == 200
        pid = router.status("qwen")["pid"]
        os.kill(pid, signal.SIGKILL)
        assert router.chat("qwen").status_code == 200
        assert not is_alive(pid)
        assert router.status("qwen")["pid"] != pid


def test_kill_9_in_the_middle_of_waiting(start_router: StartRouter, record: Record) -> None:
    """Nothing was sent to the client yet: the request survives its backend."""
    gate = record.path.with_name("gate")
    router = start_router(qwen=["-np", "2", *record.flags])
    pending = [router.in_background("qwen", fake={"hold_until": str(gate)}) for _ in range(4)]
    record.wait_for("started", 2)
    router.wait_for_status("qwen", queued=2)
    os.kill(router.status("qwen")["pid"], signal.SIGKILL)
    gate.touch()
    assert {each.answer().status_code for each in pending} == {200}
    assert len(record.lines("spawned")) == 2


def test_death_in_a_stream_ends_with_one_error_event(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-die-after-chunks", "3"])
    answer = router.chat("qwen", stream=True)
    assert answer.status_code == 200
    assert answer.text.count("tök") == 2
    error = last_event(answer.text)
    assert (error["type"], error["code"]) == ("service_unavailable_error", "backend_unavailable")
    again = router.chat("qwen", stream=True)
    assert last_event(again.text)["code"] == "backend_unavailable"


def test_kill_9_in_a_stream_leaves_others_alone(start_router: StartRouter, record: Record) -> None:
    router = start_router(a=record.flags, b=[])
    with router.client() as client:
        body = {"model": "a", "stream": True, "fake": {"tokens": 1000, "token_seconds": 0.01}}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            os.kill(router.status("a")["pid"], signal.SIGKILL)
            text += "".join(pieces)
    assert last_event(text)["code"] == "backend_unavailable"
    assert router.chat("b").status_code == 200
    assert router.chat("a").status_code == 200


@pytest.mark.parametrize("fault", [{"close_mid_chunk": True}, {"silent_after": 2}])
def test_a_stream_that_breaks_or_falls_silent(start_router: StartRouter, fault: dict[str, Any]) -> None:
    router = start_router(qwen=[], system={"request_timeout_sec": 0.4})
    answer = router.chat("qwen", stream=True, fake=fault)
    expected = "backend_timeout" if "silent_after" in fault else "backend_unavailable"
    assert last_event(answer.text)["code"] == expected
    assert router.chat("qwen").status_code == 200


def test_death_in_a_stream_of_messages_speaks_its_dialect(start_router: StartRouter) -> None:
    """Anthropic's clients look for `event: error`."""
    router = start_router(qwen=["--fake-die-after-chunks", "3"])
    answer = router.post("/v1/messages", {"model": "qwen", "messages": [], "stream": True})
    last = answer.text.rstrip().rpartition("\n\n")[2]
    assert last.startswith("event: error\ndata: ")
    assert '"message_stop"' not in answer.text


@pytest.mark.parametrize("when", ["before_headers", "after_headers"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_kills_gets_no_third(
    start_router: StartRouter, record: Record, when: str, *, stream: bool
) -> None:
    router = start_router(qwen=record.flags)
    answer = router.chat("qwen", stream=stream, fake={"die": when})
    assert answer.status_code == 502, answer.text
    assert answer.json()["error"]["code"] == "backend_crashed"
    assert len(record.lines("spawned")) in {2, 3}
    assert router.chat("qwen").status_code == 200


@pytest.mark.parametrize("fault", [{"garbage": True}, {"answer_101": True}])
def test_what_is_not_an_answer(start_router: StartRouter, record: Record, fault: dict[str, Any]) -> None:
    router = start_router(qwen=record.flags)
    answer = router.chat("qwen", fake=fault)
    assert answer.status_code in {502, 503}, answer.text
    assert answer.json()["error"]["type"] in {"server_error", "service_unavailable_error"}
    assert router.chat("qwen").status_code == 200
    assert router.status("qwen")["active"] == 0


@pytest.mark.parametrize("fault", [{"wrong_length": True}, {"close_mid_chunk": True}])
@pytest.mark.parametrize("size", [10, 300_000])
def test_a_whole_answer_that_is_cut(start_router: StartRouter, fault: dict[str, Any], size: int) -> None:
    """Small ones are held back and become an error; of a large one the client can see that it was cut."""
    router = start_router(qwen=[])
    try:
        answer = router.chat("qwen", fake={**fault, "chunk_bytes": size})
    except httpx.RemoteProtocolError:
        assert size > 100_000
    else:
        assert answer.status_code in {502, 503}
    assert router.chat("qwen").status_code == 200


def test_backend_timeout(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=record.flags, system={"request_timeout_sec": 0.4})
    answer = router.chat("qwen", fake={"stall": True, "tag": "stalled"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "backend_timeout")
    assert answer.json()["error"]["type"] == "timeout_error"
    record.wait_for("cancelled", tag="stalled")
    assert router.chat("qwen").status_code == 200


def test_backend_timeout_of_a_stream_before_its_first_event(start_router: StartRouter) -> None:
    router = start_router(qwen=[], system={"request_timeout_sec": 0.4})
    answer = router.chat("qwen", stream=True, fake={"stall": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "backend_timeout")


def test_a_stream_that_keeps_producing_is_not_cut(start_router: StartRouter) -> None:
    router = start_router(qwen=[], system={"request_timeout_sec": 0.5})
    answer = router.chat("qwen", stream=True, fake={"tokens": 8, "token_seconds": 0.15})
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
