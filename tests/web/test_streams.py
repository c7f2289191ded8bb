"""The streams on a registry that runs, in virtual time."""

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import attrs
import trio

from tests.fleet.conftest import _quiet as quiet  # noqa: F401  (a fixture)
from tests.fleet.fake_servers import FakeServers
from tests.fleet.fleet import Fleet, running
from trio_router.errors import ShuttingDown
from trio_router.web.llama_router import ModelEvents
from trio_router.web.sse import Reader
from trio_router.web.streams import COUNTS_SECONDS, METRICS_SECONDS, Streams


@attrs.define(eq=False)
class Watcher:
    """Reads one stream into a record."""

    reader: Reader
    events: list[tuple[float, int, str, Any]] = attrs.field(factory=list)
    """When it came, its number, its name, its data."""
    ended: bool = False

    async def run(self) -> None:
        while piece := await self.reader.receive():
            for block in piece.decode().split("\n\n")[:-1]:
                fields = dict(line.split(": ", 1) for line in block.split("\n"))
                if "id" in fields:
                    number = int(fields["id"].rpartition("-")[2])
                    self.events.append((trio.current_time(), number, fields["event"], json.loads(fields["data"])))
        self.ended = True

    def updates(self) -> list[tuple[float, Any]]:
        """Each `model_update`: the time, and its data."""
        return [(at, data) for at, _, name, data in self.events if name == "model_update"]

    def names(self) -> list[str]:
        return [event[2] for event in self.events]


@attrs.define(eq=False)
class Watched:
    """A fleet with streams."""

    fleet: Fleet
    streams: Streams
    llama_router: ModelEvents
    nursery: trio.Nursery
    stack: ExitStack
    measured: list[float]

    def watch(self, hub: str = "status", last: str | None = None) -> Watcher:
        watcher = Watcher(self.stack.enter_context(getattr(self.streams, hub).reader(last)))
        self.nursery.start_soon(watcher.run)
        return watcher


@asynccontextmanager
async def watched(**models: int) -> AsyncIterator[Watched]:
    measured: list[float] = []

    def measure() -> dict[str, Any]:
        measured.append(trio.current_time())
        return {"measured": len(measured)}

    with ExitStack() as stack:
        async with running(FakeServers(), models or {"a": 1}) as fleet, trio.open_nursery() as nursery:
            streams = Streams.of(fleet.registry, fleet.registry.events, measure)
            llama_router = ModelEvents.of(fleet.registry, fleet.registry.events)
            await nursery.start(streams.run)
            yield Watched(fleet, streams, llama_router, nursery, stack, measured)
            nursery.cancel_scope.cancel()
    assert streams.status.statistics().readers == 0
    assert streams.metrics.statistics().readers == 0


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_a_life_of_a_model(autojump_clock: trio.testing.MockClock) -> None:
    async with watched(a=1, b=1) as here:
        watcher = here.watch()
        await here.fleet.load("a")
        await here.fleet.eject("a")
        await settle()
    _, number, name, data = watcher.events[0]
    assert (number, name, set(data["models"])) == (0, "full_status", {"a", "b"})
    changes = [data["status"] for _, _, name, data in watcher.events if name == "model_update"]
    assert [state for at, state in enumerate(changes) if changes[at - 1 : at] != [state]] == [
        "starting",
        "loading",
        "ready",
        "stopping",
        "off",
    ]
    assert [event[1] for event in watcher.events] == list(range(len(watcher.events)))
    assert all(data["alias"] == "a" for _, _, name, data in watcher.events[1:])


async def test_how_far_a_load_is(autojump_clock: trio.testing.MockClock) -> None:
    """By the time it took last; also for who knows llama-server's router only."""
    async with watched() as here:
        here.fleet.servers.plan("a").load_seconds = 10
        await here.fleet.load("a")
        await here.fleet.eject("a")
        watcher = here.watch()
        theirs = Watcher(here.stack.enter_context(here.llama_router.hub.reader(None)))
        here.nursery.start_soon(theirs.run)
        await here.fleet.load("a")
        await settle()
    told = [data["load_progress"] for _, data in watcher.updates() if data["status"] == "loading"]
    percents = [percent for percent in told if percent is not None]
    assert len(set(percents)) >= 8
    assert percents == sorted(percents)
    assert watcher.updates()[-1][1]["load_progress"] == 100
    done = [data["data"].get("progress", {}).get("value") for _, _, _, data in theirs.events[1:-1]]
    assert len(set(done)) >= 8
    assert done == sorted(done)
    assert theirs.events[-1][3]["data"]["status"] == "loaded"


async def test_an_event_is_what_was_true_then(autojump_clock: trio.testing.MockClock) -> None:
    """Two changes without a checkpoint between them are two events."""
    async with watched() as here:
        here.fleet.registry.enter("ready")
        watcher = here.watch()
        await settle()
        here.fleet.registry.enter("starting")
        here.fleet.registry.enter("ready")
        await settle()
    assert [data["status"] for _, _, name, data in watcher.events if name == "server_update"] == ["starting", "ready"]


