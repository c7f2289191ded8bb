"""Where a model fits: what it needs against what there is, by device. Pure: numbers in, a `Spot` out.

The host's memory is one more device here, `RAM`. A device that does not tell how much it has free is in no mapping
of bytes; it takes whatever comes.

How a spot is found, in order:

1. The host's part must fit into the host's memory.
2. Flags that say themselves how the model is spread (`Need.shares`) are only accounted: each device must take its part.
3. One device takes all of it if one can: of those that can, the one that has the least left over (best fit).
4. Else it is split over as few devices as can take it, by what each has free. Each of them needs its own driver and
   compute buffers (`Need.each_bytes`), and layers are not cut, so a part may be a layer more than its share.
5. A model that is larger than all there can be, and that llama-server may make smaller (`Need.shrinks`), gets the roomiest
   device to itself.
6. A process takes a little of devices that it is not on (`Room.strays`): that must fit too, unless it never will. A device
   that is full for good keeps no model from the others.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

RAM: Final = -1
"""The host's memory, beside NVML's indices."""
NEARLY_ALL: Final = 0.95
"""Of what there can be on a device, so much free is a device to oneself."""
LAYER_SLACK: Final = 1.05
"""How much more than its share a device of several may get where nobody knows how large a layer is."""


@attrs.frozen(kw_only=True)
class Need:
    """What a model takes."""

    device_bytes: int = 0
    """On one device, everything included."""
    fixed_bytes: int = 0
    """Of these, what lies on every device: driver, compute buffers."""
    each_bytes: int = 0
    """The same on each of several devices: a little more, for copies of what they work on."""
    grain_bytes: int | None = None
    """How much more than its share a device of several may get, since layers are not cut; None: not known."""
    host_bytes: int = 0
    devices: tuple[int, ...] | None = None
    """GPUs it may be on; None: any."""
    shrinks: bool = False
    """Whether llama-server makes it smaller when memory is short: its flags leave context or layers open."""
    shares: Mapping[int, float] | None = None
    """How its flags spread it over GPUs, as parts of 1; None: that is for us to say."""


@attrs.frozen(kw_only=True)
class Spot:
    """Where a model goes, and what is reserved for it there."""

    bytes: Mapping[int, int] = attrs.field(factory=dict)
    """By device, `RAM` included."""
    devices: tuple[int, ...] = ()
    """GPUs that its llama-server is to see, in this order; empty: all of ours, as its flags say."""
    shares: tuple[int, ...] = ()
    """Of several: how its layers are dealt out to them, in bytes; what each has for itself is not in it."""

    @property
    def device_bytes(self) -> dict[int, int]:
        """Without the host's."""
        return {device: size for device, size in self.bytes.items() if device != RAM}


@attrs.frozen(kw_only=True)
class Shortage:
    """Why a model can never fit."""

    required_bytes: int
    available_bytes: int
    """What there would be for it with every model gone that may go."""
    ram: bool = False
    """It is the host's memory that is short."""


