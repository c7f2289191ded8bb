"""What every model is projected to need, read from its files once, at the start."""

import functools

import structlog
import trio

from trio_router.backend.launch import Launcher
from trio_router.config.places import DEMO_WHEEL
from trio_router.fleet.registry import Registry
from trio_router.memory.devices import DeviceMonitor, DeviceStatus
from trio_router.memory.footprint import CUDA_DRIVER_BYTES, VULKAN_DRIVER_BYTES, estimate
from trio_router.memory.gguf import GgufError
from trio_router.telemetry.events import ModelChanged

PATIENCE_SECONDS = 1.0
"""How long the router's start waits for the numbers; those of many models, or of a slow disk, come later."""

log = structlog.get_logger("trio_router.fleet")


async def fill_footprints(
    registry: Registry, launcher: Launcher, devices: DeviceMonitor, *, task_status: trio.TaskStatus[None]
) -> None:
    """Estimate each model's footprint, in the order of router.toml, and return; started after `PATIENCE_SECONDS` or so.

    Files are read in threads, one at a time: headers only, some 40 ms each. A model whose file is not there has none.

    *Cancellation*: at once; a file on a disk that hangs is left to its thread.
    """
    async with trio.open_nursery() as nursery:
        patience = await nursery.start(_wait, task_status)
        await _fill(registry, launcher, gpu=devices.snapshot.status is not DeviceStatus.NONE)
        patience.cancel()


async def _wait(started: trio.TaskStatus[None], task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    """Say `started` when time is up, or when the scope this is started with is cancelled."""
    with trio.move_on_after(PATIENCE_SECONDS) as scope:
        task_status.started(scope)
        await trio.sleep_forever()
    started.started()


async def _fill(registry: Registry, launcher: Launcher, *, gpu: bool) -> None:
    system = registry.config.system
    packaged = DEMO_WHEEL in launcher.server.path.parts
    look = functools.partial(
        estimate,
        multiplier=system.vram_multiplier,
        gpu=gpu,
        driver_bytes=VULKAN_DRIVER_BYTES if packaged else CUDA_DRIVER_BYTES,
    )
    limiter = trio.CapacityLimiter(1)
    for model in registry.models.values():
        try:
            model.footprint = await trio.to_thread.run_sync(look, model.config, limiter=limiter, abandon_on_cancel=True)
        except GgufError as error:
            model.footprint_problem = str(error)
            log.warning("no footprint", model=model.alias, error=str(error))
        else:
            registry.events.emit(ModelChanged(alias=model.alias))