async def test_counts_are_coalesced_and_the_last_is_told(autojump_clock: trio.testing.MockClock) -> None:
    async with watched(a=2) as here:
        await here.fleet.load("a")
        watcher = here.watch()
        await trio.sleep(10)
        watcher.events.clear()
        began = trio.current_time()
        for _ in range(100):  # a hundred requests, each of 0.03 s
            lease = await here.fleet.lease("a")
            await trio.sleep(0.03)
            lease.release()
        await trio.sleep(10)
        told = [at - began for at, _ in watcher.updates()]
        assert len(told) <= 3.0 / COUNTS_SECONDS + 2
        assert all(later - earlier > COUNTS_SECONDS - 0.01 for earlier, later in itertools.pairwise(told))
        assert watcher.updates()[-1][1]["active"] == 0
        assert told[-1] < 3.0 + COUNTS_SECONDS + 0.1


async def test_the_first_change_of_a_count_is_told_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with watched(a=1) as here:
        await here.fleet.load("a")
        watcher = here.watch()
        await trio.sleep(10)
        watcher.events.clear()
        began = trio.current_time()
        here.fleet.soon("a", 2.0)
        here.fleet.soon("a", 2.0)
        await trio.sleep(10)
        told = [(at - began, data["active"], data["queued"]) for at, data in watcher.updates()]
    assert told == [(0.0, 1, 1), (2.0, 1, 0), (4.0, 0, 0)]


async def test_counts_are_told_at_once_to_who_comes_back(autojump_clock: trio.testing.MockClock) -> None:
    """A page that is loaded anew."""
    async with watched(a=1) as here:
        await here.fleet.load("a")
        with here.streams.status.reader(None):
            await trio.sleep(1)
        watcher = here.watch()
        await trio.sleep(1)
        began = trio.current_time()
        here.fleet.soon("a", 2.0)
        await trio.sleep(1)
        told = [(at - began, data["active"]) for at, data in watcher.updates()]
    assert told == [(0.0, 1)]


async def test_states_are_never_coalesced_nor_reordered(autojump_clock: trio.testing.MockClock) -> None:
    async with watched(a=1) as here:
        watcher = here.watch()
        for _ in range(5):
            here.fleet.soon("a", 0.0)
            await trio.sleep(0.1)
            await here.fleet.load("a")
            await here.fleet.eject("a", force=True)
        await settle()
        states = ["off", *(data["status"] for _, data in watcher.updates())]
        changes = [state for at, state in enumerate(states) if states[at - 1 : at] != [state]]
    assert changes == ["off", *["starting", "loading", "ready", "stopping", "off"] * 5]


async def test_nothing_is_rendered_for_counts_while_nobody_watches(autojump_clock: trio.testing.MockClock) -> None:
    async with watched(a=1) as here:
        await here.fleet.load("a")
        watcher = here.watch()
        await trio.sleep(1)
        last = f"{here.streams.status.boot}-{watcher.events[-1][1]}"
        here.stack.close()  # everybody leaves
        lease = await here.fleet.lease("a")
        await trio.sleep(100)
        written = here.streams.status.statistics().written
        assert written <= watcher.events[-1][1] + 1
        again = here.watch(last=last)  # and is told what was left out
        await settle()
        assert again.names() == ["model_update"]
        assert again.events[0][3]["active"] == 1
        lease.release()


async def test_a_queue_that_is_refused_is_told(autojump_clock: trio.testing.MockClock) -> None:
    async with watched(a=1) as here:
        here.fleet.servers.plan("a").load_seconds = 200
        watcher = here.watch()
        for _ in range(3):
            here.fleet.soon("a")
        await trio.sleep(5)
        assert watcher.updates()[-1][1]["queued"] == 3
        here.fleet["a"].refused(ShuttingDown("the router is shutting down"))
        await trio.sleep(5)
        assert watcher.updates()[-1][1]["queued"] == 0


async def test_draining_is_told_and_ends_every_stream(autojump_clock: trio.testing.MockClock) -> None:
    async with watched(a=1) as here:
        status, metrics = here.watch(), here.watch("metrics")
        await trio.sleep(1)
        here.fleet.registry.enter("draining")
        await settle()
        assert status.ended
        assert metrics.ended
        assert (status.events[-1][2], status.events[-1][3]["status"]) == ("server_update", "draining")
        here.fleet.soon("a")
        again = here.watch(last=f"{here.streams.status.boot}-0")
        await settle()
        assert again.ended
        assert [event[2] for event in again.events] == [event[2] for event in status.events[1:]]


async def test_heartbeats(autojump_clock: trio.testing.MockClock) -> None:
    async with watched(a=1) as here:
        watcher = here.watch()
        began = trio.current_time()
        await trio.sleep(46)
        assert [(event[0] - began, event[2]) for event in watcher.events[1:]] == [
            (15.0, "heartbeat"),
            (30.0, "heartbeat"),
            (45.0, "heartbeat"),
        ]


async def test_metrics_are_measured_once_for_all(autojump_clock: trio.testing.MockClock) -> None:
    async with watched(a=1) as here:
        await trio.sleep(100)
        assert here.measured == []
        watchers = [here.watch("metrics") for _ in range(300)]
        await trio.sleep(10.5)
        assert len(here.measured) == 1 + int(10.5 // METRICS_SECONDS)
        late = here.watch("metrics")
        await settle()
        assert late.events[0][2] == "metrics"
        assert len(here.measured) == 1 + int(10.5 // METRICS_SECONDS)
        here.stack.close()
        await trio.sleep(100)
        assert len(here.measured) <= 2 + int(10.5 // METRICS_SECONDS)
    assert len({str(watcher.events) for watcher in watchers}) == 1
    assert watchers[0].names() == ["metrics"] * 6
