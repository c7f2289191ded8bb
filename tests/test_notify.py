"""What systemd is told, over real datagram sockets."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conftest import StartRouter
from trio_router.notify import Notifier, sentence
from trio_router.telemetry.events import ModelChanged, ServerChanged
from trio_router.telemetry.facts import FleetFacts, ModelFacts


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(5)
        yield sock


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with listening(str(tmp_path / "notify")) as sock:
        yield sock


def told(sock: socket.socket) -> list[str]:
    """The messages that are there."""
    sock.setblocking(False)
    found = []
    while True:
        try:
            found.append(sock.recv(4096).decode())
        except BlockingIOError:
            return found


def model(**facts: Any) -> ModelFacts:
    default = {
        "alias": "qwen", "state": "ready", "slots_busy": 1, "slots_idle": 3, "waiting": 2,
        "waiting_by_priority": {}, "device_bytes": {}, "reserved_bytes": {}, "vram_bytes": 0,
    }  # fmt: skip
    return ModelFacts(**{**default, **facts})


def fleet(*models: ModelFacts, phase: str = "ready") -> FleetFacts:
    return FleetFacts(phase=phase, uptime_seconds=0, states=(), models=models)


def test_sentence() -> None:
    two = (model(), model(state="off", slots_busy=0, waiting=0))
    assert sentence(fleet(*two)) == "ready: 1 of 2 models loaded, 1 requests running, 2 waiting"
    assert sentence(fleet(*two, model(state="failed"))) == (
        "ready: 1 of 3 models loaded, 1 failed, 2 requests running, 4 waiting"
    )


def test_variables_are_taken_out_of_the_environment() -> None:
    environ = {
        "NOTIFY_SOCKET": "/run/notify",
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": str(os.getpid()),
        "PATH": "/bin",
    }
    notifier = Notifier.of(environ)
    assert (notifier.address, notifier.watchdog_seconds) == ("/run/notify", 30.0)
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize(
    "variables",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}],
    ids=str,
)
def test_no_watchdog(variables: dict[str, str]) -> None:
    assert Notifier.of({"NOTIFY_SOCKET": "/run/notify", **variables}).watchdog_seconds is None


async def test_nothing_without_the_variable(autojump_clock: trio.testing.MockClock) -> None:
    notifier = Notifier.of({})
    notifier(ServerChanged(status="ready"))
    with trio.move_on_after(100) as scope:
        await notifier.run(fleet)
    assert scope.cancelled_caught


def test_events(systemd: socket.socket) -> None:
    notifier = Notifier(address=systemd.getsockname())
    for event in (ServerChanged(status="starting"), ModelChanged(alias="qwen")):
        notifier(event)
    assert told(systemd) == []
    notifier(ServerChanged(status="ready"))
    notifier(ServerChanged(status="draining"))
    assert told(systemd) == ["READY=1", "STOPPING=1"]


async def test_watchdog_at_half_the_interval(systemd: socket.socket, autojump_clock: trio.testing.MockClock) -> None:
    notifier = Notifier(address=systemd.getsockname(), watchdog_seconds=4.0)
    with trio.move_on_after(9):
        await notifier.run(lambda: fleet(phase="ready" if trio.current_time() < 5 else "draining"))
    assert told(systemd) == [
        "STATUS=ready: 0 of 0 models loaded, 0 requests running, 0 waiting",
        *["WATCHDOG=1"] * 3,
        "STATUS=draining: 0 of 0 models loaded, 0 requests running, 0 waiting",
        *["WATCHDOG=1"] * 2,
    ]


async def test_status_without_watchdog(systemd: socket.socket, autojump_clock: trio.testing.MockClock) -> None:
    notifier = Notifier(address=systemd.getsockname())
    with trio.move_on_after(60):
        await notifier.run(fleet)
    assert told(systemd) == ["STATUS=ready: 0 of 0 models loaded, 0 requests running, 0 waiting"]


def test_what_a_full_socket_had_no_room_for_comes_later(systemd: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                other.sendto(b"noise", systemd.getsockname())
    notifier = Notifier(address=systemd.getsockname())
    notifier(ServerChanged(status="ready"))
    assert "READY=1" not in told(systemd)
    notifier(ServerChanged(status="draining"))
    assert told(systemd) == ["READY=1\nSTOPPING=1"]


def test_a_socket_that_is_gone_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notifier = Notifier(address=str(tmp_path / "nobody"))
    notifier(ServerChanged(status="ready"))
    notifier(ServerChanged(status="draining"))
    said = capsys.readouterr()
    assert (said.out + said.err).count("systemd cannot be told") == 1


@pytest.mark.process
@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_a_router_under_systemd(start_router: StartRouter, tmp_path: Path, abstract: bool) -> None:
    name = f"trio-router-{os.getpid()}-{time.monotonic_ns()}" if abstract else str(tmp_path / "notify")
    with listening("\0" + name if abstract else name) as systemd:
        variables = {"NOTIFY_SOCKET": "@" + name if abstract else name, "WATCHDOG_USEC": "400000"}
        router = start_router(qwen=[], environment=variables)
        first = [systemd.recv(4096).decode() for _ in range(3)]
        assert "READY=1" in first
        assert first[0].startswith("STATUS=starting: 0 of 1 models loaded")
        assert router.chat("qwen").status_code == 200
        (server,) = router.servers()
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{server}/environ").read_bytes()
        assert b"WATCHDOG" not in Path(f"/proc/{server}/environ").read_bytes()

        messages = first
        while messages[-1] != "STATUS=ready: 1 of 1 models loaded, 0 requests running, 0 waiting":
            messages.append(systemd.recv(4096).decode())
        start = time.monotonic()
        assert [systemd.recv(4096).decode() for _ in range(5)] == ["WATCHDOG=1"] * 5
        assert time.monotonic() - start < 2.0  # they are 0.2 s apart

        router.terminate()
        assert router.wait() == 0
        assert "STOPPING=1" in told(systemd)
