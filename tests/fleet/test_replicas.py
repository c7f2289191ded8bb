"""Several llama-servers that serve one queue, in virtual time."""

from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.fleet.fake_servers import FakeServers
from tests.fleet.fleet import Fleet, running
from trio_router.backend.conversation import Conversation
from trio_router.errors import TimedOut
from trio_router.fleet.registry import Registry
from trio_router.fleet.reload import compare
from trio_router.fleet.scheduler import IDLE
from trio_router.fleet.status import status
from trio_router.fleet.ticket import Priority


@asynccontextmanager
async def replicated(servers: FakeServers, replicas: int = 2, slots: int = 1, **system):
    """Models `a`, with so many replicas, and `b`."""
    make = Registry.of

    def of(config, *more):
        models = {**config.models, "a": attrs.evolve(config.models["a"], replicas=replicas)}
        return make(attrs.evolve(config, models=models), *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, "of", of)
        async with running(servers, {"a": slots, "b": 1}, **system) as fleet:
            yield fleet
            for model in fleet.registry.everyone():
                assert model.leader is None or model.scheduler.statistics().active in {0, model.scheduler.active}


def states(fleet: Fleet) -> list[str]:
    model = fleet["a"]
    return [one.state.value for one in (model, *model.replicas)]


async def test_one_is_loaded_when_somebody_waits_though_the_first_is_ready(servers, autojump_clock: MockClock):
    async with replicated(servers) as fleet:
        fleet.soon("a", 10, name="first")
        await trio.sleep(3)
        assert states(fleet) == ["ready", "off"]
        fleet.soon("a", 10, name="second")
        await trio.sleep(3)
        assert states(fleet) == ["ready", "ready"]
        assert fleet.of("runs") == ["1 first runs", "4 second runs"]
        assert fleet["a"].scheduler.statistics() == attrs.evolve(IDLE, active=2)
        shown = status(fleet["a"])
        assert (shown["active"], shown["queued"], shown["slots"]) == (2, 0, 1)
        assert [(one["name"].partition("#")[0], one["status"], one["active"]) for one in shown["replicas"]] == [
            ("a", "ready", 1)
        ]


async def test_it_leaves_when_it_is_idle_and_comes_again(servers, autojump_clock: MockClock):
    async with replicated(servers, idle_timeout_sec=30) as fleet:
        fleet.soon("a", 200)
        await trio.sleep(2)
        await fleet.ask("a", 5)
        assert states(fleet) == ["ready", "ready"]
        await trio.sleep(60)
        assert states(fleet) == ["ready", "off"]
        await fleet.ask("a", 5)
        assert states(fleet) == ["ready", "ready"]


async def test_all_serve_the_queue_in_its_order(servers, autojump_clock: MockClock):
    async with replicated(servers, replicas=3) as fleet:
        for number in range(9):
            fleet.soon("a", 10, name=f"request-{number}")
            await trio.sleep(0.01)
        await trio.sleep(60)
        # those who get a slot at the same moment run in any order
        began = sorted((round(float(line.split()[0])), line.split()[1]) for line in fleet.of("runs"))
        assert began == [(time, f"request-{number}") for number, time in enumerate((1, 2, 2, 11, 12, 12, 21, 22, 22))]
        assert servers.most_alive == 3


async def test_each_counts_as_a_model_and_makes_none_leave(servers, autojump_clock: MockClock):
    async with replicated(servers, max_concurrent_models=2) as fleet:
        await fleet.ask("b", 1)
        for number in range(3):
            fleet.soon("a", 10, name=f"request-{number}")
        await trio.sleep(15)
        assert states(fleet) == ["ready", "off"]
        assert fleet["b"].state.value == "ready"
        assert servers.most_alive == 2


async def test_it_makes_room_for_another_model(servers, autojump_clock: MockClock):
    async with replicated(servers, max_concurrent_models=2) as fleet:
        fleet.soon("a", 100)
        await trio.sleep(2)
        fleet.soon("a", 5)
        await trio.sleep(8)
        assert states(fleet) == ["ready", "ready"]
        await fleet.ask("b", 1)
        assert states(fleet) == ["ready", "off"]
        assert fleet["b"].state.value == "ready"


async def test_preloading_loads_all(servers, autojump_clock: MockClock):
    async with replicated(servers, replicas=2, preload_models=("a",)) as fleet:
        await trio.sleep(5)
        assert states(fleet) == ["ready", "ready"]


