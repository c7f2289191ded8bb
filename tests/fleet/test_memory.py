"""A registry that reserves memory, in virtual time: llama-servers that take some, a driver that shows it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.fleet.fake_servers import FakeServer, FakeServers
from tests.fleet.fleet import Fleet, running
from tests.memory.fake_nvml import GIB, FakeGpu, FakeNvml
from trio_router.config.schema import ApiConfig, ModelConfig, OomStep, RouterConfig, SystemConfig
from trio_router.errors import InsufficientMemory
from trio_router.fleet.registry import Registry
from trio_router.fleet.status import status
from trio_router.memory.devices import DeviceMonitor
from trio_router.memory.footprint import Footprint, Part, Place
from trio_router.memory.host import HostMemory
from trio_router.memory.ledger import SEEN_SECONDS
from trio_router.telemetry.events import Events


def footprint(gibibytes: float, host: float = 0) -> Footprint:
    parts = [("weights", gibibytes, Place.DEVICE), ("weights", host, Place.HOST)]
    return Footprint(
        parts=tuple(Part(name=name, bytes=int(size * GIB), source="header", place=place) for name, size, place in parts)
    )


@attrs.define(eq=False, repr=False)
class HungryServers(FakeServers):
    """They hold memory of the first GPU from their launch on, and it is free again `lag` seconds after they are gone."""

    gpu: FakeGpu = attrs.field(factory=lambda: FakeGpu("GPU-a", total=24 * GIB, used=0))
    sizes: dict[str, float] = attrs.field(factory=dict)
    lag: float = 0.0
    flags: dict[str, tuple[str, ...]] = attrs.field(factory=dict)
    starts: list[tuple[float, str]] = attrs.field(factory=list)
    _due: list[tuple[float, int]] = attrs.field(factory=list)

    def launch(self, model: ModelConfig, *args: Any) -> Any:
        self.freed()
        self.flags[model.alias] = model.flags
        self.starts.append((round(trio.current_time(), 3), model.alias))
        self.gpu.used += int(self.sizes.get(model.alias, 0) * GIB)
        assert self.gpu.used <= self.gpu.total, "out of memory"
        return super().launch(model, *args)

    def gone(self, server: FakeServer) -> None:
        super().gone(server)
        self._due.append((trio.current_time() + self.lag, int(self.sizes.get(server.alias, 0) * GIB)))

    def freed(self) -> None:
        for due in [due for due in self._due if due[0] <= trio.current_time()]:
            self._due.remove(due)
            self.gpu.used -= due[1]


async def _inline(sample: Callable[[], Any]) -> Any:
    await trio.lowlevel.checkpoint()
    return sample()


SAID = ("-c", "512", "-ngl", "99")
"""With these llama-server makes a model no smaller than it is."""


@asynccontextmanager
async def hungry(host: float = 0, *, others: float = 0, **sizes: Any) -> AsyncIterator[tuple[Fleet, HungryServers]]:
    """Models of so many GiB on one GPU of 24; what is no float is a key of `[system]`."""
    models = {alias: float(size) for alias, size in sizes.items() if len(alias) == 1}
    system = {"vram_reserve_mb": 0, **{key: value for key, value in sizes.items() if len(key) > 1}}
    servers = HungryServers(sizes=models)
    servers.gpu.used = int(others * GIB)
    nvml = FakeNvml([servers.gpu], hang=servers.freed)
    devices = DeviceMonitor(gpu_devices=(0,), nvml=nvml, call=_inline)
    async with trio.open_nursery() as nursery:
        await nursery.start(devices.run)
        async with running(servers, dict.fromkeys(models, 1), devices, **system) as fleet:
            for alias, size in models.items():
                model = fleet[alias]
                model.config = model.supervisor.model = attrs.evolve(model.config, flags=SAID)
                model.footprint = footprint(size, host)
            yield fleet, servers
        nursery.cancel_scope.cancel()


async def refusal(fleet: Fleet, alias: str) -> dict[str, Any]:
    with pytest.raises(InsufficientMemory) as caught:
        await fleet.lease(alias)
    assert (caught.value.status, caught.value.type, caught.value.code) == (
        503, "insufficient_vram_error", "vram_exhausted",
    )  # fmt: skip
    return {**caught.value.details, "message": caught.value.message}


async def test_what_can_never_fit_is_refused_at_once(autojump_clock: MockClock) -> None:
    async with hungry(a=10, b=30, others=2) as (fleet, servers):
        await fleet.ask("a")
        await trio.sleep(2.5)  # it was looked at since
        began = trio.current_time()
        told = await refusal(fleet, "b")
        assert trio.current_time() == began
        assert (told["model"], told["required_mb"], told["available_mb"]) == ("b", 30 * 1024, 22 * 1024)
        assert told["loaded_models"] == ["a"]
        assert told["message"] == (
            "model 'b': needs 30.0 GiB on gpu 0, where at most 22.0 GiB can be free; "
            "what would help: a smaller context (-c), fewer layers on the GPU (-ngl)"
        )
        assert servers.alive.keys() == {"a"}, "nobody left in vain"
        with pytest.raises(InsufficientMemory):
            await fleet.registry.load("b")
        assert fleet["b"].state.value == "off"
        servers.sizes["b"], fleet["b"].footprint = 20, footprint(20)
        await fleet.ask("b")


async def test_the_reserve_is_never_touched(autojump_clock: MockClock) -> None:
    async with hungry(a=22, b=22.5, vram_reserve_mb=2048) as (fleet, _):
        await fleet.ask("a")
        await trio.sleep(2.5)
        assert (await refusal(fleet, "b"))["available_mb"] == 22 * 1024


async def test_room_is_made_and_the_memory_is_waited_for(autojump_clock: MockClock) -> None:
    async with hungry(a=10, b=8, c=12) as (fleet, servers):
        servers.lag = 1.35
        await fleet.ask("a")
        await fleet.ask("b")
        await trio.sleep(10)
        began = trio.current_time()
        await fleet.ask("c")
        assert fleet.of("left:") == [f"{began:g} a left: evicted"]
        (started, _) = servers.starts[-1]
        assert began + 1.35 <= started <= began + 1.5, "looked at closely"
        assert sorted(servers.alive) == ["b", "c"]


async def test_loads_side_by_side_do_not_overcommit(autojump_clock: MockClock) -> None:
    async with hungry(a=10, b=10, c=10) as (fleet, servers):
        for alias in "abc":
            servers.plan(alias).load_seconds = 20
            fleet.soon(alias, 5)
        await trio.sleep(15)
        assert sorted(servers.alive) == ["a", "b"]
        await trio.sleep(60)
        assert fleet.of("request-c") != []


async def test_memory_that_is_never_seen_free_is_somebody_elses(autojump_clock: MockClock) -> None:
    async with hungry(a=14, b=14) as (fleet, servers):
        servers.lag = 1000
        await fleet.ask("a")
        await trio.sleep(10)
        began = trio.current_time()
        told = await refusal(fleet, "b")
        assert trio.current_time() == pytest.approx(began + SEEN_SECONDS, abs=0.2)
        assert (told["available_mb"], told["loaded_models"]) == (10 * 1024, [])


async def test_pinned_models_stay(autojump_clock: MockClock) -> None:
    async with hungry(a=14, b=14, c=9) as (fleet, servers):
        fleet["a"].config = attrs.evolve(fleet["a"].config, pinned=True)
        await fleet.ask("a")
        await trio.sleep(2.5)
        told = await refusal(fleet, "b")
        assert told["message"].endswith("unpin 'a'")
        assert told["available_mb"] == 10 * 1024
        await fleet.ask("c")
        await trio.sleep(10_000)
        assert servers.alive.keys() == {"a"}, "c was idle for too long"
        assert await fleet.registry.eject("a")
        await fleet.ask("b")


async def test_pinned_models_may_have_every_place(autojump_clock: MockClock) -> None:
    async with hungry(a=1, b=1, max_concurrent_models=1) as (fleet, _):
        fleet["a"].config = attrs.evolve(fleet["a"].config, pinned=True)
        await fleet.ask("a")
        told = await refusal(fleet, "b")
        assert "pinned models have every place" in told["message"]
        assert (told["required_mb"], told["available_mb"], told["loaded_models"]) == (None, None, ["a"])


async def test_other_programs_count_and_may_leave(autojump_clock: MockClock) -> None:
    async with hungry(a=14, b=10, others=0) as (fleet, servers):
        fleet.soon("a", 30)
        await trio.sleep(5)
        servers.gpu.used += 5 * GIB
        await trio.sleep(5)
        fleet.soon("b", 1)
        await trio.sleep(5)
        assert servers.alive.keys() == {"a"}, "b waits: a is busy"
        servers.gpu.used -= 5 * GIB
        await trio.sleep(5)
        assert servers.alive.keys() == {"a", "b"}, "and was started without anything else happening"


async def test_the_hosts_memory(autojump_clock: MockClock) -> None:
    async with hungry(3, a=1, b=1, c=1, ram_budget_mb=7 * 1024) as (fleet, servers):
        for alias in "abc":
            await fleet.ask(alias)
            await trio.sleep(1)
        assert servers.alive.keys() == {"b", "c"}
        fleet["a"].footprint = footprint(1, host=8)
        told = await refusal(fleet, "a")
        assert (told["required_mb"], told["available_mb"]) == (8 * 1024, 7 * 1024)
        assert "of the host's memory, of which models may take 7.0 GiB" in told["message"]
        assert "raise system.ram_budget_mb" in told["message"]


async def test_a_share_of_the_hosts_memory_by_default(autojump_clock: MockClock) -> None:
    async with hungry(3, a=1, b=1) as (fleet, servers):
        fleet.registry.host = HostMemory(read=lambda: 5 * GIB)
        await fleet.ask("a")
        await fleet.ask("b")
        assert servers.alive.keys() == {"b"}


async def test_a_model_of_unknown_needs_counts_by_its_place(autojump_clock: MockClock) -> None:
    async with hungry(a=14, b=9, c=9) as (fleet, servers):
        fleet["b"].footprint = None
        await fleet.ask("a")
        await fleet.ask("b")
        await trio.sleep(5)
        await fleet.ask("c")
        assert len(servers.alive) == 2, "what is seen of b counts"


async def test_one_that_crashed_takes_its_memory_again(autojump_clock: MockClock) -> None:
    async with hungry(a=14, b=14) as (fleet, servers):
        await fleet.ask("a")
        await trio.sleep(3)
        servers.plan("a").load_seconds = 50
        servers.alive["a"].die()
        await trio.sleep(3)
        assert fleet.registry.room().free[0] == (24 - 14 - 14) * GIB, "taken or not, nobody can say"
        await trio.sleep(60)
        assert fleet.registry.room().free[0] == 10 * GIB


async def test_nothing_stays_reserved(autojump_clock: MockClock) -> None:
    async with hungry(a=14, b=14) as (fleet, servers):
        servers.plan("b").dies_with = 1
        await fleet.ask("a")
        await fleet.ask("b")
        assert fleet["b"].state.value == "failed"
        assert fleet.registry.ledger.held == {}
        await trio.sleep(10)
        assert fleet.registry.room().free == {0: 24 * GIB}


async def test_out_of_memory_makes_room_and_is_tried_once_more(autojump_clock: MockClock) -> None:
    async with hungry(a=5, b=5) as (fleet, servers):
        await fleet.ask("a")
        await trio.sleep(5)
        servers.plan("b").dies_with = 1
        servers.plan("b").words = "cudaMalloc failed: out of memory"
        fleet.soon("b", name="request")
        await trio.sleep(0.5)
        assert servers.alive.keys() == {"a", "b"}, "there is room, by the numbers"
        servers.plan("b").dies_with = None
        await trio.sleep(10)
        assert fleet.of("request") != []
        assert fleet.of("left:")[0].endswith("b left: failed")
        assert fleet.of("left:")[1].endswith("a left: evicted")
        assert servers.launches["b"] == 2
        assert fleet.registry.ledger.held["b"].spot.bytes[0] == pytest.approx(5 * GIB * 1.15)
        assert fleet["b"].relief.adjusted == ()


async def test_out_of_memory_again_is_a_failure(autojump_clock: MockClock) -> None:
    async with hungry(a=5, max_load_attempts=7) as (fleet, servers):
        servers.plan("a").dies_with = 1
        servers.plan("a").words = "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory"
        await fleet.ask("a")
        assert servers.launches["a"] == 2
        assert fleet["a"].state.value == "failed"
        assert fleet.of("request-a")[-1].endswith("model_failed")
        assert fleet.registry.reset("a")[0]
        servers.plan("a").dies_with = None
        await fleet.ask("a")
        assert fleet["a"].state.value == "ready"


async def test_steps_are_taken_only_where_they_are_named_and_told(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a file that cannot be read are passed over."""

    async def run_sync(call: Callable[..., Any], *args: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return call(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    async with hungry(a=5) as (fleet, servers):
        own = attrs.evolve(
            fleet["a"].config, flags=("-c", "8192"), on_oom=(OomStep.FEWER_LAYERS, OomStep.SMALLER_CONTEXT)
        )
        fleet["a"].config = fleet["a"].supervisor.model = own
        plan = servers.plan("a")
        plan.dies_with, plan.words = 1, "failed to allocate compute buffers"
        fleet.soon("a")
        await trio.sleep(1.5)
        assert servers.launches["a"] == 2
        plan.dies_with = None
        await trio.sleep(5)
        assert status(fleet["a"])["adjusted"] == ["smaller_context: 8192 -> 4096 tokens"]
        assert servers.flags["a"] == ("-c", "8192", "-c", "4096")
        assert fleet["a"].state.value == "ready"
        await fleet.eject("a")
        assert status(fleet["a"])["adjusted"] == []
        await fleet.ask("a")
        assert servers.flags["a"] == ("-c", "8192"), "its own flags hold again"


async def test_replicas_of_what_is_preloaded_reserve_memory(autojump_clock: MockClock) -> None:
    servers = HungryServers(sizes={"a": 14.0})
    nvml = FakeNvml([servers.gpu], hang=servers.freed)

    devices = DeviceMonitor(gpu_devices=(0,), nvml=nvml, call=_inline)
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
