"""What is reserved on each device: before a process exists, until its memory was seen free again.

A reservation is made when it is decided that a model is loaded. What may be reserved then is what NVML showed free last,
less `system.vram_reserve_mb`, less every reservation whose load was under way at that moment: of these nobody knows how
much they had taken already, so all of it is counted. Once a sample was begun after a model was ready, everything it
takes is in NVML's numbers, but for the little that it takes when it is first used (`Reservation.growth`), be it by the
last of its requests while it is on its way out; beyond that its reservation only says what its leaving would free. Other
programs' memory is never free, so it counts by itself.

A model that left is remembered until a sample shows its memory free, or one begun `SEEN_SECONDS` later does not: drivers
free it a little after the process is gone, and who waits for it had better not have another model leave meanwhile. It is
the samples' time that counts: a router that had no turn for those seconds has not looked.

When the driver fails, the last good sample stands (`Snapshot.stale`): models that were loaded since are counted in full,
those that left since are believed to have freed their memory `SEEN_SECONDS` later.

The host's memory has no such numbers. The pages of a file that is mapped count as available, and yet a model without them
is read from the disk for every token. So there the sum of all reservations must stay below `system.ram_budget_mb`, by
default `RAM_SHARE` of what was available when no model was loaded; and a load must fit into that share of what is
available now.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Final

import attrs
import structlog

from trio_router.memory.devices import Device, Snapshot
from trio_router.memory.room import RAM, Room, Spot

MIB: Final = 1024 * 1024
SEEN_SECONDS: Final = 2.0
"""How long the memory of a model that left is waited for. Measured on an H100: it is back 0.1 ms after the exit; what was
not seen after this long was mostly taken by another load meanwhile, and to wait longer would only delay the next one."""
HIDDEN_SECONDS: Final = 0.5
"""How long, when others were loaded since: what they took hides what became free."""
SEEN_SHARE: Final = 0.85
"""Of what a model had reserved: with so much free again it counts as gone. Projections may be too large."""
RAM_SHARE: Final = 0.9

log = structlog.get_logger("trio_router.memory")


@attrs.define(eq=False, kw_only=True)
class Reservation:
    """What one model holds, or may take at any moment."""

    spot: Spot
    known: bool
    """Whether it is known how much the model needs."""
    free_before: Mapping[int, int]
    """What the devices showed free when it was made."""
    ready_at: float | None = None
    """Trio time since which everything is taken; None while it is loaded."""
    leaving: bool = False
    growth: int = 0
    """Of its bytes on GPUs, what it takes only when it is used."""

    def growing(self, device: int) -> int:
        """How much of that is on `device`."""
        whole = sum(self.spot.device_bytes.values())
        return self.growth * self.spot.bytes.get(device, 0) // whole if whole else 0

    def settled(self, seen_at: float) -> bool:
        """Whether a sample begun at `seen_at` shows all it takes."""
        return self.ready_at is not None and self.ready_at < seen_at


@attrs.frozen(kw_only=True)
class _Gone:
    alias: str
    bytes: Mapping[int, int]
    growth: Mapping[int, int]
    """Of these, what was taken only in use: a sample before it left shows it free, whether it was taken since or not."""
    ready_at: float
    """Infinite if it never was."""
    left_at: float
    free_before: Mapping[int, int]
    sampled_at: float
    """When that was: models that took their memory since are not in it."""

    def unseen(self, seen_at: float) -> bool:
        """Whether a sample begun then may show free what it took after that, and has perhaps not freed yet."""
        return seen_at <= min(self.ready_at, self.left_at)

    def overdue(self, devices: Snapshot, now: float) -> bool:
        """Whether its memory is waited for no longer: as of the last look, if more will come."""
        return (now if devices.stale else devices.seen_at) >= self.left_at + SEEN_SECONDS


@attrs.frozen(kw_only=True)
class _Account:
    """One device's part of a `Room`."""

    free: int
    coming: int
    most: int


