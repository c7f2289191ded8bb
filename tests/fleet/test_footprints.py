"""What is learned about models' memory while a fleet runs, on a fake driver and in virtual time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.fleet.fake_servers import FakeServers
from tests.fleet.fleet import Fleet
from tests.memory import gguf_bytes
from tests.memory.fake_nvml import FakeGpu, FakeNvml
from trio_router.backend.launch import LaunchFailed
from trio_router.config import LlamaServer
from trio_router.config.schema import ApiConfig, ModelConfig, RouterConfig, SystemConfig
from trio_router.fleet import footprints
from trio_router.fleet.footprints import Footprints
from trio_router.fleet.registry import Registry
from trio_router.fleet.reload import compare
from trio_router.memory.devices import DeviceMonitor
from trio_router.memory.footprint import Trust
from trio_router.memory.learned import Learned
from trio_router.memory.projection import MIB, Projection, Share
from trio_router.telemetry.events import Events


async def inline(sample):
    await trio.lowlevel.checkpoint()
    return sample()


@attrs.define(eq=False)
class Servers(FakeServers):
    """llama-servers that take memory of a device, and say what they will take."""

    gpu: FakeGpu = attrs.field(factory=lambda: FakeGpu("GPU-0", used=0))
    takes: dict[str, int] = attrs.field(factory=dict)
    """MiB, by alias."""
    says: dict[str, int | str] = attrs.field(factory=dict)
    """MiB; or why it cannot be asked."""
    asked: list[str] = attrs.field(factory=list)
    driver: int = 50
    server: LlamaServer = attrs.field(factory=lambda: LlamaServer(path=Path("/nowhere/llama-server")))

    def launch(self, model: ModelConfig, *args):
        process, address = super().launch(model, *args)
        self.gpu.used += self.takes.get(model.alias, 0) * MIB
        self.gpu.compute.append((process.pid, None))
        return process, address

    def gone(self, server) -> None:
        super().gone(server)
        self.gpu.used -= self.takes.get(server.alias, 0) * MIB
        self.gpu.compute.remove((server.pid, None))

    async def project(self, launcher, model: ModelConfig, number: int, look) -> Projection | None:
        self.asked.append(model.alias)
        self.gpu.used += self.driver * MIB
        self.gpu.compute.append((9999, None))
        try:
            await trio.sleep(0.3)
            answer = self.says.get(model.alias)
            if isinstance(answer, str):
                raise LaunchFailed(answer)
            if answer is None:
                return None
            await look(9999)
            return Projection(devices=(Share(name="CUDA0", model=answer * MIB, context=0, compute=0),))
        finally:
            self.gpu.used -= self.driver * MIB
            self.gpu.compute.remove((9999, None))


@attrs.define(eq=False)
class Learning:
    """A fleet that learns."""

    fleet: Fleet
    footprints: Footprints
    servers: Servers

    async def until(self, alias: str, trust: Trust) -> int:
        """MiB that the model is expected to show on the device, once it is known so well."""
        with trio.fail_after(60):
            while (found := self.fleet[alias].footprint) is None or found.trust is not trust:  # noqa: ASYNC110
                await trio.sleep(0.1)
        return round(found.projected_device_bytes / MIB)

    async def loaded(self, alias: str) -> None:
        """Load it, have it weighed, and unload it."""
        await self.fleet.registry.load(alias)
        await trio.sleep(1)
        await self.fleet.registry.eject(alias)


@asynccontextmanager
async def learning(servers: Servers, folder: Path, **models: int | None) -> AsyncIterator[Learning]:
    """Models with so many MiB declared."""
    file = folder / "m.gguf"
    if not file.exists():
        gguf_bytes.write_llama(file)
    config = RouterConfig(
        path=folder / "router.toml",
        api=ApiConfig(),
        system=SystemConfig(base_models_path=folder, vram_multiplier=2.0),
        models={
            alias: ModelConfig(alias=alias, model_path="m", file=file, flags=("-c", "512", alias), vram_mb=declared)
            for alias, declared in models.items()
        },
    )
    monitor = DeviceMonitor(gpu_devices=(0,), nvml=FakeNvml([servers.gpu]), call=inline)
    registry = Registry.of(config, servers, Events(), monitor)
    found = Footprints(registry=registry, launcher=servers, devices=monitor, learned=Learned(folder / "state"))
    registry.events.sinks.append(found.hear)
    with servers.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprints, "project", servers.project)
        patch.setattr(Footprints, "_in_thread", staticmethod(inline))
        async with trio.open_nursery() as nursery:
            await nursery.start(monitor.run)
            await nursery.start(found.fill)
            await nursery.start(registry.run)
            await nursery.start(found.run)
            yield Learning(Fleet(registry, servers, nursery), found, servers)
            nursery.cancel_scope.cancel()


async def test_from_the_file_to_the_first_load(tmp_path: Path, autojump_clock: MockClock) -> None:
    servers = Servers(says={"a": 285}, takes={"a": 340})
    async with learning(servers, tmp_path, a=None) as run:
        assert run.fleet["a"].footprint.trust is Trust.FORMULA
        assert await run.until("a", Trust.PROJECTED) == 285 + 50  # the driver's own was seen meanwhile
        assert run.fleet["a"].footprint.device_bytes == 2 * 335 * MIB
        await run.loaded("a")
        assert await run.until("a", Trust.MEASURED) == 340
        assert run.fleet["a"].footprint.device_bytes == (340 + 8) * MIB  # it took no more in use
        assert servers.asked == ["a"]
    async with learning(servers, tmp_path, a=None) as run:
        assert await run.until("a", Trust.MEASURED) == 340
        await wait_all_tasks_blocked()
        assert servers.asked == ["a"]


async def test_one_load_teaches_the_drivers_part_for_all(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with learning(Servers(says={"a": 285, "b": 1551}, takes={"a": 340}), tmp_path, a=None, b=None) as run:
        assert await run.until("b", Trust.PROJECTED) == 1601
        await run.loaded("a")
        await run.until("a", Trust.MEASURED)
        assert await run.until("b", Trust.PROJECTED) == 1551 + 55


async def test_what_it_takes_in_use_is_reserved_the_next_time(tmp_path: Path, autojump_clock: MockClock) -> None:
    servers = Servers(says={"a": 285, "b": 1}, takes={"a": 340, "b": 10})
    async with learning(servers, tmp_path, a=None, b=None) as run:
        await run.fleet.registry.load("a")
        await run.until("a", Trust.MEASURED)
        assert run.fleet["a"].footprint.device_bytes == (340 + 32) * MIB
        servers.takes["a"] += 21
        servers.gpu.used += 21 * MIB
        await trio.sleep(5)
        await run.fleet.registry.eject("a")
        await trio.sleep(1)
        found = run.fleet["a"].footprint
        assert (found.projected_device_bytes, found.device_bytes) == (340 * MIB, 361 * MIB)
        servers.takes["a"] = 340
        await run.fleet.registry.load("a")
        await run.fleet.registry.load("b")  # now nobody can say whose the rest is
        servers.takes["a"] += 50
        servers.gpu.used += 50 * MIB
        await trio.sleep(5)
        await run.fleet.registry.eject("a")
        await trio.sleep(1)
        assert run.fleet["a"].footprint.device_bytes <= 361 * MIB


async def test_what_is_declared_stands_until_it_was_measured(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with learning(Servers(takes={"a": 340}, says={"a": "no such file"}), tmp_path, a=400) as run:
        assert await run.until("a", Trust.DECLARED) == 400
        await run.loaded("a")
        assert await run.until("a", Trust.MEASURED) == 340


async def test_nobody_is_asked_while_something_is_loaded(tmp_path: Path, autojump_clock: MockClock) -> None:
    servers = Servers(says={"a": 285, "b": 100}, takes={"a": 340})
    async with learning(servers, tmp_path, a=None, b=None) as run:
        with trio.fail_after(5):
            while not servers.asked:  # noqa: ASYNC110
                await trio.sleep(0.05)
        await run.fleet.registry.load("a")  # ends the question, which is asked again later
        assert servers.gpu.used == 340 * MIB
        assert await run.until("a", Trust.MEASURED) == 340
        assert await run.until("b", Trust.PROJECTED) == 100 + 55
        assert servers.asked == ["a", "a", "b"]


async def test_nobody_is_asked_where_there_is_no_room(tmp_path: Path, autojump_clock: MockClock) -> None:
    servers = Servers(says={"a": 285})
    servers.gpu.used = servers.gpu.total - 500 * MIB
    async with learning(servers, tmp_path, a=None) as run:
        await trio.sleep(60)
        assert (servers.asked, run.fleet["a"].footprint.trust) == ([], Trust.FORMULA)


async def test_one_that_does_not_say_is_asked_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    servers = Servers(takes={"a": 340})
    async with learning(servers, tmp_path, a=None) as run:
        await trio.sleep(1)
        await run.loaded("a")
        await run.loaded("a")
        assert await run.until("a", Trust.MEASURED) == 340
        assert servers.asked == ["a"]


async def test_what_others_took_meanwhile_is_not_believed(tmp_path: Path, autojump_clock: MockClock) -> None:
    servers = Servers(says={"a": 285}, takes={"a": 340 + 2000})
    async with learning(servers, tmp_path, a=None) as run:
        await run.until("a", Trust.PROJECTED)
        await run.loaded("a")
        await trio.sleep(60)
        assert run.fleet["a"].footprint.trust is Trust.PROJECTED


async def test_a_model_that_was_shrunk_is_no_measure(tmp_path: Path, autojump_clock: MockClock) -> None:
    servers = Servers(says={"a": 385}, takes={"a": 340})
    async with learning(servers, tmp_path, a=None) as run:
        await run.until("a", Trust.PROJECTED)
        servers.plan("a").words = "load_tensors: offloaded 20/31 layers to GPU"
        await run.loaded("a")
        await trio.sleep(60)
        assert run.fleet["a"].footprint.trust is Trust.PROJECTED
        assert run.fleet["a"].supervisor.weighing.said.fitted == ("20 of 31 layers on GPUs",)


async def test_another_entry_of_the_file_is_another_model(tmp_path: Path, autojump_clock: MockClock) -> None:
    servers = Servers(says={"a": 285}, takes={"a": 340})
    async with learning(servers, tmp_path, a=None) as run:
        await run.loaded("a")
        await run.until("a", Trust.MEASURED)
        await run.fleet.registry.load("a")
        registry = run.fleet.registry
        other = attrs.evolve(registry.config.models["a"], flags=("-c", "4096"))
        registry.apply(compare(registry.config, attrs.evolve(registry.config, models={"a": other})))
        with trio.fail_after(60):
            while run.fleet["a"].config is not other or run.fleet["a"].footprint is None:  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert await run.until("a", Trust.MEASURED) == 340
        assert len(run.footprints.learned.facts.models) == 2
