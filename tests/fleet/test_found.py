"""Orders of events that a reading of the code found: each once went wrong."""

from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.fleet.fake_servers import FakeServers
from tests.fleet.fleet import running
from tests.fleet.test_memory import SAID, HungryServers, footprint, hungry
from tests.fleet.test_replicas import replicated, states
from tests.memory.fake_nvml import FakeNvml
from trio_router.config.schema import ApiConfig, ModelConfig, RouterConfig, SystemConfig
from trio_router.errors import TimedOut
from trio_router.fleet.registry import Registry
from trio_router.fleet.reload import compare
from trio_router.fleet.ticket import Priority
from trio_router.memory.devices import DeviceMonitor
from trio_router.memory.host import HostMemory
from trio_router.memory.ledger import MIB
from trio_router.telemetry.events import Events

GIB = 1024 * MIB


async def test_a_loaded_model_that_comes_to_be_preloaded_is_not_pinned_by_that(autojump_clock: MockClock) -> None:
    async with running(FakeServers(), {"a": 1, "b": 1}, max_concurrent_models=1, idle_timeout_sec=30) as fleet:
        await fleet.ask("a", 1)
        config = fleet.registry.config
        fleet.registry.apply(
            compare(config, attrs.evolve(config, system=attrs.evolve(config.system, preload_models=("a",))))
        )
        await fleet.ask("b", 1)
        assert fleet.states == "off ready"
        await trio.sleep(100)
        assert fleet.states == "off off"


async def test_replicas_of_what_is_preloaded_reserve_memory(autojump_clock: MockClock) -> None:
    servers = HungryServers(sizes={"a": 14.0})
    nvml = FakeNvml([servers.gpu], hang=servers.freed)

    async def inline(sample):
        return sample()

    devices = DeviceMonitor(gpu_devices=(0,), nvml=nvml, call=inline)
    system = SystemConfig(base_models_path=Path("/m"), preload_models=("a",), vram_reserve_mb=0)
    model = ModelConfig(alias="a", model_path="a", file=Path("/m/a"), slots=1, replicas=2, flags=SAID)
    config = RouterConfig(path=Path("r"), api=ApiConfig(), system=system, models={"a": model})
    registry = Registry.of(config, servers, Events(), devices)
    registry.host = HostMemory(read=lambda: None)
    registry.models["a"].footprint = footprint(14)
    with servers.installed():
        async with trio.open_nursery() as nursery:
            await nursery.start(devices.run)
            await nursery.start(registry.run)
            await trio.sleep(60)
            assert [alias for _, alias in servers.starts] == ["a"]
            nursery.cancel_scope.cancel()


async def test_one_that_ran_out_of_memory_for_anothers_reason_is_not_lost(autojump_clock: MockClock) -> None:
    """15 % more of 21.5 GiB would be more than there is."""
    async with hungry(a=21.5) as (fleet, servers):
        plan = servers.plan("a")
        plan.dies_with, plan.words = 1, "cudaMalloc failed: out of memory"
        fleet.soon("a", 1)
        await trio.sleep(0.5)
        plan.dies_with, plan.words = None, ""
        await trio.sleep(1000)
        await fleet.ask("a", 1)


async def test_what_it_counts_as_larger_for_does_not_grow(autojump_clock: MockClock) -> None:
    async with hungry(a=10, failed_retry_sec=60) as (fleet, servers):
        plan = servers.plan("a")
        plan.dies_with, plan.words = 1, "cudaMalloc failed: out of memory"
        for _ in range(8):
            fleet.soon("a", 1)
            await trio.sleep(500)
        plan.dies_with, plan.words = None, ""
        await fleet.ask("a", 1)
        assert fleet.registry.ledger.held["a"].spot.bytes[0] <= 11.6 * GIB


async def test_who_ran_out_of_memory_waits_until_the_other_has_left(autojump_clock: MockClock) -> None:
    async with hungry(a=2, b=10) as (fleet, servers):
        await fleet.ask("a", 1)
        await trio.sleep(10)
        servers.alive["a"].plan.stop_seconds = 1.5
        plan = servers.plan("b")
        plan.dies_with, plan.words = 1, "cudaMalloc failed: out of memory"
        fleet.soon("b", 1)
        for number in range(30):
            await trio.sleep(0.2)
            fleet.soon("b", 1, name=f"b{number}")
            if fleet["a"].state.value == "stopping":
                plan.dies_with, plan.words = None, ""
        await trio.sleep(60)
        record = [line.partition(" ")[2] for line in fleet.record]
        assert record.index("a left: evicted") < len(record) - 1 - record[::-1].index("b starting")
        assert fleet["b"].state.value == "ready"


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
