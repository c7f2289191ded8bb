"""What is true now, as values: what gauges and live numbers are made of.

The rooms above hand these down; telemetry looks at nothing that lives. A `FleetFacts` is made in the trio thread and
never changes, so a thread may render it.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import attrs


@attrs.frozen(kw_only=True)
class ModelFacts:
    """One model at one moment."""

    alias: str
    state: str
    """One of `FleetFacts.states`."""
    slots_busy: int
    slots_idle: int
    waiting: int
    waiting_by_priority: Mapping[str, int]
    device_bytes: Mapping[int, int]
    """What its llama-server holds by device, as the driver says; empty when the driver does not."""
    reserved_bytes: Mapping[str, int]
    """What is reserved for it by device; `ram` is the host's memory."""
    vram_bytes: int
    """The sum of that, else what it is projected to need; 0 when it is not in memory."""


@attrs.frozen(kw_only=True)
class FleetFacts:
    """The router at one moment."""

    phase: str
    """starting, ready, draining."""
    uptime_seconds: float
    states: tuple[str, ...]
    """Every state a model can have."""
    models: tuple[ModelFacts, ...]


class DeviceFacts(Protocol):
    """One GPU at one moment; None where the driver or the board does not say."""

    @property
    def index(self) -> int: ...
    @property
    def total_bytes(self) -> int | None: ...
    @property
    def used_bytes(self) -> int | None: ...
    @property
    def free_bytes(self) -> int | None: ...
    @property
    def utilization_percent(self) -> int | None: ...
    @property
    def temperature_celsius(self) -> int | None: ...
    @property
    def power_watts(self) -> float | None: ...


class DevicesFacts(Protocol):
    """All GPUs at one moment."""

    @property
    def devices(self) -> Sequence[DeviceFacts]: ...


class Fleet(Protocol):
    """What knows the models: the registry."""

    def facts(self) -> FleetFacts: ...


class Devices(Protocol):
    """What knows the GPUs: the device monitor."""

    @property
    def snapshot(self) -> DevicesFacts: ...
