"""What a llama-server takes of the devices: their used memory before its start and once it is ready.

That is its own only if nothing else moved meanwhile. So every start and end of a process of ours is noted (`moving`), and
other processes that NVML lists must hold the same before and after. A load that cannot be told from others is not
weighed; the next one may be.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

import attrs
import trio

from trio_router.memory.devices import Device, DeviceMonitor, Snapshot
from trio_router.memory.learned import Held, Load
from trio_router.memory.projection import MIB

TOLERANCE_BYTES: Final = 4 * MIB
LEAST_BYTES: Final = 32 * MIB
"""A device that holds less more than before is not one that the process computes on: on two H200, Vulkan's driver took 8
to 16 MiB of the first for processes on the second, and 48 to 55 MiB of the one that they were on."""


@attrs.frozen(kw_only=True)
class Before:
    """The devices just before a start."""

    snapshot: Snapshot
    moves: int


@attrs.define(eq=False)
class Moving:
    """A process that takes memory or gives it back, for as long as it does."""

    scales: "Scales"
    _ended: bool = False

    def end(self) -> None:
        """It is done; the second time nothing happens."""
        if not self._ended:
            self._ended = True
            self.scales.ended()


@attrs.define(eq=False)
class Scales:
    """One for all models of a router. Without `devices` nothing is weighed."""

    devices: DeviceMonitor | None = None
    under_way: int = 0
    moves: int = 0
    """How many of our processes began to take memory, or to give it back."""
    _probe: trio.CancelScope | None = None
    _probe_ended: trio.Event = attrs.field(factory=trio.Event)
    _quiet: trio.Event = attrs.field(factory=trio.Event)

    def moving(self) -> Moving:
        """A process of ours begins to take memory or to give it back."""
        self.under_way += 1
        self.moves += 1
        if self._probe is not None:
            self._probe.cancel()
        return Moving(self)

    def ended(self) -> None:
        """One that was moving does no more."""
        self.under_way -= 1
        if not self.under_way:
            self._quiet.set()
            self._quiet = trio.Event()

    async def until_quiet(self) -> None:
        """Return when nothing of ours moves."""
        while self.under_way:
            await self._quiet.wait()

    @asynccontextmanager
    async def probing(self) -> AsyncIterator[None]:
        """Hold a process that is not a model's; what is in here is cancelled as soon as a model's load begins."""
        self._probe = trio.CancelScope()
        with self._probe:
            try:
                yield
            finally:
                self._probe = None
                self._probe_ended.set()
                self._probe_ended = trio.Event()

    async def before(self) -> Before | None:
        """Look before the start of a llama-server that is `moving` already; None where it cannot be weighed."""
        if self.devices is None or not self.devices.snapshot.devices:
            return None
        if self._probe is not None:
            await self._probe_ended.wait()
        moves = self.moves
        if self.under_way != 1:
            return None
        snapshot = await self.devices.look()
        return None if snapshot is None or self._disturbed(moves) else Before(snapshot=snapshot, moves=moves)

    async def after(self, before: Before, pid: int) -> Load | None:
        """What the process took that was started after `before`, is ready, and still `moving`; None if others moved too."""
        if self.devices is None or self._disturbed(before.moves):
            return None
        snapshot = await self.devices.look()
        if snapshot is None or self._disturbed(before.moves):
            return None
        return load_between(before.snapshot.devices, snapshot.devices, pid)

    def lately(self, before: Before, pid: int, since: float) -> Load | None:
        """What the process took by the last look, if that was after Unix time `since` and nothing else moved at all."""
        if self.devices is None or self.under_way or self.moves != before.moves or self._probe is not None:
            return None
        snapshot = self.devices.snapshot
        if snapshot.stale or snapshot.taken_at <= since:
            return None
        return load_between(before.snapshot.devices, snapshot.devices, pid)

    def _disturbed(self, moves: int) -> bool:
        return self.under_way != 1 or self.moves != moves


def load_between(before: tuple[Device, ...], after: tuple[Device, ...], pid: int) -> Load | None:
    """What process `pid` took between two looks; None if they cannot say, or others moved."""
    held: list[Held] = []
    strays: list[Held] = []
    alone = True
    was = {device.uuid: device for device in before}
    for device in after:
        first = was.get(device.uuid)
        if first is None or device.used_bytes is None or first.used_bytes is None:
            return None
        others = {other: size for other, size in device.processes.items() if other != pid}
        if others.keys() != dict(first.processes).keys():
            return None
        if abs(_sum(others.values()) - _sum(first.processes.values())) > TOLERANCE_BYTES:
            return None
        taken = device.used_bytes - first.used_bytes
        if taken < (device.processes.get(pid) or 0) - TOLERANCE_BYTES:  # somebody unlisted gave memory back
            return None
        if taken > 0:
            here = Held(uuid=device.uuid, device=device.name, bytes=taken)
            (held if taken >= LEAST_BYTES else strays).append(here)
        if taken >= LEAST_BYTES:
            alone = alone and not others
    return Load(held=tuple(held), strays=tuple(strays), alone=alone) if held else None


def _sum(sizes: Iterable[int | None]) -> int:
    return sum(size or 0 for size in sizes)
