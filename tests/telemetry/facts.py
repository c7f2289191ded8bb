"""Facts for tests, in few words."""

from typing import Any

import attrs

from trio_router.telemetry.facts import FleetFacts, ModelFacts

STATES = ("off", "starting", "loading", "ready", "stopping", "crashed", "failed")
GIB = 1024**3


@attrs.frozen(kw_only=True)
class Gpu:
    index: int = 0
    total_bytes: int | None = 80 * GIB
    used_bytes: int | None = 20 * GIB
    free_bytes: int | None = 60 * GIB
    utilization_percent: int | None = 42
    temperature_celsius: int | None = 55
    power_watts: float | None = 312.5


@attrs.frozen
class Gpus:
    """Both a snapshot and what has one."""

    devices: tuple[Gpu, ...] = ()

    @property
    def snapshot(self) -> "Gpus":
        return self


@attrs.frozen
class Fleet:
    told: FleetFacts

    def facts(self) -> FleetFacts:
        return self.told


def model(alias: str = "qwen", **facts: Any) -> ModelFacts:
    given = {
        "state": "ready",
        "slots_busy": 0,
        "slots_idle": 0,
        "waiting": 0,
        "waiting_by_priority": {"high": 0, "normal": 0, "low": 0},
        "device_bytes": {},
        "reserved_bytes": {},
        "vram_bytes": 0,
    }
    return ModelFacts(alias=alias, **{**given, **facts})


def fleet(*models: ModelFacts, phase: str = "ready") -> FleetFacts:
    return FleetFacts(phase=phase, uptime_seconds=7.0, states=STATES, models=models)
