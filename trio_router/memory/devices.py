"""What the GPUs have: total, used and free memory, sampled for as long as the router runs.

`DeviceMonitor` keeps the last sample of all devices where anything may read it without waiting. A driver that fails
costs fresh numbers, never the router: the last good sample stays, marked stale.
"""

import enum
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import attrs
import trio

from trio_router.memory.nvml import Device, DriverFailed, NoDriver, NvmlSampler

__all__ = ["Device", "DeviceMonitor", "DeviceStatus", "Snapshot"]

PERIOD_SECONDS: Final = 2.0
CLOSE_PERIOD_SECONDS: Final = 0.1
"""How often they are looked at while somebody waits for memory; a look costs a thread 0.1 ms."""
NO_DRIVER_PERIOD_SECONDS: Final = 60.0
"""How often a machine without a driver is looked at again: it costs 2 ms, and a module may be loaded late."""
LONGEST_BACKOFF_SECONDS: Final = 60.0
SAMPLE_TIMEOUT_SECONDS: Final = 5.0


class DeviceStatus(enum.Enum):
    """What `/health` says of the GPUs."""

    OK = "ok"
    NONE = "none"
    """No GPU, no driver, or none wanted: a way to run, not a fault."""
    ERROR = "error"
    """There is a driver, and it fails."""


@attrs.frozen(kw_only=True)
class Snapshot:
    """All devices at one moment."""

    taken_at: float
    """Unix time at which `devices` were seen."""
    devices: tuple[Device, ...]
    """Those of `gpu_devices` that exist, by index."""
    status: DeviceStatus
    seen_at: float = -math.inf
    """Trio time at which the look at `devices` began: what happened before it is in their numbers."""
    stale: bool = False
    """The driver fails; `devices` is what it last said."""
    message: str | None = None


UNKNOWN: Final = Snapshot(taken_at=0.0, devices=(), status=DeviceStatus.NONE, message="nobody looks")
"""Where there is no monitor."""

Sample = tuple[tuple[Device, ...], str | None]
Call = Callable[[Callable[[], Sample]], Awaitable[Sample]]


def _own_thread() -> Call:
    """Runs a call in a thread; one at a time, so that a driver that hangs takes one thread and no more."""
    limiter = trio.CapacityLimiter(1)

    async def call(sample: Callable[[], Sample]) -> Sample:
        return await trio.to_thread.run_sync(sample, abandon_on_cancel=True, limiter=limiter)

    return call


@attrs.define(eq=False)
class DeviceMonitor:
    """Samples the devices of `system.gpu_devices` for as long as `run` runs."""

    gpu_devices: tuple[int, ...]
    """NVML indices; empty: NVML is never touched."""
    nvml: Any = attrs.field(default=None, repr=False)
    """Stands in for `pynvml`."""
    on_change: Callable[[Snapshot], None] = lambda _: None
    """Told when `status` or `message` change: once for a driver that is missing, not with every look."""
    on_sample: Callable[[], None] = lambda: None
    """Told of each look, whatever it showed."""
    call: Call = attrs.field(factory=_own_thread)
    """How the blocking sample is run; tests in virtual time run it inline."""
    clock: Callable[[], float] = time.time
    _snapshot: Snapshot = attrs.field(init=False)
    _seen: bool = attrs.field(default=False, init=False)
    _failures: int = attrs.field(default=0, init=False)
    _sampler: NvmlSampler | None = attrs.field(default=None, init=False)
    _close: bool = attrs.field(default=False, init=False)
    _closer: trio.Event = attrs.field(factory=trio.Event, init=False)

    def __attrs_post_init__(self) -> None:
        message = "not looked yet" if self.gpu_devices else "gpu_devices is empty: CPU only"
        self._snapshot = Snapshot(taken_at=self.clock(), devices=(), status=DeviceStatus.NONE, message=message)

    @property
    def snapshot(self) -> Snapshot:
        """The last sample; never waits."""
        return self._snapshot

    def look_closely(self, wanted: bool) -> None:
        """Whether somebody waits for memory: then the devices are looked at at once, and often."""
        if wanted and not self._close:
            self._closer.set()
        self._close = wanted

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Sample every 2 s, more often while `look_closely`; started once the first sample is there, or has taken too long.

        *Error handling*: nothing of NVML escapes. A driver that fails, or does not answer in 5 s, is started again
        after 2, 4, 8 ... 60 s; the last good devices stay, stale. A machine without a driver is `none`, and is
        looked at once a minute.

        *Cancellation*: at once; a sample under way is abandoned to its thread.
        """
        if not self.gpu_devices:
            task_status.started()
            await trio.sleep_forever()
        sampler = NvmlSampler(self.gpu_devices) if self.nvml is None else NvmlSampler(self.gpu_devices, self.nvml)
        self._sampler = sampler
        await self._look(sampler)
        task_status.started()
        while True:
            self._closer = trio.Event()
            with trio.move_on_after(self._pause()):
                await self._closer.wait()
            await self._look(sampler)
            self.on_sample()

    async def look(self) -> Snapshot | None:
        """A fresh sample, for somebody who must know what is there just now; None if there is none to be had."""
        if self._sampler is None or self._snapshot.status is not DeviceStatus.OK:
            return None
        await self._look(self._sampler)
        return self._snapshot if self._snapshot.status is DeviceStatus.OK else None

    def _pause(self) -> float:
        if self._failures:
            return min(LONGEST_BACKOFF_SECONDS, PERIOD_SECONDS * 2.0 ** min(self._failures - 1, 10))
        if self._snapshot.status is DeviceStatus.NONE:
            return NO_DRIVER_PERIOD_SECONDS
        return CLOSE_PERIOD_SECONDS if self._close else PERIOD_SECONDS

    async def _look(self, sampler: NvmlSampler) -> None:
        seen_at = trio.current_time()
        try:
            with trio.fail_after(SAMPLE_TIMEOUT_SECONDS):
                devices, message = await self.call(sampler.sample)
        except NoDriver as exc:
            # A driver that was there and went away is a fault; one that never was is not.
            self._failed(str(exc), DeviceStatus.ERROR if self._seen else DeviceStatus.NONE)
        except DriverFailed as exc:
            self._failed(str(exc), DeviceStatus.ERROR)
        except trio.TooSlowError:
            self._failed(f"NVML: no answer in {SAMPLE_TIMEOUT_SECONDS:.0f} s", DeviceStatus.ERROR)
        else:
            self._failures = 0
            self._seen = self._seen or bool(devices)
            status = DeviceStatus.OK if devices else DeviceStatus.NONE
            self._keep(
                Snapshot(taken_at=self.clock(), seen_at=seen_at, devices=devices, status=status, message=message)
            )

    def _failed(self, message: str, status: DeviceStatus) -> None:
        self._failures = 0 if status is DeviceStatus.NONE else self._failures + 1
        self._keep(attrs.evolve(self._snapshot, status=status, stale=self._seen, message=message))

    def _keep(self, snapshot: Snapshot) -> None:
        before, self._snapshot = self._snapshot, snapshot
        if (before.status, before.message) != (snapshot.status, snapshot.message):
            self.on_change(snapshot)
