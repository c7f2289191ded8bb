"""A plan is asked for, then done, and compared; everything in virtual time."""

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.fleet.fake_servers import FakeServers
from tests.fleet.fleet import HIGH, LOW, NORMAL, Fleet, running
from trio_router.errors import QueueFull, QueueTimeout
from trio_router.fleet.explain import Plan
from trio_router.fleet.ticket import Priority


@attrs.frozen
class Done:
    """What was planned, and what then happened."""

    plan: Plan
    waited: float
    left: list[str]


async def planned_and_done(fleet: Fleet, alias: str, priority: Priority = NORMAL) -> Done:
    ticket = fleet.registry.ticket(alias, priority)
    before = [*fleet.record]
    plan = fleet.registry.plan(ticket)
    assert fleet.record == before, "a plan touches nothing"
    began = trio.current_time()
    left = len(fleet.of("left:"))
    lease = await fleet.registry.lease(ticket)
    waited = trio.current_time() - began
    lease.release()
    return Done(plan, waited, [line.split()[1] for line in fleet.of("left:")[left:]])


def measured(fleet: Fleet, seconds: float) -> None:
    """As if many requests had held a slot for so long."""
    for model in fleet.registry.models.values():
        for _ in range(20):
            model.scheduler.pace.add(seconds, NORMAL.steps, trio.current_time())


async def test_it_runs_at_once(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        await fleet.ask("a", 1)
        done = await planned_and_done(fleet, "a")
        assert (done.plan.outcome, done.plan.queue_position, done.plan.wait_seconds, done.waited) == ("run", 0, 0, 0)


async def test_it_stands_in_a_queue(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        await fleet.registry.load("a")
        measured(fleet, 4.0)
        for _ in range(3):
            fleet.soon("a", 4)
        await wait_all_tasks_blocked()
        done = await planned_and_done(fleet, "a")
        assert (done.plan.outcome, done.plan.queue_position) == ("queue", 3)
        assert done.plan.wait_seconds == pytest.approx(done.waited, rel=0.01)
        high = fleet.registry.plan(fleet.registry.ticket("a", HIGH))
        assert high.queue_position == 0, "nobody waits any more"


async def test_there_is_room_for_it(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        await fleet.ask("b", 1)
        await fleet.eject("b")
        done = await planned_and_done(fleet, "b")
        assert (done.plan.outcome, done.plan.evicts, done.left) == ("load", (), [])
        assert done.plan.wait_seconds == done.waited == 1


async def test_it_is_being_loaded(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("b").load_seconds = 4
    async with running(servers) as fleet:
        await fleet.ask("b", 1)
        await fleet.eject("b")
        fleet.soon("b", 0)
        await trio.sleep(1)
        measured(fleet, 0.01)
        done = await planned_and_done(fleet, "b")
        assert done.plan.outcome == "load"
        assert done.plan.wait_seconds == pytest.approx(done.waited, abs=0.02)
        assert done.waited == 3


async def test_an_idle_one_leaves_for_it(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=2) as fleet:
        for alias in "abc":
            await fleet.ask(alias, 1)
        await trio.sleep(10)
        done = await planned_and_done(fleet, "a")
        assert (done.plan.outcome, done.plan.evicts, done.left) == ("load", ("b",), ["b"])
        assert done.plan.wait_seconds == done.waited == 1


@pytest.mark.parametrize("priority", [HIGH, NORMAL])
async def test_a_busy_one_leaves_for_it(priority: Priority, servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, min_turn_sec=20) as fleet:
        await fleet.ask("b", 1)
        await trio.sleep(50)
        await fleet.ask("a", 1)
        measured(fleet, 4.0)

        async def work() -> None:
            while True:
                await fleet.ask("a", 4)

        fleet.nursery.start_soon(work)
        await trio.sleep(3)
        done = await planned_and_done(fleet, "b", priority)
        assert done.plan.evicts == ("a",)
        assert done.left == ["a"]
        assert (done.plan.outcome, done.plan.place_seconds) == (("load", 0) if priority is HIGH else ("wait", 16))
        assert done.waited == pytest.approx(done.plan.wait_seconds, abs=4), "what runs then may run for up to 4 s"


async def test_when_it_cannot_be_said(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").load_seconds = 1000
    async with running(servers, max_concurrent_models=1, load_timeout_sec=2000) as fleet:
        fleet.soon("a")
        await wait_all_tasks_blocked()
        plan = fleet.registry.plan(fleet.registry.ticket("b", LOW))
        assert (plan.outcome, plan.evicts, plan.wait_seconds) == ("wait", (), None)


async def test_never(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("b").dies_with = 1
    async with running(servers, max_queue_size_per_model=0, max_load_attempts=1) as fleet:
        await fleet.ask("a", 0)
        fleet.soon("a", 10)
        await wait_all_tasks_blocked()
        plan = fleet.registry.plan(fleet.registry.ticket("a", NORMAL))
        assert (plan.outcome, plan.code) == ("never", "queue_full")
        with pytest.raises(QueueFull) as refused:
            await fleet.lease("a")
        assert refused.value.details["decision"] == plan.as_json()
        await fleet.ask("b")
        assert fleet.registry.plan(fleet.registry.ticket("b", NORMAL)).code == "model_failed"
        fleet.registry.enter("draining")
        assert fleet.registry.plan(fleet.registry.ticket("b", NORMAL)).code == "shutting_down"


async def test_an_error_says_why_it_waited(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, queue_timeout_sec=5, min_turn_sec=100) as fleet:
        fleet.soon("a", 50)
        await trio.sleep(2)
        with pytest.raises(QueueTimeout) as refused:
            await fleet.lease("b")
        decision = refused.value.details["decision"]
        assert (decision["outcome"], decision["evicts"]) == ("wait", ["a"])
        assert decision["place_in_ms"] == 25_000, "the bound comes before the end of its turn"
        assert decision["why"] == "model 'b' is loaded in the place of 'a', whose turn ends in 25.0 s"


async def test_decisions_are_kept(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1) as fleet:
        fleet.soon("a", 5)
        await trio.sleep(1.5)
        await fleet.ask("b", 1, priority=HIGH)
        told = [(each.outcome, each.model, each.evicts, each.priority) for each in fleet.registry.decisions]
        assert told == [
            ("start", "a", (), "normal"),
            ("yield", "b", ("a",), "high"),
            ("evict", "b", ("a",), "high"),
            ("start", "b", (), "high"),
        ]
        assert [each.as_json()["why"] for each in fleet.registry.decisions][1:3] == [
            "model 'a' makes room for 'b' when what runs on it is done",
            "model 'a' makes room for 'b'",
        ]
