"""What every model needs, as well as it is known now.

It is told by its file at the start, by llama-server a little later, and by the devices once it was loaded; `memory.needs`
says which of these is believed.

    fill     at the start and after a reload: reads the models' files
    run      asks llama-servers, one at a time and only while nothing is loaded or unloaded; takes down what loads took

*Error handling*: a model of which nothing can be found out has no footprint, and says why. Nothing here ends the router.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import attrs
import structlog
import trio

from trio_router.backend.dry_run import can_say, project
from trio_router.backend.launch import Launcher, LaunchFailed
from trio_router.backend.scales import Scales, load_between
from trio_router.backend.weighing import Weighed
from trio_router.config.schema import ModelConfig
from trio_router.fleet.model import Model
from trio_router.fleet.registry import Registry
from trio_router.memory.devices import DeviceMonitor, DeviceStatus, Snapshot
from trio_router.memory.fingerprint import fingerprint, server_print
from trio_router.memory.footprint import MIB, Footprint, driver_allowance, estimate
from trio_router.memory.gguf import GgufError
from trio_router.memory.learned import DriverFacts, Learned
from trio_router.memory.needs import best, shared
from trio_router.telemetry.events import Event, ModelChanged, Unloaded

PATIENCE_SECONDS: Final = 1.0
"""How long the router's start waits for the numbers; those of many models, or of a slow disk, come later."""
LEAST_FREE_BYTES: Final = 1024 * MIB
"""With less free on a device, no llama-server is started there to be asked: its driver needs some hundred MiB."""
DOUBTFUL_BYTES: Final = 512 * MIB
DOUBTFUL_SHARE: Final = 0.25
"""So far from what llama-server said itself, the difference is somebody else's."""

Result = TypeVar("Result")

log = structlog.get_logger("trio_router.fleet")


@attrs.frozen(kw_only=True)
class _Known:
    """What a model's files say."""

    print: str
    """Its fingerprint."""
    formula: Footprint


