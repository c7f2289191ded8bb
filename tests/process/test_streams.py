"""The streams of a running router: what comes, in which order, and that nothing of them stays."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartRouter
from tests.harness.events import EventReader, ServerEvent
from tests.harness.processes import wait_until
from tests.harness.record import Record
from tests.harness.router import RouterProcess

pytestmark = pytest.mark.process

STATUS = "/v1/models/status/stream"


@contextlib.contextmanager
def following(
    router: RouterProcess, path: str = STATUS, headers: dict[str, str] | None = None
) -> Iterator[EventReader]:
    with router.client(timeout=20.0) as client, client.stream("GET", path, headers=headers or {}) as answer:
        assert answer.status_code == 200
        yield EventReader(answer)


def states(events: list[ServerEvent], alias: str) -> list[str]:
    """The states of one model, each once."""
    found: list[str] = []
    for event in events:
        if event.name == "model_update" and event.data["alias"] == alias and event.data["status"] not in found[-1:]:
            found.append(event.data["status"])
    return found


def open_sockets(router: RouterProcess) -> int:
    return len(list(Path(f"/proc/{router.pid}/fd").iterdir()))


def test_head_and_first_event(start_router: StartRouter) -> None:
    router = start_router(qwen=[], llama=[])
    with following(router) as reader:
        headers = reader.answer.headers
        assert headers["content-type"] == "text/event-stream"
        assert headers["cache-control"] == "no-cache"
        assert headers["x-accel-buffering"] == "no"
        first = reader.next()
        assert reader.retry == 2000
    assert first.name == "full_status"
    assert first.data["server"]["status"] == "ready"
    assert set(first.data["models"]) == {"qwen", "llama"}
    assert first.data["summary"] == {"total": 2, "off": 2}


def test_every_change_once_and_in_order(start_router: StartRouter) -> None:
    router = start_router(qwen=[], llama=[])
    with following(router) as reader:
        reader.next()
        router.post("/v1/models/load", {"model": "qwen"})
        router.post("/v1/models/eject", {"model": "qwen"})
        events = reader.until(lambda event: event.name == "model_update" and event.data["status"] == "off")
    assert states(events, "qwen") == ["starting", "loading", "ready", "stopping", "off"]
    numbers = [event.number for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert {event.id.rpartition("-")[0] for event in events} == {reader.events[0].id.rpartition("-")[0]}
    ready = next(event.data for event in events if event.data["status"] == "ready")
    assert ready["load_progress"] == 100
    assert ready["pid"] is not None
    assert ready["load_duration_sec"] > 0


def test_resumes_after_the_last_event_it_has(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    with following(router) as reader:
        reader.next()
        router.post("/v1/models/load", {"model": "qwen"})
        seen = reader.until(lambda event: event.data.get("status") == "loading")
    router.post("/v1/models/eject", {"model": "qwen"})
    with following(router, headers={"Last-Event-ID": seen[-1].id}) as reader:
        rest = reader.until(lambda event: event.data.get("status") == "off")
    assert reader.retry == 2000
    assert rest[0].number == seen[-1].number + 1
    assert [event.name for event in rest] == ["model_update"] * len(rest)
    assert states(seen + rest, "qwen") == ["starting", "loading", "ready", "stopping", "off"]


@pytest.mark.parametrize("sent", ["deadbeef-0", "7", "-", "x" * 500, "deadbeef-99999999999999999999"])
def test_an_id_of_another_run_begins_anew(start_shared_router: StartRouter, sent: str) -> None:
    router = start_shared_router(qwen=[])
    with following(router, headers={"Last-Event-ID": sent}) as reader:
        assert reader.next().name == "full_status"


def test_an_id_from_the_future_begins_anew(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    with following(router) as reader:
        boot = reader.next().id.rpartition("-")[0]
    with following(router, headers={"Last-Event-ID": f"{boot}-999"}) as reader:
        assert reader.next().name == "full_status"


def test_counts_are_shown_but_not_each(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=[*record.flags, "-np", "2"])
    router.post("/v1/models/load", {"model": "qwen"})
    with following(router) as reader:
        reader.next()
        waiting = [router.in_background("qwen", fake={"hold_until": str(gate)}) for _ in range(6)]
        reader.until(lambda event: event.data.get("queued") == 4 and event.data.get("active") == 2)
        gate.touch()
        reader.until(lambda event: event.data.get("queued") == 0 and event.data.get("active") == 0)
        began = time.monotonic()
        before = len(reader.events)
        for _ in range(100):
            assert router.chat("qwen").status_code == 200
        took = time.monotonic() - began
        reader.until(lambda event: event.data.get("queued") == 0 and event.data.get("active") == 0)
    assert len(reader.events) - before <= 3 + took / 0.5
    assert all(one.answer().status_code == 200 for one in waiting)


def test_a_crash_is_seen_by_all(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-exit-after-ready", "0.3"])
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(following(router)) for _ in range(20)]
        router.post("/v1/models/load", {"model": "qwen"})
        told = [reader.until(lambda event: event.data.get("status") == "crashed") for reader in readers]
    assert all("exit status 1" in events[-1].data["error_message"] for events in told)
    assert len({tuple(event.id for event in events if event.name == "model_update") for events in told}) == 1


def test_drain_says_so_and_ends_the_stream(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=record.flags)
    running = router.in_background("qwen", fake={"hold_until": str(gate)})
    record.wait_for("started")
    with following(router) as status, following(router, "/metrics/stream") as metrics:
        status.next()
        router.terminate()
        events = status.rest()  # the stream ends by itself, with its last chunk
        metrics.rest()
        assert (events[-1].name, events[-1].data["status"]) == ("server_update", "draining")
        assert router.is_running()
        # who connects again while we drain is told, and let go
        with following(router, headers={"Last-Event-ID": events[-1].id}) as again:
            again.rest()
        with following(router) as again:
            assert again.rest()[0].data["server"]["status"] == "draining"
    gate.touch()
    assert running.answer().status_code == 200
    assert router.wait() == 0


def test_open_streams_do_not_delay_the_end(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    with contextlib.ExitStack() as stack:
        for path in (STATUS, "/metrics/stream", "/v1/models/qwen/logs?follow=1"):
            for _ in range(10):
                connection = stack.enter_context(router.connect())  # reads nothing, never
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_until(lambda: open_sockets(router) > 30)
        began = time.monotonic()
        router.terminate()
        assert router.wait() == 0
        assert time.monotonic() - began < 2.0


def test_clients_that_leave_leave_nothing(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    with following(router) as reader:
        reader.next()
    before = open_sockets(router)
    for path in (STATUS, "/metrics/stream", "/v1/models/qwen/logs?follow=1"):
        for _ in range(20):
            with router.connect() as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                connection.recv(100)
    wait_until(lambda: open_sockets(router) <= before)
    with following(router) as reader:
        reader.next()
        heartbeat = reader.until(lambda event: event.name == "heartbeat")[-1]
    assert heartbeat.data["readers"] == 1


def test_three_hundred_readers_see_the_same(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    answers: list[bytes] = [b""] * 300

    def drain(number: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                answers[number] += piece

    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(router.connect()) for _ in answers]
        for connection in connections:
            connection.sendall(f"GET {STATUS} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        threads = [threading.Thread(target=drain, args=pair) for pair in enumerate(connections)]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(b"full_status" in answer for answer in answers), timeout_seconds=20)
        for _ in range(3):
            router.post("/v1/models/load", {"model": "qwen"})
            router.post("/v1/models/eject", {"model": "qwen"})
        wait_until(lambda: all(answer.count(b'"status": "off"') >= 4 for answer in answers), timeout_seconds=20)
        router.terminate()
        for thread in threads:
            thread.join(20)
    assert router.wait() == 0
    # the first piece may differ, in its uptime; chunks may be cut differently
    told = {
        tuple(line for line in answer.split(b"\n") if b"model_update" in line or line.startswith(b"id: "))
        for answer in answers
    }
    assert len(told) == 1


def test_metrics(start_router: StartRouter) -> None:
    router = start_router(qwen=[], llama=[])
    with following(router, "/metrics/stream") as reader:
        first = reader.next()
        assert router.chat("qwen").status_code == 200
        began = time.monotonic()
        events = [reader.next() for _ in range(3)]
        took = time.monotonic() - began
    assert [event.name for event in [first, *events]] == ["metrics"] * 4
    assert 3.5 < took < 7.0
    assert first.data["server"]["status"] == "ready"
    models: dict[str, Any] = {model["alias"]: model for model in events[-1].data["models"]}
    assert set(models) == {"qwen", "llama"}
    assert (models["qwen"]["status"], models["qwen"]["requests_1m"]) == ("ready", 1)
    assert events[-1].data["totals"]["requests_1m"] == 1
    assert set(first.data["gpu"]) == {
        "vram_total_mb",
        "vram_used_mb",
        "vram_free_mb",
        "vram_used_percent",
        "utilization_percent",
    }


def test_head_of_a_stream(start_shared_router: StartRouter) -> None:
    router = start_shared_router(qwen=[])
    with router.client() as client:
        for path in (STATUS, "/metrics/stream", "/v1/models/qwen/logs?follow=1"):
            answer = client.head(path)  # the connection is used again: nothing follows
            assert answer.status_code == 200
            assert answer.headers["cache-control"] == "no-cache"
