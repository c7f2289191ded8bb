"""A registry that runs, in virtual time, and a record of what it did."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from tests.fleet.fake_servers import FakeServers
from trio_router.backend.lifecycle import State
from trio_router.config.schema import ApiConfig, ModelConfig, RouterConfig, SystemConfig
from trio_router.errors import RouterError
from trio_router.fleet.model import Model
from trio_router.fleet.registry import Registry
from trio_router.fleet.scheduler import IDLE, Lease, Priority
from trio_router.memory.devices import DeviceMonitor
from trio_router.memory.host import HostMemory
from trio_router.telemetry.events import Event, Events, ModelChanged, Unloaded

HIGH, NORMAL, LOW = Priority
DEADLOCK_SECONDS = 1_000_000


def registry_of(
    servers: FakeServers, models: dict[str, int], devices: DeviceMonitor | None = None, **system
) -> Registry:
    """A registry of models with so many slots each; the host's memory has no bound."""
    config = RouterConfig(
        path=Path("router.toml"),
        api=ApiConfig(),
        system=SystemConfig(base_models_path=Path("/models"), **system),
        models={
            alias: ModelConfig(alias=alias, model_path=alias, file=Path("/models") / alias, slots=slots)
            for alias, slots in models.items()
        },
    )
    registry = Registry.of(config, servers, Events(), devices)
    registry.host = HostMemory(read=lambda: None)
    return registry


@attrs.define(eq=False, repr=False)
class Fleet:
    """A running registry, its servers, and what happened."""

    registry: Registry
    servers: FakeServers
    nursery: trio.Nursery
    record: list[str] = attrs.field(factory=list)
    """Times, states, and what became of requests."""

    def __getitem__(self, alias: str) -> Model:
        return next(model for model in self.registry.everyone() if model.alias == alias)

    @property
    def states(self) -> str:
        """Of all models, in the order of the file."""
        return " ".join(model.state.value for model in self.registry.models.values())

    def note(self, what: str) -> None:
        self.record.append(f"{trio.current_time():g} {what}")

    def hear(self, event: Event) -> None:
        match event:
            case ModelChanged(alias=alias):
                self.note(f"{alias} {self[alias].state.value}")
            case Unloaded(alias=alias, reason=reason):
                self.note(f"{alias} left: {reason.value}")

    def of(self, *words: str) -> list[str]:
        """The lines of the record that have one of the words."""
        return [line for line in self.record if any(word in line.split() for word in words)]

    async def lease(self, alias: str, priority: Priority = NORMAL) -> Lease:
        return await self.registry.lease(self.registry.ticket(alias, priority))

    async def ask(self, alias: str, seconds: float = 1.0, *, name: str = "", priority: Priority = NORMAL) -> None:
        """A request that runs for so long; noted when it begins and when it is refused."""
        name = name or f"request-{alias}"
        try:
            lease = await self.lease(alias, priority)
        except RouterError as error:
            self.note(f"{name} {error.code}")
            return
        except trio.Cancelled:
            self.note(f"{name} cancelled")
            raise
        try:
            self.note(f"{name} runs")
            await trio.sleep(seconds)
        finally:
            lease.release()

    def soon(
        self, alias: str, seconds: float = 1.0, *, name: str = "", priority: Priority = NORMAL
    ) -> trio.CancelScope:
        """Such a request in the background, and what cancels it."""
        scope = trio.CancelScope()

        async def ask() -> None:
            with scope:
                await self.ask(alias, seconds, name=name, priority=priority)

        self.nursery.start_soon(ask)
        return scope

    async def load(self, alias: str) -> None:
        """`registry.load`, noted."""
        try:
            await self.registry.load(alias)
        except RouterError as error:
            self.note(f"load-{alias} {error.code}")
        else:
            self.note(f"load-{alias} done")

    async def eject(self, alias: str, *, force: bool = False) -> None:
        """`registry.eject`, noted."""
        found = await self.registry.eject(alias, force=force)
        self.note(f"eject-{alias} {'done' if found else 'not-loaded'}")


@asynccontextmanager
async def running(
    servers: FakeServers, models: dict[str, int] | None = None, devices: DeviceMonitor | None = None, **system
) -> AsyncIterator[Fleet]:
    """A fleet that runs; its end is that of `Registry.run`, by cancellation, and leaves nothing."""
    registry = registry_of(servers, models or {"a": 1, "b": 1, "c": 1}, devices, **system)
    # the clock jumps to the bound as soon as everything waits for ever
    with servers.installed(), trio.fail_after(DEADLOCK_SECONDS):
        async with trio.open_nursery() as run:
            await run.start(registry.run)
            async with trio.open_nursery() as nursery:
                fleet = Fleet(registry, servers, nursery)
                registry.events.sinks.append(fleet.hear)
                yield fleet
                nursery.cancel_scope.cancel()
            run.cancel_scope.cancel()
    assert servers.alive == {}
    for model in registry.models.values():
        assert model.scheduler.statistics() == IDLE, model.alias
        assert model.state in {State.OFF, State.FAILED}, model.alias
        assert (model.asked, model.retiring, model.scope) == (0, None, None), model.alias
        assert (model.supervisor.backend, model.supervisor.pid) == (None, None), model.alias
