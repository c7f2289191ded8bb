"""A client that leaves frees what it held, at each stage at which it can leave."""

import json
import socket
import time

import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.record import Record
from tests.harness.router import chat_body

pytestmark = pytest.mark.process


def body(model: str = "qwen", **fake: object) -> bytes:
    stream = bool(fake.pop("stream", False))
    return json.dumps(chat_body(model, stream=stream, fake=fake)).encode()


@pytest.mark.parametrize("by_quart", [False, True])
def test_while_queued(start_router: StartRouter, record: Record, *, by_quart: bool) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=record.flags)
    running = router.in_background("qwen", fake={"hold_until": str(gate)})
    router.wait_for_status("qwen", active=1)
    with router.start_raw(body(tag="gone"), by_quart=by_quart):
        router.wait_for_status("qwen", queued=1)
    router.wait_for_status("qwen", queued=0)
    gate.touch()
    assert running.answer().status_code == 200
    assert router.chat("qwen", fake={"tag": "after"}).status_code == 200
    assert "gone" not in record.tags("received")


@pytest.mark.parametrize("by_quart", [False, True])
def test_while_loading(start_router: StartRouter, record: Record, *, by_quart: bool) -> None:
    """A load that nobody waits for any more is cancelled."""
    router = start_router(qwen=["--fake-never-ready", *record.flags])
    with router.start_raw(body(), by_quart=by_quart):
        record.wait_for("spawned")
    wait_until(lambda: not router.children())
    router.wait_for_status("qwen", status="off", queued=0)


def test_while_loading_somebody_else_waits(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=["--fake-load-until", str(gate), *record.flags])
    with router.start_raw(body(tag="gone")):
        router.wait_for_status("qwen", queued=1)
        staying = router.in_background("qwen", fake={"tag": "stays"})
        router.wait_for_status("qwen", queued=2)
    router.wait_for_status("qwen", queued=1)
    gate.touch()
    assert staying.answer().status_code == 200
    assert record.tags("received") == ["stays"]
    assert len(record.lines("spawned")) == 1


@pytest.mark.parametrize("by_quart", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_while_waiting_for_headers(start_router: StartRouter, record: Record, *, stream: bool, by_quart: bool) -> None:
    router = start_router(qwen=record.flags)
    with router.start_raw(body(headers_seconds=3600, tag="gone", stream=stream), by_quart=by_quart):
        record.wait_for("started", tag="gone")
    record.wait_for("cancelled", tag="gone")
    router.wait_for_status("qwen", active=0)
    assert router.chat("qwen").status_code == 200


@pytest.mark.parametrize("by_quart", [False, True])
def test_while_the_first_event_is_awaited(start_router: StartRouter, record: Record, *, by_quart: bool) -> None:
    router = start_router(qwen=record.flags)
    with router.start_raw(body(stall=True, tag="gone", stream=True), by_quart=by_quart):
        record.wait_for("started", tag="gone")
        time.sleep(0.1)
    record.wait_for("cancelled", tag="gone")
    router.wait_for_status("qwen", active=0)


@pytest.mark.parametrize("by_quart", [False, True])
def test_while_streaming(start_router: StartRouter, record: Record, *, by_quart: bool) -> None:
    router = start_router(qwen=record.flags)
    for tag in ("a", "b", "c"):
        generation = body(tokens=10_000, token_seconds=0.01, tag=tag, stream=True)
        with router.start_raw(generation, by_quart=by_quart) as connection:
            assert b"200" in connection.recv(100)
            left = time.monotonic()
        (line,) = record.wait_for("cancelled", tag=tag)
        assert line["time"] - left < 0.5
    router.wait_for_status("qwen", active=0)
    assert router.chat("qwen").status_code == 200
    assert len(record.lines("spawned")) == 1


@pytest.mark.parametrize("by_quart", [False, True])
def test_with_another_request_in_the_pipe(start_router: StartRouter, record: Record, *, by_quart: bool) -> None:
    """What stands unread before the end of the stream hides nothing."""
    router = start_router(qwen=record.flags)
    generation = body(tokens=10_000, token_seconds=0.01, tag="piped", stream=True)
    with router.start_raw(generation, by_quart=by_quart) as connection:
        connection.recv(100)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    record.wait_for("cancelled", tag="piped")


@pytest.mark.parametrize("by_quart", [False, True])
def test_half_closing_is_leaving(start_router: StartRouter, record: Record, *, by_quart: bool) -> None:
    router = start_router(qwen=record.flags)
    generation = body(tokens=10_000, token_seconds=0.01, tag="half", stream=True)
    with router.start_raw(generation, by_quart=by_quart) as connection:
        connection.recv(100)
        connection.shutdown(socket.SHUT_WR)
        record.wait_for("cancelled", tag="half")


@pytest.mark.parametrize("by_quart", [False, True])
def test_many_leave_at_every_stage(start_router: StartRouter, record: Record, *, by_quart: bool) -> None:
    """Afterwards all slots are there, and nothing waits."""
    router = start_router(qwen=["-np", "4", "--fake-load-seconds", "0.2", *record.flags])
    for delay in (0.0, 0.05, 0.25, 0.0, 0.01, 0.02, 0.05):
        connections = [
            router.start_raw(body(tokens=50, token_seconds=0.005, stream=number % 2 == 0), by_quart=by_quart)
            for number in range(12)
        ]
        time.sleep(delay)
        for connection in connections:
            connection.close()
    router.wait_for_status("qwen", active=0, queued=0)
    pending = [router.in_background("qwen") for _ in range(8)]
    assert {each.answer().status_code for each in pending} == {200}
    assert record.most_at_once() <= 4


def test_a_load_command_that_is_abandoned(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=["--fake-never-ready", *record.flags])
    with router.start_raw(b'{"model":"qwen"}', path="/v1/models/load"):
        record.wait_for("spawned")
    wait_until(lambda: not router.children())