@attrs.define(eq=False, kw_only=True)
class Ledger:
    """All reservations of one router. Times are trio times."""

    reserve_bytes: int = 0
    """Of each device, what is left to others."""
    ram_bytes: int | None = None
    """What all models together may take of the host's memory; None: a share of what is available."""
    strays: Mapping[int, int] = attrs.field(factory=dict)
    """What a process takes of devices that it does not compute on, by device."""
    held: dict[str, Reservation] = attrs.field(factory=dict)
    """By alias."""
    _gone: list[_Gone] = attrs.field(factory=list)
    _ram_budget: int | None = None

    # --- what happens -----------------------------------------------------------------------------

    def reserve(self, alias: str, spot: Spot, devices: Snapshot, *, known: bool = True, growth: int = 0) -> Reservation:
        """The model is about to be loaded there, and may take `growth` more bytes in use than it does then."""
        self.held[alias] = Reservation(spot=spot, known=known, growth=growth, free_before=_free(devices))
        return self.held[alias]

    def ready(self, alias: str, now: float) -> None:
        """It has taken all it takes."""
        if alias in self.held:
            self.held[alias].ready_at = now

    def reloading(self, alias: str, devices: Snapshot) -> None:
        """Its process is gone, and unless it is on its way out, another one will take the same again."""
        reservation = self.held.get(alias)
        if reservation is not None and not reservation.leaving:
            reservation.ready_at, reservation.free_before = None, _free(devices)

    def leaving(self, alias: str) -> None:
        """It is on its way out."""
        if alias in self.held:
            self.held[alias].leaving = True

    def left(self, alias: str, devices: Snapshot, now: float) -> None:
        """Its process is gone; its memory is not yet seen free."""
        reservation = self.held.pop(alias, None)
        if reservation is not None and (sizes := reservation.spot.device_bytes):
            ready_at = math.inf if reservation.ready_at is None else reservation.ready_at
            self._gone.append(
                _Gone(
                    alias=alias,
                    bytes=sizes,
                    growth={device: reservation.growing(device) for device in sizes},
                    ready_at=ready_at,
                    left_at=now,
                    free_before=_free(devices),
                    sampled_at=devices.seen_at,
                )
            )

    # --- what follows -----------------------------------------------------------------------------

    def room(self, devices: Snapshot, available: int | None, now: float, *, pinned: Collection[str] = ()) -> Room:
        """What may be reserved now.

        `available` is what the host's memory has left, None where that is not ours to bound. Models that are `pinned`
        do not leave for others.
        """
        self._forget(devices, now)
        told = [
            device for device in devices.devices if device.free_bytes is not None and device.total_bytes is not None
        ]
        accounts = {device.index: self._device(device, devices, now, pinned) for device in told}
        if (ram := self._ram(available, pinned)) is not None:
            accounts[RAM] = ram
        return Room(
            devices=tuple(device.index for device in devices.devices),
            free={index: account.free for index, account in accounts.items()},
            coming={index: account.coming for index, account in accounts.items()},
            most={index: account.most for index, account in accounts.items()},
            strays={index: size for index, size in self.strays.items() if index in accounts},
            changes_at=min((at for gone in self._gone if (at := gone.left_at + SEEN_SECONDS) > now), default=math.inf),
        )

    def _forget(self, devices: Snapshot, now: float) -> None:
        """Those that left, and whose memory was seen free or will not be."""
        shown = _free(devices)
        kept = []
        for gone in self._gone:
            sampled = devices.seen_at > gone.left_at
            # loads since hide it: they may have taken all of theirs from it
            late = devices.seen_at >= gone.left_at + HIDDEN_SECONDS
            loads = [one for one in self.held.values() if late and not one.settled(gone.sampled_at)]
            seen = all(
                shown.get(device, math.inf) + _on(device, loads)
                >= gone.free_before.get(device, 0) + SEEN_SHARE * (size - gone.growth.get(device, 0))
                for device, size in gone.bytes.items()
            )
            if not sampled or (not seen and not gone.overdue(devices, now)):
                kept.append(gone)
            elif not seen:
                log.warning("memory is not seen free", model=gone.alias, seconds=SEEN_SECONDS)
        self._gone = kept

    def _parted(self, pinned: Collection[str]) -> tuple[list[Reservation], list[Reservation]]:
        """Those that stay whoever wants room, and those that may go."""
        stay = [one for alias, one in self.held.items() if alias in pinned and not one.leaving]
        return stay, [one for one in self.held.values() if one not in stay]

    def _device(self, device: Device, devices: Snapshot, now: float, pinned: Collection[str]) -> _Account:
        index, seen_at = device.index, devices.seen_at
        shown = (device.free_bytes or 0) - self.reserve_bytes
        believed = sum(one.bytes.get(index, 0) for one in self._gone if one.overdue(devices, now))
        expected = sum(one.bytes.get(index, 0) for one in self._gone) - believed
        loading = [one for one in self.held.values() if not one.settled(seen_at)]
        unseen = sum(one.bytes.get(index, 0) for one in self._gone if one.unseen(seen_at))
        growing = sum(one.growing(index) for one in self.held.values() if one.settled(seen_at))
        growing += sum(one.growth.get(index, 0) for one in self._gone if not one.unseen(seen_at))
        free = shown + believed - unseen - _on(index, loading) - growing
        # what loads took so far is missing in `shown`, and counted in full besides: it comes when they are ready and seen
        stayers = [one for one in loading if not one.leaving]
        dropped = max((one.free_before.get(index, 0) for one in stayers), default=0) - (device.free_bytes or 0)
        twice = 0 if devices.stale else min(_on(index, stayers), max(0, dropped))
        leaving = _on(index, (one for one in self.held.values() if one.leaving))
        stay, go = self._parted(pinned)
        most = (device.total_bytes or 0) - self.reserve_bytes - _on(index, stay)
        if all(one.known for one in go):
            untaken = _on(index, (one for one in stay if not one.settled(seen_at)))
            most = min(most, shown + believed + expected + _on(index, go) - untaken)
        return _Account(free=free, coming=expected + twice + leaving, most=most)

    def _ram(self, available: int | None, pinned: Collection[str]) -> _Account | None:
        share = None if available is None else int(available * RAM_SHARE)
        if not self.held or self._ram_budget is None:
            self._ram_budget = share
        budget = self.ram_bytes if self.ram_bytes is not None else self._ram_budget
        if budget is None:
            return None
        stay, go = self._parted(pinned)
        free, most = budget - _on(RAM, self.held.values()), budget - _on(RAM, stay)
        if self.ram_bytes is None and share is not None:
            free = min(free, share - _on(RAM, (one for one in self.held.values() if one.ready_at is None)))
            most = min(most, share + _on(RAM, go))
        return _Account(free=free, coming=_on(RAM, (one for one in go if one.leaving)), most=most)


def _free(devices: Snapshot) -> dict[int, int]:
    return {device.index: device.free_bytes for device in devices.devices if device.free_bytes is not None}


def _on(device: int, reservations: Iterable[Reservation]) -> int:
    """What they reserve there."""
    return sum(one.spot.bytes.get(device, 0) for one in reservations)