@attrs.frozen(kw_only=True)
class Room:
    """What may be reserved, by device."""

    devices: tuple[int, ...] = ()
    """GPUs that models may be on, also those that do not tell."""
    free: Mapping[int, int] = attrs.field(factory=dict)
    """Bytes that may be reserved now."""
    coming: Mapping[int, int] = attrs.field(factory=dict)
    """Bytes that will be free without anybody doing anything: of models that leave, or have left a moment ago."""
    most: Mapping[int, int] = attrs.field(factory=dict)
    """Bytes there would be with every model gone that may go."""
    strays: Mapping[int, int] = attrs.field(factory=dict)
    """Bytes that a model takes of each device that it is not on."""
    changes_at: float = math.inf
    """Trio time at which this is another even if nothing happens."""

    def spot(self, need: Need | None) -> Spot | None:
        """Where the model could go now; None: nowhere. A model of unknown needs goes anywhere."""
        return self._place(need, self.free)

    def spot_soon(self, need: Need | None, freed: Mapping[int, int] | None = None) -> Spot | None:
        """Where it could go once everything came that is coming, and `freed` besides."""
        return self._place(need, _sum(self.free, self.coming, freed or {}))

    def never(self, need: Need | None) -> Shortage | None:
        """Why it could not go anywhere even with every model gone that may go; None: it could."""
        if need is None or self._place(need, self.most) is not None:
            return None
        if need.host_bytes > self.most.get(RAM, need.host_bytes):
            return Shortage(required_bytes=need.host_bytes, available_bytes=self.most[RAM], ram=True)
        room = sum(max(0, self.most.get(device, 0)) for device in self._allowed(need))
        return Shortage(required_bytes=need.device_bytes, available_bytes=room)

    def less(self, spot: Spot) -> "Room":
        """With `spot` taken; what is not free yet is taken from what is coming."""
        return attrs.evolve(self, free=_sum(self.free, {device: -size for device, size in spot.bytes.items()}))

    def more(self, freed: Mapping[int, int]) -> "Room":
        """With `freed` on its way out too."""
        return attrs.evolve(self, coming=_sum(self.coming, freed))

    def claimed(self, need: Need | None) -> "Room":
        """With what the model will need taken, wherever that may become free: it waits, others are not to take it."""
        spot = self._place(need, self.most)
        return self if spot is None else self.less(spot)

    def _allowed(self, need: Need) -> Sequence[int]:
        if need.shares is not None:
            return tuple(need.shares)
        return self.devices if need.devices is None else need.devices

    def _place(self, need: Need | None, free: Mapping[int, int]) -> Spot | None:
        if need is None:
            return Spot()
        spot = self._whole(need, free, self.strays)
        if spot is not None or self._whole(need, self.most, self.strays) is not None:
            return self._strayed(spot)
        spot = self._whole(need, free, {})  # 6
        if spot is None and need.shrinks and need.shares is None and self._whole(need, self.most, {}) is None:
            spot = self._shrunk(need, free)  # 5
        return self._strayed(spot)

    def _strayed(self, spot: Spot | None) -> Spot | None:
        """With what it takes elsewhere besides."""
        if spot is None or not spot.devices or self.strays.keys() <= spot.bytes.keys():
            return spot
        return attrs.evolve(spot, bytes={**self.strays, **spot.bytes})

    def _shrunk(self, need: Need, free: Mapping[int, int]) -> Spot | None:
        told = [device for device in self._allowed(need) if device in self.devices and self.most.get(device, 0) > 0]
        if not told or need.host_bytes > free.get(RAM, need.host_bytes):
            return None
        device = max(told, key=lambda one: self.most[one])
        if free.get(device, 0) < NEARLY_ALL * self.most[device]:
            return None
        host = {RAM: need.host_bytes} if need.host_bytes else {}
        return Spot(bytes={device: min(free[device], self.most[device]), **host}, devices=(device,))

    def _whole(self, need: Need, free: Mapping[int, int], strays: Mapping[int, int]) -> Spot | None:
        if need.host_bytes > free.get(RAM, need.host_bytes):
            return None  # 1
        host = {RAM: need.host_bytes} if need.host_bytes else {}
        devices = [device for device in self._allowed(need) if device in self.devices]
        if not need.device_bytes or not devices:
            return Spot(bytes=host)
        if need.shares is not None:
            return _spread(need, need.shares, free, host)  # 2
        full = {device for device, size in strays.items() if size > free.get(device, math.inf)}
        fitting = [device for device in devices if need.device_bytes <= free.get(device, math.inf)]
        if fitting:
            fitting = [device for device in fitting if full <= {device}]
            if not fitting:
                return None
            best = min(fitting, key=lambda device: (free.get(device, math.inf), device))
            return Spot(bytes={best: need.device_bytes, **host}, devices=(best,))  # 3
        spot = _split(need, devices, free, host)  # 4
        return spot if spot is not None and full <= set(spot.devices) else None


def _spread(need: Need, shares: Mapping[int, float], free: Mapping[int, int], host: Mapping[int, int]) -> Spot | None:
    rest, each = _dealt(need) if len(shares) > 1 else (need.device_bytes, 0)
    parts = {device: math.ceil(rest * share) + each for device, share in shares.items()}
    if any(size > free.get(device, math.inf) for device, size in parts.items()):
        return None
    return Spot(bytes={**parts, **host})


def _split(need: Need, devices: Sequence[int], free: Mapping[int, int], host: Mapping[int, int]) -> Spot | None:
    rest, each = _dealt(need)
    usable = {device: free[device] - each for device in devices if device in free}
    roomiest = sorted((device for device in usable if usable[device] > 0), key=lambda device: -usable[device])
    for count in range(2, len(roomiest) + 1):
        chosen = sorted(roomiest[:count])
        room = sum(usable[device] for device in chosen)
        if rest <= room:
            shares = [rest * usable[device] // room for device in chosen]
            parts = {device: share + each for device, share in zip(chosen, shares, strict=True)}
            return Spot(bytes={**parts, **host}, devices=tuple(chosen), shares=tuple(shares))
    return None


def _dealt(need: Need) -> tuple[int, int]:
    """What is dealt out to several devices, and what each takes besides, at most."""
    rest, each = max(0, need.device_bytes - need.fixed_bytes), max(need.fixed_bytes, need.each_bytes)
    return (math.ceil(rest * LAYER_SLACK), each) if need.grain_bytes is None else (rest, each + need.grain_bytes)


def _sum(first: Mapping[int, int], *others: Mapping[int, int]) -> dict[int, int]:
    """Sums by device, of devices that stand in `first`: the others do not tell."""
    return {device: size + sum(other.get(device, 0) for other in others) for device, size in first.items()}
