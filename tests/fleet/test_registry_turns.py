"""Turns as the registry takes them: one place, several models, time that is virtual."""

import pytest
import trio
from trio.testing import MockClock

from tests.fleet.fake_servers import FakeServers
from tests.fleet.fleet import HIGH, LOW, NORMAL, running
from trio_router.fleet.ticket import Priority


async def test_those_who_wait_and_those_who_come_are_served_in_a_turn(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers, max_concurrent_models=1, min_turn_sec=5, max_swap_wait_sec=20) as fleet:
        for _ in range(20):
            for alias in "ab":
                fleet.soon(alias, 0.25)
            await trio.sleep(0.5)
        await trio.sleep(20)
        assert len(fleet.of("runs")) == 40
        assert fleet.of("starting") == ["0 a starting", "6 b starting", "12 a starting"]


async def test_the_first_comes_first_without_a_turn(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, min_turn_sec=0) as fleet:
        for number, alias in enumerate("abab"):
            fleet.soon(alias, 1, name=f"r{number}")
            await trio.sleep(0.125)
        await trio.sleep(20)
        assert fleet.of("runs") == ["1 r0 runs", "3 r1 runs", "5 r2 runs", "7 r3 runs"]


async def test_an_idle_model_is_kept_for_a_moment(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, min_turn_sec=5) as fleet:
        await fleet.ask("a", 1)  # until 2
        fleet.soon("b", 1)
        await trio.sleep(0.25)
        await fleet.ask("a", 1)
        await trio.sleep(5)
        assert fleet.of("left:") == ["3.75 a left: evicted"]
        await trio.sleep(5)
        await fleet.ask("a", 1)
        assert fleet.of("left:")[1:] == ["13.25 b left: evicted"], "at once: its turn was long over"


@pytest.mark.parametrize("running_priority", [NORMAL, LOW])
async def test_high_ends_a_turn(running_priority, servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, min_turn_sec=100) as fleet:
        for _ in range(3):
            fleet.soon("a", 4, name="a", priority=running_priority)
        await trio.sleep(2)
        fleet.soon("b", 1, name="high", priority=HIGH)
        await trio.sleep(0.5)
        assert (fleet.states, fleet["a"].scheduler.paused) == ("ready off off", True)
        await trio.sleep(200)
        assert fleet.of("runs") == ["1 a runs", "6 high runs", "8.5 a runs", "12.5 a runs"]


async def test_high_ends_a_load(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").load_seconds = 50
    async with running(servers, max_concurrent_models=1) as fleet:
        fleet.soon("a", 1, name="low", priority=LOW)
        await trio.sleep(10)
        fleet.soon("b", 1, name="high", priority=HIGH)
        await trio.sleep(100)
        assert fleet.of("runs") == ["11 high runs", "62.5 low runs"]
        assert fleet["a"].supervisor.attempts == 0, "that is no failure"


async def test_low_that_has_waited_long_is_not_put_off_by_high(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").load_seconds = 8
    async with running(servers, max_concurrent_models=1, aging_sec=10) as fleet:
        fleet.soon("a", 1, name="low", priority=LOW)
        await trio.sleep(1)
        async with trio.open_nursery() as clients:

            async def ask_always() -> None:
                while True:
                    await fleet.ask("b", 0.5, priority=HIGH)
                    await trio.sleep(2)

            clients.start_soon(ask_always)
            await trio.sleep(60)
            clients.cancel_scope.cancel()
        print(fleet.record)
        (low,) = fleet.of("low")
        assert 20 <= float(low.split()[0]) <= 20 + 2 * 8 + 2


async def test_no_wait_for_a_turn_is_longer_than_the_bound(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(
        servers, {"a": 1, "b": 1}, max_concurrent_models=1, max_swap_wait_sec=10, max_queue_size_per_model=5000
    ) as fleet:
        for _ in range(100):
            fleet.soon("a", 1)  # there are always some who are older than whoever asks for b
        await trio.sleep(4.5)
        await fleet.ask("b", 1)
        assert trio.current_time() == 14.5 + 0.5 + 1 + 1, "the bound, what runs, the load, itself"


async def test_whoever_wanted_the_place_may_leave_while_it_is_made(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers, {"a": 2, "b": 1}, max_concurrent_models=1, min_turn_sec=1) as fleet:
        fleet.soon("a", 10)
        await trio.sleep(3)
        leaves = fleet.soon("b")
        await trio.sleep(1)
        fleet.soon("a", 1, name="second")
        await trio.sleep(1)
        assert fleet.of("second") == []
        assert fleet["a"].scheduler.statistics().free == 1
        leaves.cancel()
        await trio.sleep(20)
        assert fleet.of("second") == ["5 second runs"]
        assert fleet.states == "ready off"


async def test_two_models_with_work_share_the_time(servers: FakeServers, autojump_clock: MockClock) -> None:
    """More than can be served, for a long time: no thrash, and both come to their turns."""
    async with running(
        servers, {"a": 1, "b": 1}, max_concurrent_models=1, min_turn_sec=10, max_swap_wait_sec=10,
        queue_timeout_sec=100, max_queue_size_per_model=10_000,
    ) as fleet:  # fmt: skip
        for _ in range(600):
            for alias in "ab":
                fleet.soon(alias, 1)
            await trio.sleep(1)
        served = {alias: len(fleet.of(f"request-{alias}")) for alias in "ab"}
        assert abs(served["a"] - served["b"]) < 120
        assert 600 / 14 <= len(fleet.of("starting")) <= 600 / 10


async def test_one_slot_is_given_back_after_a_pause_that_follows_who_was_alone(autojump_clock: MockClock) -> None:
    async with running(FakeServers(), {"a": 1, "b": 1}, max_concurrent_models=1, min_turn_sec=1) as fleet:
        ticket = fleet.registry.ticket("a", Priority.NORMAL)
        ticket.alone = True
        lease = await fleet.registry.lease(ticket)
        await trio.sleep(0.1)
        lease.release()
        lease = await fleet.lease("a")
        heir = fleet.soon("b", 1)
        await trio.sleep(5)
        assert fleet["a"].scheduler.paused
        lease.release()
        heir.cancel()
        await trio.sleep(1)
        await fleet.ask("a", 1)
