"""One model's loads on the scales: what its supervisor tells at each stage of an incarnation."""

import time
from collections.abc import Callable
from typing import Protocol

import attrs
import structlog
import trio

from trio_router.backend.scales import Before, Moving, Scales
from trio_router.memory.learned import Load
from trio_router.memory.projection import Projection, StartLog

log = structlog.get_logger("trio_router.backend")


@attrs.frozen(kw_only=True)
class Weighed:
    """What became known of a load, as far as it did."""

    load: Load | None = None
    """What it took."""
    end: Load | None = None
    """The same near its end, after use."""
    projection: Projection | None = None
    """What llama-server said that it would take."""
    shrunk: bool = False
    """It took less than that, for memory was short: no measure for another time."""


Told = Callable[[Weighed], None]


class Heard(Protocol):
    """A process whose lines can be listened to."""

    hear: Callable[[str], None] | None

    @property
    def pid(self) -> int:
        """Its number."""


@attrs.define(eq=False)
class Weighing:
    """What one model's llama-server said of its memory, and took."""

    alias: str
    scales: Scales = attrs.field(factory=Scales)
    told: Told = lambda _: None
    """Told at each load, and at its end."""
    said: StartLog = attrs.field(factory=StartLog)
    """At the start at hand, or the last one."""
    _before: Before | None = None
    _moving: Moving | None = None
    _pid: int | None = None
    """Of one that was weighed when it was ready."""
    _ready_at: float = 0.0
    """Unix time since which it is."""

    async def prepare(self) -> None:
        """A llama-server is about to be started: `spawned` follows, or `stopped`."""
        self._end()
        self._moving = self.scales.moving()
        self._before = await self.scales.before()

    def spawned(self, process: Heard) -> None:
        """It begins to take memory."""
        self.said = StartLog()
        self._pid = None
        process.hear = self.said.hear

    def ready(self, life: trio.Nursery, process: Heard) -> None:
        """It has all it takes; what that is is told from `life`."""
        process.hear = None
        if fitted := self.said.fitted:
            log.warning("llama-server took less than it might have", model=self.alias, has="; ".join(fitted))
        if self._before is None or self._moving is None:
            self._end()
        else:
            life.start_soon(self._weigh, self._moving, self._before, process.pid)

    def stopping(self) -> None:
        """It is about to give it back."""
        if self._before is not None and self._pid is not None and self._moving is None:
            end = self.scales.lately(self._before, self._pid, self._ready_at)
            if end is not None:
                self.told(Weighed(end=end))
        giving = self.scales.moving()
        self._end()
        self._moving = giving

    def stopped(self) -> None:
        """It is gone."""
        self._end()

    async def _weigh(self, taking: Moving, before: Before, pid: int) -> None:
        try:
            load = await self.scales.after(before, pid)
        finally:
            taking.end()
            if self._moving is taking:
                self._moving = None
        if load is not None:
            self._pid, self._ready_at = pid, time.time()
        self.told(Weighed(load=load, projection=self.said.projection, shrunk=bool(self.said.fitted)))

    def _end(self) -> None:
        if self._moving is not None:
            self._moving.end()
            self._moving = None
