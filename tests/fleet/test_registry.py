from itertools import pairwise

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.fleet.chance import seed_trio
from tests.fleet.fake_backend import connect
from tests.fleet.fake_servers import NEVER, FakeServers
from tests.fleet.fleet import HIGH, LOW, registry_of, running
from trio_router.backend.lifecycle import State
from trio_router.backend.supervisor import MAX_CRASHES
from trio_router.errors import (
    LoadTimeout,
    ModelFailed,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
    UnknownModel,
)
from trio_router.fleet.scheduler import IDLE
from trio_router.telemetry.events import ServerChanged

COMPUTE = b'{"error":{"code":500,"message":"Compute error.","type":"server_error"}}'

# --- loading ------------------------------------------------------------------------------------------


async def test_a_model_is_loaded_when_somebody_asks(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        await trio.sleep(5)
        assert fleet.states == "off off off"
        await fleet.ask("b", 1)
        assert fleet.record == ["5 b starting", "5 b loading", "6 b ready", "6 request-b runs"]
        await fleet.ask("b", 1)
        assert fleet.record[4:] == ["7 request-b runs"]
        assert fleet["b"].supervisor.load_seconds == 1
        assert servers.launches == {"b": 1}


async def test_many_waiters_share_one_load(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, {"a": 2}) as fleet:
        fleet.nursery.start_soon(fleet.load, "a")
        for number in range(6):
            fleet.soon("a", 1, name=f"r{number}")
            await trio.sleep(0.125)
        await trio.sleep(10)
        assert servers.launches == {"a": 1}
        assert [line.split()[0] for line in fleet.of("runs")] == ["1", "1", "2", "2", "3", "3"]
        assert fleet.of("load-a") == ["1 load-a done"]


async def test_a_ticket_knows_when_it_got_a_slot(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        first, second = fleet.registry.ticket("a", LOW), fleet.registry.ticket("a", HIGH)
        for ticket in (first, second):
            (await fleet.registry.lease(ticket)).release()
        assert (first.granted_at, second.granted_at) == (1, 1)


async def test_priority_and_aging_are_those_of_the_configuration(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers, aging_sec=2.0, queue_timeout_sec=100.0) as fleet:
        await trio.sleep(1)
        low, high = fleet.registry.ticket("a", LOW), fleet.registry.ticket("a", HIGH)
        assert (low.key, high.key, high.arrived_at, high.deadline) == (5, 1, 1, 101)


@pytest.mark.parametrize("after_seconds", [0, 0.5])
async def test_a_load_nobody_waits_for_any_more_is_given_up(
    after_seconds: float, servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers) as fleet:
        first, second = fleet.soon("a", name="first"), fleet.soon("a", name="second")
        await wait_all_tasks_blocked()
        first.cancel()
        await trio.sleep(after_seconds)
        assert fleet.states == "loading off off", "the other still waits"
        second.cancel()
        await wait_all_tasks_blocked()
        assert fleet.record[-2:] == [f"{after_seconds:g} a off", f"{after_seconds:g} a left: abandoned"]
        assert servers.alive == {}
        assert fleet["a"].supervisor.attempts == 0, "giving up is no failure"


async def test_a_load_asked_for_by_name_goes_on_without_its_waiters(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers) as fleet:
        fleet.registry.load_soon("a")
        request = fleet.soon("a")
        await trio.sleep(0.5)
        request.cancel()
        await trio.sleep(5)
        assert fleet.states == "ready off off"


async def test_a_request_that_comes_while_its_model_is_given_up_has_it_loaded_again(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.plan("a").stop_seconds = 2
    async with running(servers) as fleet:
        fleet.soon("a", name="first").cancel()
        leaves = fleet.soon("a", name="second")
        await trio.sleep(0.5)
        leaves.cancel()
        await trio.sleep(0.5)
        assert fleet.states == "stopping off off"
        await fleet.ask("a", name="third")
        assert fleet.of("third", "a")[-6:] == [
            "2.5 a off",
            "2.5 a left: abandoned",
            "2.5 a starting",
            "2.5 a loading",
            "3.5 a ready",
            "3.5 third runs",
        ]


async def test_what_llama_server_says_of_its_context_is_kept(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").context = 4096
    async with running(servers) as fleet:
        await fleet.registry.load("a")
        await wait_all_tasks_blocked()
        assert fleet["a"].supervisor.context == 4096
        await fleet.registry.eject("a")
        assert fleet["a"].supervisor.context == 4096


# --- room ---------------------------------------------------------------------------------------------


async def test_one_at_a_time(servers: FakeServers, autojump_clock: MockClock) -> None:
    for alias in "abc":
        servers.plan(alias).stop_seconds = 0.5
    async with running(servers, max_concurrent_models=1) as fleet:
        async with trio.open_nursery() as requests:
            for alias in "abcab":
                requests.start_soon(fleet.ask, alias, 2)
                await trio.sleep(0.25)
        assert len(fleet.of("runs")) == 5
        assert servers.most_alive == 1
        assert servers.launches == {"a": 1, "b": 1, "c": 1}, "those who wait for the same are served together"


async def test_the_least_recently_used_makes_room(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, {"a": 1, "b": 1, "c": 1, "d": 1}, max_concurrent_models=3) as fleet:
        for alias in "abcab":  # c is the oldest now
            await fleet.ask(alias, 1)
        await fleet.ask("d", 1)
        assert fleet.states == "ready ready off ready"
        assert fleet.of("left:") == ["8 c left: evicted"]
        await fleet.ask("c", 1)
        assert fleet.states == "off ready ready ready"


async def test_last_used_is_when_it_became_idle_not_when_it_was_asked(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers, max_concurrent_models=2) as fleet:
        fleet.soon("a", 20)  # the first to be asked, the last to be used
        await fleet.ask("b", 5)
        await trio.sleep(20)
        await fleet.ask("c", 1)
        assert fleet.of("left:") == ["26 b left: evicted"]


async def test_a_busy_model_has_its_turn(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, min_turn_sec=11) as fleet:
        fleet.soon("a", 10, name="first")
        await trio.sleep(2)
        fleet.soon("b", 1, name="other")
        await trio.sleep(1)
        fleet.soon("a", 10, name="second")  # it came after `other`, but its model is there
        await trio.sleep(30)
        assert fleet.of("runs") == ["1 first runs", "11 second runs", "22 other runs"]
        assert fleet.of("left:") == ["21 a left: evicted"]


async def test_a_model_with_queued_requests_is_not_evicted(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1) as fleet:
        fleet.soon("a", 1, name="a1")
        await wait_all_tasks_blocked()
        fleet.soon("b", 1, name="b1")
        fleet.soon("a", 1, name="a2")
        fleet.soon("a", 1, name="a3")
        await trio.sleep(20)
        assert fleet.of("runs")[-1] == "5.5 b1 runs"
        assert fleet.of("left:") == ["4.5 a left: evicted"], "idle in its turn, it is kept for a moment"


async def test_room_is_given_in_the_order_of_the_first_waiters(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, {"a": 1, "b": 1, "c": 1, "d": 1}, max_concurrent_models=1) as fleet:
        fleet.soon("a", 5)
        await trio.sleep(2)
        fleet.soon("b", 1, priority=LOW)
        await trio.sleep(0.5)
        fleet.soon("c", 1)
        await trio.sleep(0.5)
        fleet.soon("d", 1, priority=HIGH)
        await trio.sleep(50)
        assert [line.split()[1] for line in fleet.of("runs")] == [f"request-{alias}" for alias in "adcb"]


async def test_whoever_waits_for_room_may_leave(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1) as fleet:
        fleet.soon("a", 10)
        await trio.sleep(2)
        leaves = fleet.soon("b")
        await trio.sleep(2)
        leaves.cancel()
        await trio.sleep(20)
        assert fleet.states == "ready off off", "nobody is evicted for nobody"


async def test_waiting_for_room_ends_at_the_queue_timeout(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, queue_timeout_sec=8) as fleet:
        fleet.soon("a", 20)
        await trio.sleep(2)
        await fleet.ask("b")
        assert fleet.record[-1] == "10 request-b queue_timeout"
        await trio.sleep(20)
        assert fleet.states == "ready off off"


async def test_a_model_that_was_loaded_by_name_and_not_used_makes_room(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    # b waits while a loads; that a is ready, and idle, has to be noticed though no request of a's ever ends
    async with running(servers, max_concurrent_models=1) as fleet:
        fleet.registry.load_soon("a")
        await trio.sleep(0.5)
        await fleet.ask("b")
        assert fleet.of("left:", "runs") == ["1 a left: evicted", "2 request-b runs"]


async def test_a_preloaded_model_makes_room_once_it_is_ready(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, preload_models=("a",)) as fleet:
        await trio.sleep(0.5)
        await fleet.ask("b")
        assert fleet.of("left:", "runs") == ["1 a left: evicted", "2 request-b runs"]


async def test_room_is_made_when_the_load_before_was_given_up(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").load_seconds = NEVER
    async with running(servers, max_concurrent_models=1) as fleet:
        first = fleet.soon("a")
        await trio.sleep(1)
        fleet.soon("b")
        await trio.sleep(1)
        first.cancel()
        await trio.sleep(5)
        assert fleet.of("left:", "runs") == ["2 a left: abandoned", "3 request-b runs"]


async def test_room_is_made_when_a_load_timed_out(servers: FakeServers, autojump_clock: MockClock) -> None:
    # with attempts left: those who waited were told, so nobody wants the next attempt
    servers.plan("a").load_seconds = NEVER
    async with running(servers, max_concurrent_models=1, load_timeout_sec=10) as fleet:
        fleet.soon("a")
        await trio.sleep(1)
        await fleet.ask("b")
        assert fleet.of("a", "runs")[-4:] == ["10 a stopping", "10 a off", "10 a left: abandoned", "11 request-b runs"]
        assert fleet.of("request-a") == ["10 request-a load_timeout"]


async def test_room_is_made_when_a_model_failed(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").dies_with = 1
    async with running(servers, max_concurrent_models=1, max_load_attempts=1) as fleet:
        fleet.soon("a")
        await wait_all_tasks_blocked()
        await fleet.ask("b")
        assert fleet.of("left:", "runs") == ["1 a left: failed", "2 request-b runs"]


async def test_room_is_made_by_a_model_that_crashed_and_is_idle(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers, max_concurrent_models=1) as fleet:
        await fleet.ask("a", 1)
        servers.plan("a").load_seconds = NEVER
        servers.alive["a"].die()
        await trio.sleep(1)
        assert fleet.states == "loading off off", "it is healed without anybody's wish"
        await fleet.ask("b", 1)
        assert fleet.of("left:", "runs")[-2:] == ["3 a left: evicted", "4 request-b runs"]


# --- idle timeout -----------------------------------------------------------------------------------------


async def test_an_idle_model_leaves_after_the_timeout(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, idle_timeout_sec=60) as fleet:
        await fleet.ask("a", 3)
        await trio.sleep(200)
        assert fleet.of("left:") == ["64 a left: idle"]


async def test_the_timeout_counts_from_the_end_of_the_last_request(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers, {"a": 2, "b": 1}, idle_timeout_sec=60) as fleet:
        fleet.soon("a", 100)
        await trio.sleep(90)
        await fleet.ask("a", 50)
        assert trio.current_time() == 140
        await trio.sleep(40)
        await fleet.ask("a", 1)
        await trio.sleep(200)
        assert fleet.of("left:") == ["241 a left: idle"]


@pytest.mark.parametrize("how", ["load", "load_soon", "preload"])
async def test_a_model_that_was_never_used_leaves_too(
    how: str, servers: FakeServers, autojump_clock: MockClock
) -> None:
    preload = ("a",) if how == "preload" else ()
    async with running(servers, idle_timeout_sec=60, preload_models=preload) as fleet:
        if how == "load":
            await fleet.registry.load("a")
        elif how == "load_soon":
            fleet.registry.load_soon("a")
        await trio.sleep(200)
        assert fleet.of("left:") == ["61 a left: idle"]


async def test_each_has_a_timeout_of_its_own(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, idle_timeout_sec=60) as fleet:
        await fleet.ask("a", 4)
        await fleet.ask("b", 4)
        await trio.sleep(35)
        await fleet.ask("a", 1)
        await trio.sleep(200)
        assert fleet.of("left:") == ["70 b left: idle", "106 a left: idle"]


async def test_a_model_that_healed_itself_leaves_too(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, idle_timeout_sec=60) as fleet:
        await fleet.ask("a", 1)
        await trio.sleep(10)
        servers.alive["a"].die()
        await trio.sleep(200)
        assert fleet.of("left:") == ["73 a left: idle"]


async def test_without_the_timeout_models_stay(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, enable_idle_timeout=False, idle_timeout_sec=60) as fleet:
        await fleet.ask("a", 1)
        await trio.sleep(80_000)
        assert fleet.states == "ready off off"


async def test_a_request_at_the_very_moment_of_the_timeout(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, idle_timeout_sec=60) as fleet:
        await fleet.registry.load("a")
        for _ in range(30):
            await trio.sleep(60)
            await fleet.ask("a", 0)
        assert len(fleet.of("runs")) == 30


# --- preload -------------------------------------------------------------------------------------------------


async def test_preloading_is_parallel_up_to_the_limit(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(
        servers, {"a": 1, "b": 1, "c": 1, "d": 1}, max_concurrent_models=2, preload_models=("d", "b", "c")
    ) as fleet:
        await trio.sleep(100)
        assert fleet.states == "off ready ready off", "in the order of the file"
        assert set(fleet.of("ready")) == {"1 b ready", "1 c ready"}
        assert fleet.of("left:") == [], "and none for another"


async def test_a_preload_takes_the_place_that_one_leaves(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, preload_models=("a", "b"), idle_timeout_sec=60) as fleet:
        await trio.sleep(100)
        assert fleet.of("left:", "ready") == ["1 a ready", "61 a left: idle", "62 b ready"]
        await trio.sleep(100)
        assert fleet.states == "off off off", "preloaded once, not for ever"


async def test_requests_come_before_preloads(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, preload_models=("a", "b")) as fleet:
        await trio.sleep(0.5)
        await fleet.ask("c", 1)
        assert fleet.of("ready") == ["1 a ready", "2 c ready"]


async def test_an_eject_takes_a_model_off_the_preload_list(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1, preload_models=("a", "b")) as fleet:
        await trio.sleep(5)
        await fleet.eject("b")
        await fleet.eject("a")
        await trio.sleep(100)
        assert fleet.states == "off off off"


async def test_a_preload_that_fails_is_failed_and_makes_room(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").dies_with = 1
    async with running(servers, max_concurrent_models=1, max_load_attempts=2, preload_models=("a", "b")) as fleet:
        await trio.sleep(100)
        assert fleet.states == "failed ready off"
        assert not fleet["a"].preload


# --- failing -----------------------------------------------------------------------------------------------


async def test_a_load_is_tried_again_with_growing_pauses(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").dies_with = 1
    servers.jitter = 1.2
    async with running(servers, max_load_attempts=10, queue_timeout_sec=1000) as fleet:
        await fleet.ask("a")
        spawned = [float(line.split()[0]) for line in fleet.of("starting")]
        pauses = [round(later - earlier - 1, 6) for earlier, later in pairwise(spawned)]
        assert pauses == [round(1.2 * pause, 6) for pause in [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]]
        assert set(servers.jitters) == {(0.8, 1.2)}
        assert fleet.states == "failed off off"
        assert servers.launches["a"] == 10


async def test_waiters_wait_through_failed_attempts(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").dies_with = 1
    async with running(servers) as fleet:
        fleet.soon("a")
        fleet.nursery.start_soon(fleet.load, "a")
        await trio.sleep(1.125)
        assert fleet.states == "crashed off off"
        servers.plan("a").dies_with = None
        await trio.sleep(5)
        assert set(fleet.of("runs", "load-a")) == {"2.25 request-a runs", "2.25 load-a done"}
        assert fleet["a"].supervisor.attempts == 0


async def test_a_model_is_failed_after_its_attempts(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").dies_with = 1
    servers.plan("a").words = "error: unknown argument: --oops"
    async with running(servers, max_load_attempts=3) as fleet:
        fleet.nursery.start_soon(fleet.load, "a")
        with pytest.raises(ModelFailed) as caught:
            await fleet.lease("a")
        assert trio.current_time() == 3.75
        assert fleet.states == "failed off off"
        error = caught.value
        assert error.message == (
            "model 'a' failed and is tried again in 300 s, or when it is reset (POST /v1/models/a/reset): "
            "llama-server ended before it was ready with exit status 1; its last words:\n"
            "error: unknown argument: --oops"
        )
        assert (error.status, error.details) == (503, {"model": "a", "attempts": 3})
        assert error.headers == [("x-should-retry", "false"), ("Retry-After", "120")]  # 300, but clients go by no more
        await wait_all_tasks_blocked()
        assert fleet.of("left:", "load-a") == ["3.75 a left: failed", "3.75 load-a model_failed"]


async def test_a_failed_model_refuses_at_once(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").refused = "there is no such file"
    async with running(servers, max_load_attempts=1, failed_retry_sec=10_000) as fleet:
        early = fleet.registry.ticket("a", LOW)
        await fleet.ask("a")
        for refused in [
            lambda: fleet.registry.lease(early),
            lambda: fleet.lease("a"),
            lambda: fleet.registry.load("a"),
        ]:
            with pytest.raises(ModelFailed, match="there is no such file"):
                await refused()
        with pytest.raises(ModelFailed):
            fleet.registry.load_soon("a")
        assert await fleet.registry.eject("a") is False
        assert trio.current_time() == 0
        await trio.sleep(1000)
        assert servers.launches["a"] == 1


async def test_reset(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").dies_with = 3
    async with running(servers, max_load_attempts=2) as fleet:
        assert fleet.registry.reset("a") == (False, None)
        await fleet.ask("a")
        assert fleet.registry.reset("a") == (True, "llama-server ended before it was ready with exit status 3")
        assert fleet.registry.reset("a") == (False, None)
        assert (fleet.states, fleet["a"].supervisor.error) == ("off off off", None)
        await fleet.ask("a")  # as many attempts as before, and no pause before the first
        assert servers.launches["a"] == 4
        assert fleet.of("starting", "model_failed") == [
            "0 a starting",
            "1.25 a starting",
            "2.25 request-a model_failed",
            "2.25 a starting",
            "3.5 a starting",
            "4.5 request-a model_failed",
        ]
        servers.plan("a").dies_with = None
        fleet.registry.reset("a")
        await fleet.ask("a")
        assert fleet.states == "ready off off"


async def test_a_failed_model_is_tried_once_more_after_a_while(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").dies_with = 1
    async with running(servers, max_load_attempts=3, failed_retry_sec=60) as fleet:
        await fleet.ask("a")
        failed_at = trio.current_time()
        await trio.sleep(59)
        with pytest.raises(ModelFailed, match="is tried again in 1 s") as caught:
            await fleet.lease("a")
        assert caught.value.headers == [("x-should-retry", "false"), ("Retry-After", "1")]
        await trio.sleep(500)
        assert servers.launches["a"] == 3, "nobody asked for it"
        with pytest.raises(ModelFailed, match="is tried again in 60 s"):
            await fleet.lease("a")
        assert servers.launches["a"] == 4, "one try, not three"
        await trio.sleep(60)
        servers.plan("a").dies_with = None
        lease = await fleet.lease("a")
        assert fleet.states == "ready off off"
        assert trio.current_time() == failed_at + 59 + 500 + 1 + 60 + 1
        assert fleet["a"].supervisor.attempts == 0
        lease.release()


async def test_a_model_that_crashed_too_often_is_tried_once_more_too(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers, failed_retry_sec=60) as fleet:

        async def crash() -> None:
            (await fleet.lease("a")).release()
            servers.alive["a"].die()
            await wait_all_tasks_blocked()

        for _ in range(MAX_CRASHES):
            await crash()
        assert fleet.states == "failed off off"
        await trio.sleep(60)
        await fleet.registry.load("a")
        servers.alive["a"].die()
        await wait_all_tasks_blocked()
        assert fleet.states == "failed off off", "it has proved nothing yet"
        await trio.sleep(60)
        await crash()
        await trio.sleep(60)
        fleet.registry.load_soon("a")
        await trio.sleep(2)
        fleet["a"].supervisor.proved()
        servers.alive["a"].die()
        await trio.sleep(2)
        assert fleet.states == "ready off off", "an answer forgives everything"


async def test_one_that_computes_no_more_is_killed_and_replaced(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.plan("a").stop_seconds = 2
    async with running(servers, stall_timeout_sec=10) as fleet:
        lease = await fleet.lease("a")
        backend = lease.slot.backend
        assert [backend.answered(end) for end in (COMPUTE, COMPUTE, b"[DONE]", COMPUTE, COMPUTE)] == [
            False, False, True, False, False,
        ]  # fmt: skip
        await wait_all_tasks_blocked()
        assert fleet.states == "ready off off"
        fleet.soon("a", name="waits")
        assert not backend.answered(COMPUTE)
        began = trio.current_time()
        await wait_all_tasks_blocked()
        assert (backend.lost, backend.unloaded) == ("llama-server answered 'Compute error.' 3 times in a row", False)
        lease.release()
        await trio.sleep(2)
        assert fleet.of("waits") == [f"{began + 1:g} waits runs"], "it was not asked to stop"
        lease = await fleet.lease("a")
        connect(lease.slot).awaited = True
        await trio.sleep(12)
        assert lease.slot.backend.lost == "llama-server computed nothing for 10 s while requests waited"
        lease.release()


async def test_attempts_are_counted_across_loads_that_were_given_up(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.plan("a").dies_with = 1
    async with running(servers, max_load_attempts=2) as fleet:
        leaves = fleet.soon("a", name="leaves")
        await trio.sleep(1.125)
        leaves.cancel()
        await wait_all_tasks_blocked()
        assert fleet.states == "off off off"
        await fleet.ask("a")
        assert fleet.of("starting", "loading")[-2:] == [
            "1.125 a starting",
            "1.25 a loading",  # the pause after the first attempt holds for whoever comes
        ]
        assert fleet.of("model_failed") == ["2.25 request-a model_failed"]


async def test_a_load_that_takes_too_long(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").load_seconds = NEVER
    async with running(servers, max_load_attempts=2, load_timeout_sec=10) as fleet:
        fleet.nursery.start_soon(fleet.load, "a")
        with pytest.raises(LoadTimeout) as caught:
            await fleet.lease("a")
        assert trio.current_time() == 10
        assert caught.value.message == "model 'a': llama-server was not ready 10 s after its start"
        assert (caught.value.status, caught.value.param) == (504, "model")
        await trio.sleep(100)
        assert fleet.of("load-a") == ["10 load-a load_timeout"]
        assert servers.launches["a"] == 1, "nobody waits for the second attempt"
        with pytest.raises(LoadTimeout):  # the last attempt: told as what it was
            await fleet.lease("a")
        assert fleet.states == "failed off off"
        with pytest.raises(ModelFailed):
            await fleet.lease("a")


async def test_a_load_by_name_without_waiting_is_not_asked_for_after_it_timed_out(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    servers.plan("a").load_seconds = NEVER
    async with running(servers, load_timeout_sec=10) as fleet:
        fleet.registry.load_soon("a")
        await trio.sleep(100)
        assert fleet.of("left:") == ["10 a left: abandoned"]


# --- crashes -------------------------------------------------------------------------------------------------


async def test_a_model_is_restarted_after_a_crash_though_nobody_waits(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers) as fleet:
        await fleet.ask("a", 1)
        await trio.sleep(3)
        servers.alive["a"].die(-11)
        await trio.sleep(3)
        assert fleet.record[4:] == ["5 a crashed", "5 a starting", "5 a loading", "6 a ready"]
        assert fleet["a"].supervisor.error == "llama-server ended by SIGSEGV"
        assert fleet["a"].supervisor.incarnation == 2


async def test_pauses_between_crashes_grow_and_then_the_model_is_failed(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers) as fleet:
        await fleet.registry.load("a")
        for _ in range(5):
            await trio.sleep(9)
            servers.alive["a"].die()
        await trio.sleep(100)
        assert fleet.of("starting", "failed")[1:] == [
            "10 a starting",  # at once
            "19.25 a starting",
            "28.5 a starting",
            "38 a starting",
            "46 a failed",
            "46 a left: failed",
        ]


async def test_an_answer_makes_earlier_crashes_forgotten(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        await fleet.registry.load("a")
        for _ in range(20):
            await trio.sleep(20)
            fleet["a"].supervisor.proved()
            servers.alive["a"].die()
        await trio.sleep(20)
        assert fleet.states == "ready off off"


async def test_a_server_that_fails_its_health_checks_is_restarted(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers) as fleet:
        lease = await fleet.lease("a")
        servers.plan("a").stop_seconds = 2
        servers.alive["a"].plan.stop_seconds = 2
        servers.alive["a"].fall_ill("failed 3 health checks in a row")
        await wait_all_tasks_blocked()
        assert lease.slot.backend.gone.is_set(), "its requests end before it does"
        assert lease.slot.backend.lost == "failed 3 health checks in a row"
        assert not lease.slot.backend.unloaded
        lease.release()
        await trio.sleep(10)
        assert fleet.of("a")[-4:] == ["1 a crashed", "1 a starting", "1 a loading", "2 a ready"]


async def test_a_crash_while_requests_run_and_wait(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, {"a": 2}) as fleet:
        first, second = await fleet.lease("a"), await fleet.lease("a")
        fleet.soon("a", 1, name="third")
        await wait_all_tasks_blocked()
        servers.alive["a"].die()
        await wait_all_tasks_blocked()
        assert first.slot.backend.lost == "its llama-server ended"
        await trio.sleep(2.5)
        assert fleet.of("third") == ["2 third runs"], "though those of the dead one have not been released"
        assert fleet["a"].scheduler.statistics() == attrs.evolve(IDLE, active=2, free=2)
        first.release()
        second.release()


async def test_a_dying_model_tells_those_who_wait_when_it_is_failed(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers, max_load_attempts=1) as fleet:
        lease = await fleet.lease("a")
        fleet.soon("a", name="waits")
        await wait_all_tasks_blocked()
        servers.plan("a").refused = "out of files"
        servers.alive["a"].die()
        await trio.sleep(1)
        lease.release()
        assert set(fleet.of("waits", "failed")) == {"1 a failed", "1 waits model_failed", "1 a left: failed"}


# --- asking by name ----------------------------------------------------------------------------------------------


async def test_load_waits_until_the_model_is_ready(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, max_concurrent_models=1) as fleet:
        assert await fleet.registry.load("a") is fleet["a"]
        assert trio.current_time() == 1
        await fleet.registry.load("a")
        assert trio.current_time() == 1
        fleet.soon("a", 10)
        await wait_all_tasks_blocked()
        await fleet.registry.load("b")
        assert trio.current_time() == 12
        assert fleet.states == "off ready off"


async def test_whoever_asks_by_name_and_leaves_asks_no_longer(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        with trio.move_on_after(0.5):
            await fleet.registry.load("a")
        await trio.sleep(5)
        assert fleet.of("left:") == ["0.5 a left: abandoned"]
        with trio.move_on_after(0.5):
            await fleet.registry.load("a")
        fleet.registry.load_soon("a")
        await trio.sleep(5)
        assert fleet.states == "ready off off"


async def test_load_soon_survives_an_unloading(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").stop_seconds = 2
    async with running(servers) as fleet:
        await fleet.ask("a", 1)
        fleet.nursery.start_soon(fleet.eject, "a")
        await trio.sleep(1)
        assert fleet.registry.load_soon("a").state is State.STOPPING
        await trio.sleep(5)
        assert fleet.of("ready") == ["1 a ready", "5 a ready"]


async def test_unknown_models(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        registry = fleet.registry
        with pytest.raises(UnknownModel, match=r"^no model is called 'x'; GET /v1/models lists those there are$"):
            registry.model("x")
        with pytest.raises(UnknownModel):
            registry.ticket("x", LOW)
        with pytest.raises(UnknownModel):
            await registry.load("x")
        with pytest.raises(UnknownModel):
            registry.load_soon("x")
        with pytest.raises(UnknownModel):
            await registry.eject("x")
        with pytest.raises(UnknownModel):
            registry.reset("x")
        with pytest.raises(UnknownModel) as caught:
            registry.model("x" * 10_000)
        assert len(caught.value.message) < 200


async def test_the_queue_is_bounded_while_a_model_loads(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, {"a": 2}, max_queue_size_per_model=1) as fleet:
        for number in range(3):
            fleet.soon("a", name=f"r{number}")
        await wait_all_tasks_blocked()
        with pytest.raises(QueueFull):
            await fleet.lease("a")
        await trio.sleep(10)
        assert len(fleet.of("runs")) == 3


async def test_loading_counts_as_waiting(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").load_seconds = 100
    async with running(servers, queue_timeout_sec=30) as fleet:
        with pytest.raises(QueueTimeout):
            await fleet.lease("a")
        assert trio.current_time() == 30
        await wait_all_tasks_blocked()
        assert fleet.of("left:") == ["30 a left: abandoned"]


# --- ejecting ---------------------------------------------------------------------------------------------------


async def test_eject_waits_for_running_requests(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").stop_seconds = 0.5
    async with running(servers, {"a": 2}, drain_timeout_sec=30) as fleet:
        fleet.soon("a", 10)
        fleet.soon("a", 7)
        await trio.sleep(2)
        await fleet.eject("a")
        assert fleet.record[-4:] == ["2 a stopping", "11.5 a off", "11.5 a left: ejected", "11.5 eject-a done"]


async def test_eject_cuts_what_still_runs_after_the_drain_time(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, drain_timeout_sec=5) as fleet:
        lease = await fleet.lease("a")
        await fleet.eject("a")
        assert fleet.record[-1] == "6 eject-a done"
        assert (lease.slot.backend.lost, lease.slot.backend.unloaded) == ("it was unloaded", True)
        lease.release()


async def test_eject_by_force_cuts_at_once(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, drain_timeout_sec=30) as fleet:
        lease = await fleet.lease("a")
        await fleet.eject("a", force=True)
        assert fleet.record[-1] == "1 eject-a done"
        assert (lease.slot.backend.lost, lease.slot.backend.unloaded) == ("it was unloaded", True)
        lease.release()


async def test_force_hurries_an_eject_that_waits(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, drain_timeout_sec=30) as fleet:
        lease = await fleet.lease("a")
        fleet.nursery.start_soon(fleet.eject, "a")
        await trio.sleep(3)
        assert fleet.states == "stopping off off"
        await fleet.eject("a", force=True)
        await wait_all_tasks_blocked()
        assert fleet.of("eject-a") == ["4 eject-a done"] * 2
        assert fleet.of("left:") == ["4 a left: ejected"]
        lease.release()


async def test_two_ejects_at_once_are_one(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        fleet.soon("a", 5)
        await trio.sleep(2)
        async with trio.open_nursery() as both:
            both.start_soon(fleet.eject, "a")
            both.start_soon(fleet.eject, "a")
        assert fleet.of("left:", "eject-a") == ["6 a left: ejected", "6 eject-a done", "6 eject-a done"]


async def test_ejecting_what_is_not_loaded(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        await fleet.eject("a")
        await fleet.eject("a", force=True)
        assert fleet.record == ["0 eject-a not-loaded"] * 2


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("ticks", range(6))
def test_eject_during_a_load(ticks: int, force: bool) -> None:
    """At every step of the start, whatever order trio runs the tasks in."""

    async def main() -> None:
        servers = FakeServers()
        async with running(servers) as fleet:
            fleet.registry.load_soon("a")
            while fleet["a"].state is State.OFF:
                await trio.lowlevel.checkpoint()
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            await fleet.eject("a", force=force)
            assert fleet.states == "off off off"
            assert servers.alive == {}
            await trio.sleep(100)
            assert fleet.states == "off off off"

    for seed in range(10):
        seed_trio(seed)
        trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_who_asked_by_name_is_told_of_the_eject_and_who_waits_is_served(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers) as fleet:
        fleet.nursery.start_soon(fleet.load, "a")
        fleet.soon("a", 1)
        await trio.sleep(0.5)
        fleet.nursery.start_soon(fleet.eject, "a")
        await trio.sleep(5)
        assert set(fleet.of("load-a", "eject-a", "runs")) == {
            "0.5 load-a backend_unavailable",
            "0.5 eject-a done",
            "1.5 request-a runs",
        }


async def test_load_during_an_eject_loads_again(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").stop_seconds = 2
    async with running(servers) as fleet:
        await fleet.registry.load("a")
        fleet.nursery.start_soon(fleet.eject, "a")
        await trio.sleep(1)
        await fleet.registry.load("a")
        assert trio.current_time() == 4
        assert fleet.of("eject-a") == ["3 eject-a done"], "which is done though the model is back"


async def test_requests_during_an_eject_wait_for_the_next_load(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, drain_timeout_sec=30) as fleet:
        fleet.soon("a", 10, name="first")
        await trio.sleep(2)
        fleet.nursery.start_soon(fleet.eject, "a")
        await trio.sleep(1)
        fleet.soon("a", 1, name="second")
        await trio.sleep(20)
        assert fleet.of("runs", "left:") == ["1 first runs", "11 a left: ejected", "12 second runs"]


async def test_a_server_that_dies_while_it_drains_is_gone_and_its_successor_is_not_hurt(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers, {"a": 2}, drain_timeout_sec=30) as fleet:
        slow = await fleet.lease("a")
        fleet.nursery.start_soon(fleet.eject, "a")
        await trio.sleep(4)
        servers.alive["a"].die()
        await wait_all_tasks_blocked()
        assert fleet.of("left:", "eject-a") == ["5 a left: ejected", "5 eject-a done"]
        assert not slow.slot.backend.unloaded
        second = await fleet.lease("a")
        await trio.sleep(100)  # past the end of the first one's drain time
        assert second.slot.backend.lost is None
        assert fleet.states == "ready"
        slow.release()
        second.release()


async def test_an_eject_between_a_crash_and_the_restart(servers: FakeServers, autojump_clock: MockClock) -> None:
    # somebody has not noticed yet that the server is dead, and holds its lease through the pause
    async with running(servers, drain_timeout_sec=30) as fleet:
        lease = await fleet.lease("a")
        servers.plan("a").refused = "out of files"
        servers.alive["a"].die()
        await trio.sleep(0.125)
        assert fleet.states == "crashed off off"
        servers.plan("a").refused = None
        fleet.nursery.start_soon(fleet.eject, "a")
        await trio.sleep(60)
        assert fleet.states == "off off off"
        assert fleet.of("eject-a")[0].endswith("done")
        lease.release()
        await fleet.ask("a", 1)
        assert fleet.states == "ready off off"


async def test_a_load_given_up_at_the_very_end_of_a_pause(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").dies_with = 1
    async with running(servers, max_load_attempts=1000) as fleet:
        for _ in range(20):
            fleet["a"].supervisor.reset()
            request = fleet.soon("a")
            await trio.sleep(1.25)  # one second of loading, a quarter of a pause
            request.cancel()
            await trio.sleep(100)
            assert fleet.states == "off off off"


# --- the end ----------------------------------------------------------------------------------------------------


async def test_draining_refuses_what_waits_and_waits_for_what_runs(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers, max_concurrent_models=1) as fleet:
        told: list[str] = []
        fleet.registry.events.sinks.append(
            lambda event: told.append(event.status) if isinstance(event, ServerChanged) else None
        )
        early = fleet.registry.ticket("a", LOW)
        fleet.soon("a", 10, name="runs-on")
        await trio.sleep(2)
        fleet.soon("a", name="queued")
        fleet.soon("b", name="waits-for-room")
        fleet.nursery.start_soon(fleet.load, "c")
        await trio.sleep(1)
        fleet.record.clear()
        await fleet.registry.drain(60)
        assert trio.current_time() == 11
        assert set(fleet.record) == {
            "3 queued shutting_down",
            "3 waits-for-room shutting_down",
            "3 load-c shutting_down",
        }
        assert (fleet.registry.draining, told) == (True, ["draining"])
        for refused in [lambda: fleet.registry.lease(early), lambda: fleet.registry.load("a")]:
            with pytest.raises(ShuttingDown):
                await refused()
        with pytest.raises(ShuttingDown):
            await fleet.registry.lease(fleet.registry.ticket("a", LOW))
        with pytest.raises(ShuttingDown):
            fleet.registry.load_soon("b")
        await trio.sleep(1000)
        assert fleet.states == "ready off off", "nothing is started, and nothing stopped but by the end"


async def test_draining_is_bounded(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        first, second = await fleet.lease("a"), await fleet.lease("b")
        with trio.fail_after(100):
            await fleet.registry.drain(5)
        assert trio.current_time() == 7
        first.release()
        second.release()


async def test_draining_with_nothing_to_wait_for_is_done_at_once(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with running(servers) as fleet:
        await fleet.ask("a", 1)
        await fleet.registry.drain(5)
        assert trio.current_time() == 2


async def test_a_load_under_way_is_not_waited_for_by_a_drain(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers) as fleet:
        fleet.soon("a")
        await trio.sleep(0.5)
        await fleet.registry.drain(60)
        assert trio.current_time() == 0.5
        await wait_all_tasks_blocked()
        assert fleet.of("request-a") == ["0.5 request-a shutting_down"]


async def test_an_eject_while_the_router_drains(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, drain_timeout_sec=100) as fleet:
        fleet.soon("a", 10)
        await trio.sleep(2)
        fleet.nursery.start_soon(fleet.registry.drain, 100)
        await trio.sleep(1)
        await fleet.eject("a")
        assert fleet.record[-1] == "11 eject-a done"


async def test_cancelling_run_ends_every_server_side_by_side(servers: FakeServers, autojump_clock: MockClock) -> None:
    registry = registry_of(
        servers, {"a": 1, "b": 1, "c": 1, "d": 1}, preload_models=("a", "b"), max_concurrent_models=4
    )
    for alias in "abcd":
        servers.plan(alias).stop_seconds = 2
    servers.plan("c").load_seconds = NEVER
    servers.plan("d").refused = "not now"
    with servers.installed():
        async with trio.open_nursery() as nursery:
            await nursery.start(registry.run)
            registry.load_soon("c")
            registry.load_soon("d")
            await trio.sleep(1.125)
            states = [model.state.value for model in registry.models.values()]
            assert states[:3] == ["ready", "ready", "loading"]
            nursery.cancel_scope.cancel()
    assert trio.current_time() == 3.125
    assert servers.alive == {}
    assert {model.state for model in registry.models.values()} <= {State.OFF, State.FAILED}


async def test_a_server_that_is_slow_to_stop_is_waited_for(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").stop_seconds = 9
    async with running(servers, max_concurrent_models=1) as fleet:
        await fleet.ask("a", 1)
        await fleet.ask("b", 1)
        assert fleet.of("runs", "left:") == ["1 request-a runs", "11.5 a left: evicted", "12.5 request-b runs"]