async def test_the_one_with_more_free_slots_is_next(servers, autojump_clock: MockClock):
    async with replicated(servers, slots=2, preload_models=("a",)) as fleet:
        await trio.sleep(5)
        leases = [await fleet.lease("a") for _ in range(4)]
        backends = [lease.slot.backend for lease in leases]
        assert backends[0] is not backends[1]
        assert backends[2] is not backends[3]
        for lease in leases:
            lease.release()
            lease.release()
        assert fleet["a"].scheduler.statistics() == attrs.evolve(IDLE, free=4)


async def test_a_conversation_goes_on_where_it_was(servers, autojump_clock: MockClock):
    async with replicated(servers, replicas=3, preload_models=("a",)) as fleet:
        await trio.sleep(5)

        async def told(text: str):
            ticket = fleet.registry.ticket("a", Priority.NORMAL)
            ticket.conversation = Conversation.of(text.encode(), None)
            lease = await fleet.registry.lease(ticket)
            await trio.sleep(1)
            lease.release()
            return lease.slot.backend

        first = {name: await told(f'["{name}"]') for name in "xyz"}
        assert len(set(first.values())) == 3
        for name in "zxyyx":
            assert await told(f'["{name}", "answer", "more"]') is first[name]


async def test_a_death_concerns_its_own_requests(servers, autojump_clock: MockClock):
    async with replicated(servers, preload_models=("a",)) as fleet:
        await trio.sleep(5)
        model = fleet["a"]
        [replica] = model.replicas
        fleet.soon("a", 100)
        fleet.soon("a", 100)
        await trio.sleep(1)
        assert replica.supervisor.backend is not None
        next(server for server in servers.alive.values() if server.pid == replica.supervisor.pid).die()
        await trio.sleep(5)
        assert model.state.value == "ready"
        assert replica.state.value == "ready"  # restarted
        assert replica.supervisor.incarnation == 2
        assert model.supervisor.incarnation == 1


async def test_an_eject_takes_all_out(servers, autojump_clock: MockClock):
    async with replicated(servers, preload_models=("a",)) as fleet:
        await trio.sleep(5)
        await fleet.eject("a")
        assert states(fleet) == ["off", "off"]
        await fleet.ask("a", 1)
        assert states(fleet) == ["ready", "off"]


async def test_a_reload_brings_other_replicas(servers, autojump_clock: MockClock):
    async with replicated(servers, replicas=3, max_concurrent_models=5, preload_models=("a",)) as fleet:
        await trio.sleep(5)
        assert states(fleet) == ["ready"] * 3
        before = fleet.registry.config
        entry = attrs.evolve(before.models["a"], replicas=2)
        after = attrs.evolve(before, models={**before.models, "a": entry})
        fleet.registry.apply(compare(before, after))
        await trio.sleep(10)
        assert states(fleet) == ["ready", "off"]
        assert len(servers.alive) == 1
        fleet.soon("a", 20)
        fleet.soon("a", 20)
        await trio.sleep(5)
        assert states(fleet) == ["ready", "ready"]


async def test_a_wish_for_a_replica_ends_with_who_waited(autojump_clock: MockClock) -> None:
    async with replicated(FakeServers(), max_concurrent_models=2, idle_timeout_sec=30) as fleet:
        fleet.soon("b", 400, name="b")
        fleet.soon("a", 10, name="first")
        await trio.sleep(3)
        fleet.soon("a", 1, name="second")
        await trio.sleep(300)
        assert states(fleet)[1:] == ["off"]
        assert not fleet["a"].replicas[0].preload
        await trio.sleep(600)
        assert states(fleet)[1:] == ["off"], "b has left, and nobody waits"


async def test_a_plan_may_have_a_replica_leave(autojump_clock: MockClock) -> None:
    async with replicated(FakeServers(), max_concurrent_models=2) as fleet:
        fleet.soon("a", 10, name="first")
        await trio.sleep(3)
        fleet.soon("a", 3, name="second")
        await trio.sleep(30)
        for _ in range(2):
            await fleet.ask("a", 1)
        registry = fleet.registry
        assert registry.plan(registry.ticket("b", Priority.NORMAL)).evicts == ("a#1",)
        with pytest.raises(TimedOut):
            await registry.lease(registry.ticket("b", Priority.NORMAL, due=trio.current_time() + 0.1))


async def test_how_long_a_model_is_kept_holds_for_its_replicas(autojump_clock: MockClock) -> None:
    async with replicated(FakeServers(), max_concurrent_models=3, enable_idle_timeout=False) as fleet:
        fleet.soon("a", 5)
        await trio.sleep(2)
        await fleet.ask("a", 5)
        fleet.registry.keep("a", 0)
        await trio.sleep(100)
        assert set(states(fleet)) == {"off"}
