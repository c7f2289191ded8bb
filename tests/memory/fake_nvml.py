"""A driver that does what it is told: a stand-in for the module `pynvml`."""

# ruff: noqa: N802 -- the names are NVML's

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import attrs
import pynvml

GIB = 1024**3


@attrs.define(eq=False)
class FakeGpu:
    uuid: str
    total: int = 80 * GIB
    used: int = 1 * GIB
    compute: list[tuple[int, int | None]] = attrs.field(factory=list)
    graphics: list[tuple[int, int | None]] = attrs.field(factory=list)


@attrs.define(eq=False)
class FakeNvml:
    """What is not defined here (constants, errors) is the real module's."""

    gpus: list[FakeGpu]
    failing: dict[str, int] = attrs.field(factory=dict)
    """Name of a call -> the NVML error it fails with."""
    hang: Callable[[], None] = lambda: None
    """Called by every sample, from wherever it runs."""
    record: list[str] = attrs.field(factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(pynvml, name)

    def _called(self, name: str) -> None:
        if name in {"nvmlInit", "nvmlShutdown"}:
            self.record.append(name)
        if name in self.failing:
            raise pynvml.NVMLError(self.failing[name])

    def nvmlInit(self) -> None:
        self._called("nvmlInit")

    def nvmlShutdown(self) -> None:
        self._called("nvmlShutdown")

    def nvmlDeviceGetCount(self) -> int:
        self._called("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        self._called("nvmlDeviceGetHandleByIndex")
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu, version: int | None = None) -> SimpleNamespace:
        self.hang()
        self._called("nvmlDeviceGetMemoryInfo")
        self._called("nvmlDeviceGetMemoryInfo_v2" if version else "nvmlDeviceGetMemoryInfo_v1")
        return SimpleNamespace(total=gpu.total, used=gpu.used, free=gpu.total - gpu.used)

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> SimpleNamespace:
        self._called("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=42, memory=7)

    def nvmlDeviceGetTemperature(self, gpu: FakeGpu, sensor: int) -> int:
        self._called("nvmlDeviceGetTemperature")
        return 55

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:
        self._called("nvmlDeviceGetPowerUsage")
        return 312_500

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[SimpleNamespace]:
        self._called("nvmlDeviceGetComputeRunningProcesses")
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in gpu.compute]

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: FakeGpu) -> list[SimpleNamespace]:
        self._called("nvmlDeviceGetGraphicsRunningProcesses")
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in gpu.graphics]
