"""`/v1/models/{alias}/logs`: the last lines, and those that come, over restarts."""

from pathlib import Path

import pytest

from tests.conftest import StartRouter
from tests.harness.events import EventReader
from tests.harness.router import RouterProcess

pytestmark = pytest.mark.process

LOGS = "/v1/models/qwen/logs"


def log_of(router: RouterProcess, query: str = "") -> list[str]:
    answer = router.get(LOGS + query)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.text.endswith("\n") or not answer.text
    return answer.text.splitlines()


def test_the_last_lines(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    assert log_of(router) == []
    router.post("/v1/models/load", {"model": "qwen"})
    lines = log_of(router)
    assert lines[0] == f"--- incarnation 1: llama-server {router.status('qwen')['pid']} ---"
    assert len(lines) > 1
    assert log_of(router, "?lines=1") == lines[-1:]
    assert log_of(router, "?lines=0") == []
    assert log_of(router, "?lines=999999") == lines
    router.post("/v1/models/eject", {"model": "qwen"})
    assert log_of(router)[-1] == "--- incarnation 1: stopped, exit status 0 ---"


@pytest.mark.parametrize("lines", ["-1", "x", "1.5", "9999999999", "٣"])
def test_lines_must_be_a_number(start_shared_router: StartRouter, lines: str) -> None:
    answer = start_shared_router(qwen=[]).get(LOGS, params={"lines": lines})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lines")


def test_an_unknown_model(start_shared_router: StartRouter) -> None:
    answer = start_shared_router(qwen=[]).get("/v1/models/nobody/logs")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_an_alias_with_a_slash(start_router: StartRouter) -> None:
    router = start_router(models={"org/qwen": []})
    router.post("/v1/models/load", {"model": "org/qwen"})
    assert router.get("/v1/models/org/qwen/logs").text.startswith("--- incarnation 1")


def test_what_a_dead_one_said_stays(start_router: StartRouter, tmp_path: Path) -> None:
    router = start_router(qwen=["--fake-fail-first", "1", "--fake-state", str(tmp_path / "state")])
    router.post("/v1/models/load", {"model": "qwen"})
    lines = log_of(router)
    marks = [line.split(":")[0].strip("- ") for line in lines if line.startswith("---")]
    assert marks == ["incarnation 1", "incarnation 1", "incarnation 2"]
    assert "exited" in next(line for line in lines[1:] if line.startswith("---"))


def test_memory_is_bounded(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-flood-log", "5000000"])
    router.post("/v1/models/load", {"model": "qwen"}, timeout=30)
    answer = router.get(LOGS, params={"lines": "1000000"})
    assert len(answer.text.splitlines()) <= 1000
    assert len(answer.content) <= 300_000


def test_follows_over_restarts(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    with router.client(timeout=20) as client, client.stream("GET", LOGS + "?follow=1") as answer:
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        lines = answer.iter_lines()
        for incarnation in (1, 2):
            router.post("/v1/models/load", {"model": "qwen"})
            assert next(lines).startswith(f"--- incarnation {incarnation}: llama-server ")
            router.post("/v1/models/eject", {"model": "qwen"})
            while not (line := next(lines)).startswith("---"):
                pass
            assert line == f"--- incarnation {incarnation}: stopped, exit status 0 ---"
        router.terminate()
        assert list(lines) == []
    assert router.wait() == 0


def test_follows_as_events_and_resumes(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    router.post("/v1/models/load", {"model": "qwen"})
    whole = log_of(router, "?lines=1000")
    accept = {"Accept": "text/event-stream"}
    path = LOGS + "?follow=1"
    with router.client(timeout=20) as client, client.stream("GET", path + "&lines=2", headers=accept) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        reader = EventReader(answer)
        events = [reader.next(), reader.next()]
        assert reader.retry == 2000
        assert [event.text for event in events] == whole[-2:]
        assert {event.name for event in events} == {"message"}
        assert [event.number for event in events] == [len(whole) - 1, len(whole)]
    router.post("/v1/models/eject", {"model": "qwen"})
    resumed = {**accept, "Last-Event-ID": events[0].id}
    with router.client(timeout=20) as client, client.stream("GET", path, headers=resumed) as answer:
        reader = EventReader(answer)
        assert reader.next() == events[1]
        rest = reader.until(lambda event: event.text.startswith("---"))
    assert rest[-1].text == "--- incarnation 1: stopped, exit status 0 ---"
    assert rest[0].number == events[1].number + 1


def test_a_slow_follower_is_told_what_it_missed(start_router: StartRouter) -> None:
    """llama-server is not held up by who does not read."""
    router = start_router(qwen=["--fake-flood-log", "20000000"])
    with router.connect() as connection:
        connection.sendall(f"GET {LOGS}?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert router.post("/v1/models/load", {"model": "qwen"}).status_code == 200
        router.terminate()
        data = b""
        connection.settimeout(10)
        while piece := connection.recv(1 << 20):
            data += piece
    assert router.wait() == 0
    assert b" lines missed ---" in data
