import re
import time
from datetime import UTC, datetime

import pytest
import trio
from trio.testing import MockClock

from tests.fleet.fake_servers import NEVER, FakeServers
from tests.fleet.fleet import running
from trio_router.backend.lifecycle import State
from trio_router.fleet.status import LISTED, fleet_status, listed, server_status, status, timestamp
from trio_router.telemetry.events import Event


def test_timestamps_say_their_offset() -> None:
    assert timestamp(None) is None
    assert timestamp(0) == "1970-01-01T00:00:00.000+00:00"
    assert timestamp(1_700_000_000.1239) == "2023-11-14T22:13:20.123+00:00"


def test_every_state_has_llama_servers_word() -> None:
    assert set(LISTED) == set(State)
    assert set(LISTED.values()) == {"unloaded", "loading", "loaded", "failed"}


async def test_a_model_that_is_off(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, {"a": 2}) as fleet:
        found = status(fleet["a"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", found.pop("updated_at"))
        assert found == {
            "alias": "a",
            "status": "off",
            "port": None,
            "vram_mb": None,
            "vram_used_mb": None,
            "ram_mb": None,
            "reserved_mb": {},
            "adjusted": [],
            "pinned": False,
            "load_progress": None,
            "started_at": None,
            "last_used_at": None,
            "error_message": None,
            "pid": None,
            "incarnation": 0,
            "slots": 2,
            "active": 0,
            "queued": 0,
            "queued_by_priority": {"high": 0, "normal": 0, "low": 0},
            "n_ctx": None,
            "gpu_layers": None,
            "fitted": [],
            "vram_source": None,
            "load_duration_sec": None,
            "replicas": [],
        }
        entry = listed(fleet.registry, "a")
        assert abs(entry.pop("created") - datetime.now(UTC).timestamp()) < 60
        assert entry == {
            "id": "a",
            "object": "model",
            "owned_by": "user",
            "n_ctx": None,
            "status": {"value": "unloaded", "args": ["llama-server"]},
            "aliases": [],
            "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
            "path": "/models/a",
        }


async def test_a_model_that_works(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").context = 8192
    async with running(servers, {"a": 2}) as fleet:
        for _ in range(3):
            fleet.soon("a", 10)
        await trio.sleep(2)
        found = status(fleet["a"])
        assert (found["status"], found["load_progress"], found["pid"], found["port"]) == ("ready", 100, 1, 1)
        assert (found["slots"], found["active"], found["queued"]) == (2, 2, 1)
        assert (found["incarnation"], found["n_ctx"], found["load_duration_sec"]) == (1, 8192, 1)
        assert None not in (found["started_at"], found["last_used_at"])
        assert listed(fleet.registry, "a")["status"] == {"value": "loaded", "args": ["llama-server"]}
        assert listed(fleet.registry, "a")["n_ctx"] == 8192


async def test_a_model_that_left(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").context = 8192
    async with running(servers, {"a": 1}) as fleet:
        await fleet.ask("a")
        await fleet.eject("a")
        found = status(fleet["a"])
        assert (found["status"], found["load_progress"], found["pid"], found["port"]) == ("off", None, None, None)
        assert (found["started_at"], found["n_ctx"], found["incarnation"]) == (None, 8192, 1)
        assert found["last_used_at"] is not None
        assert found["error_message"] is None


@pytest.mark.parametrize(("state", "word"), [("loading", "loading"), ("crashed", "loading"), ("failed", "failed")])
async def test_a_model_that_is_not_ready(
    state: str, word: str, servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.plan("a").load_seconds = NEVER
    if state != "loading":
        servers.plan("a").refused = "there is no such file"
    async with running(servers, {"a": 1}, max_load_attempts=2 if state == "crashed" else 1) as fleet:
        fleet.soon("a")
        await trio.sleep(0.125)
        found = status(fleet["a"])
        assert (found["status"], listed(fleet.registry, "a")["status"]["value"]) == (state, word)
        assert found["error_message"] == (None if state == "loading" else "there is no such file")
        assert (found["started_at"] is None) == (state == "failed")
        assert found["queued"] == (0 if state == "failed" else 1)


async def test_it_is_started_anew_before_it_has_a_process(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        await fleet.load("a")
        before = status(fleet["a"])["started_at"]
        await fleet.eject("a")
        told: list[str] = []

        def hear(event: Event) -> None:
            if fleet["a"].state is State.STARTING:
                told.append(status(fleet["a"])["started_at"])

        time.sleep(0.002)  # noqa: ASYNC251  (of the wall clock, which virtual time does not move)
        fleet.registry.events.sinks.append(hear)
        await fleet.load("a")
        assert told[0] > before


async def test_the_whole_fleet(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("b").refused = "there is no such file"
    async with running(servers, max_load_attempts=1) as fleet:
        await fleet.ask("a")
        await fleet.ask("b")
        found = fleet_status(fleet.registry)
        assert found["summary"] == {"total": 3, "ready": 1, "failed": 1, "off": 1}
        assert list(found["models"]) == ["a", "b", "c"]
        assert found["models"]["a"] == status(fleet["a"])
        assert found["server"]["status"] == "starting"
        fleet.registry.enter("ready")
        found = server_status(fleet.registry)
        assert found["status"] == "ready"
        assert found["uptime_seconds"] >= 0
        assert found["started_at"] <= found["updated_at"]