@attrs.define(eq=False, kw_only=True)
class Footprints:
    """Fills in `Model.footprint`, and keeps it true."""

    registry: Registry
    launcher: Launcher
    devices: DeviceMonitor
    learned: Learned
    scales: Scales = attrs.field(init=False)
    _server: str = ""
    _allowance: int = 0
    _known: dict[str, _Known] = attrs.field(factory=dict)
    _asked: set[str] = attrs.field(factory=set)
    _work: trio.Event = attrs.field(factory=trio.Event)
    _limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1))
    _news: trio.MemorySendChannel[tuple[ModelConfig, Weighed]] = attrs.field(init=False)
    _inbox: trio.MemoryReceiveChannel[tuple[ModelConfig, Weighed]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.scales = Scales(self.devices)
        self._news, self._inbox = trio.open_memory_channel[tuple[ModelConfig, Weighed]](math.inf)

    async def fill(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Estimate each model's footprint, in the order of router.toml; started after `PATIENCE_SECONDS` or so.

        Files are read in threads, one at a time: headers only, some 40 ms each. A model whose file is not there has none.

        *Cancellation*: at once; a file on a disk that hangs is left to its thread.
        """
        for model in self.registry.models.values():
            for each in (model, *model.replicas):
                each.supervisor.weighing.scales = self.scales
            model.supervisor.weighing.told = partial(self._hear, model.alias)
            model.weigh = self._read
        async with trio.open_nursery() as nursery:
            patience = await nursery.start(_wait, task_status)
            await self._fill()
            patience.cancel()
        self._work.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Learn for as long as the router runs.

        *Cancellation*: at once; a llama-server that is being asked is ended.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_down)
            task_status.started()
            while True:
                await self._work.wait()
                self._work = trio.Event()
                for model in list(self.registry.models.values()):
                    if model.footprint is None and model.footprint_problem is None:
                        await self._read(model)
                    await self._ask(model)

    def hear(self, event: Event) -> None:
        """A sink: a model that left memory may go by another entry now, or leave room for a question."""
        if isinstance(event, Unloaded):
            self._work.set()

    # --- from files ---------------------------------------------------------------------------------

    async def _fill(self) -> None:
        if not self._server:
            path = self.launcher.server.path
            await self._in_thread(self.learned.read)
            self._allowance = await self._in_thread(partial(driver_allowance, path))
            names = [device.name for device in self.devices.snapshot.devices]
            self._server = await self._in_thread(partial(server_print, path, names))
            self._count_strays()
        for model in list(self.registry.models.values()):
            await self._read(model)

    async def _read(self, model: Model) -> None:
        config = model.config
        gpu = self.devices.snapshot.status is not DeviceStatus.NONE
        look = partial(estimate, config, multiplier=1.0, gpu=gpu, driver_bytes=self._allowance)
        try:
            formula = await self._in_thread(look)
        except GgufError as error:
            model.footprint_problem = str(error)
            log.warning("no footprint", model=model.alias, error=str(error))
            return
        name = await self._print(config)
        if model.config is config:
            self._known[model.alias] = _Known(print=name, formula=formula)
            self._apply(model)

    def _apply(self, model: Model) -> None:
        """Put together what is known of it now."""
        known = self._known.get(model.alias)
        if known is None:
            return
        facts = self.learned.model(known.print)
        multiplier = self.registry.config.system.vram_multiplier
        footprint = best(model.config, known.formula, facts, self._driver(), multiplier=multiplier)
        if footprint != model.footprint:
            model.footprint, model.footprint_problem = footprint, None
            self.registry.events.emit(ModelChanged(alias=model.alias))

    def _driver(self) -> DriverFacts | None:
        uuids = {device.uuid: device.name for device in self.devices.snapshot.devices}
        return self.learned.driver(self._server, uuids)

    def _count_strays(self) -> None:
        devices = {device.uuid: device.index for device in self.devices.snapshot.devices}
        strays = self.learned.strays(self._server, devices)
        self.registry.ledger.strays = {devices[uuid]: size for uuid, size in strays.items()}

    async def _print(self, config: ModelConfig) -> str:
        return await self._in_thread(partial(fingerprint, config, self._server))

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await trio.to_thread.run_sync(call, limiter=self._limiter, abandon_on_cancel=True)

    # --- from llama-servers -------------------------------------------------------------------------

    async def _ask(self, model: Model) -> None:
        """Have its llama-server say what it would take, if nobody knows yet and there is a GPU that it matters for."""
        known = self._known.get(model.alias)
        if known is None or known.print in self._asked or not can_say(model.config):
            return
        while self.learned.model(known.print).projection is None:
            await self.scales.until_quiet()
            before = await self.devices.look()
            if before is None or not _room_to_ask(before):
                return
            if self.scales.under_way:  # begun while we looked
                continue
            async with self.scales.probing():
                await self._ask_now(model, known.print, before)
            if known.print in self._asked:
                await self._know()
                return

    async def _ask_now(self, model: Model, name: str, before: Snapshot) -> None:
        async def see_driver(pid: int) -> None:
            after = await self.devices.look()
            load = None if after is None else load_between(before.devices, after.devices, pid)
            for held in () if load is None else load.held:
                self.learned.idle(self._server, held)

        try:
            projection = await project(self.launcher, model.config, model.supervisor.number, see_driver)
        except LaunchFailed as error:
            log.info("llama-server was not asked", model=model.alias, error=str(error))
            projection = None
        self._asked.add(name)
        if projection is not None:
            self.learned.projected(name, self._server, projection)

    # --- from loads ---------------------------------------------------------------------------------

    def _hear(self, alias: str, told: Weighed) -> None:
        """A load is over, or the end of what was loaded near."""
        self._work.set()
        if told != Weighed() and alias in self.registry.models:
            self._news.send_nowait((self.registry.models[alias].config, told))

    async def _take_down(self) -> None:
        async for config, told in self._inbox:
            model = self.registry.models.get(config.alias)
            if model is None or model.config is not config:
                continue
            known = self._known.get(model.alias)
            if known is None or await self._print(model.config) != known.print:  # another file by now
                await self._read(model)
                known = self._known.get(model.alias)
            if known is not None:
                self._learn(model, known.print, told)
                await self._know()

    def _learn(self, model: Model, name: str, told: Weighed) -> None:
        if told.projection is not None:
            self.learned.projected(name, self._server, told.projection)
            self._apply(model)
        if told.end is not None:
            self.learned.used(name, told.end)
        if told.load is None or model.footprint is None:
            return
        took = told.load.bytes
        first = 0 if told.load.alone else shared(self._driver())
        expected = model.footprint.over(len(told.load.held)) - first
        by_gpu = [round(held.bytes / MIB) for held in told.load.held]
        log.info("weighed", model=model.alias, mb=by_gpu, expected_mb=round(expected / MIB))
        if told.shrunk:
            return
        said = self.learned.model(name).projection is not None
        if said and abs(took - expected) > max(DOUBTFUL_BYTES, DOUBTFUL_SHARE * expected):
            log.warning("not believed: other programs took memory, or gave it back", model=model.alias)
            return
        self.learned.loaded(name, self._server, told.load)

    async def _know(self) -> None:
        """Something was learned."""
        self._count_strays()
        for model in self.registry.models.values():
            self._apply(model)
        await self._in_thread(self.learned.save)


def _room_to_ask(devices: Snapshot) -> bool:
    return all(device.free_bytes is None or device.free_bytes >= LEAST_FREE_BYTES for device in devices.devices)


async def _wait(started: trio.TaskStatus[None], task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    """Say `started` when time is up, or when the scope this is started with is cancelled."""
    with trio.move_on_after(PATIENCE_SECONDS) as scope:
        task_status.started(scope)
        await trio.sleep_forever()
    started.started()
