"""One look at the GPUs through NVML. The only user of `pynvml`.

Per-process numbers are for people to look at. In containers NVML gives pids of another namespace and no memory, or
wrong memory (nvidia-docker#1483, open-gpu-kernel-modules#614): nothing is decided by them.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import attrs


def _pynvml() -> Any:
    """The module, which takes 2 MB: only where there are GPUs to look at."""
    return importlib.import_module("pynvml")


@attrs.frozen(kw_only=True)
class Device:
    """One GPU at one moment. None where the driver or the board does not say."""

    index: int
    """NVML's index: order of the PCI bus."""
    uuid: str
    name: str
    total_bytes: int | None
    """None on boards whose memory is the host's."""
    used_bytes: int | None
    free_bytes: int | None
    utilization_percent: int | None
    temperature_celsius: int | None
    power_watts: float | None
    processes: Mapping[int, int | None]
    """Bytes by pid, compute and graphics together."""


class NoDriver(Exception):
    """Raised when NVML cannot even be started: no library, no driver, no permission."""


class DriverFailed(Exception):
    """Raised when NVML was there and a call of it failed."""


@attrs.frozen(kw_only=True)
class _Handle:
    index: int
    handle: Any
    uuid: str
    name: str


@attrs.define(eq=False)
class NvmlSampler:
    """Calls NVML, all devices in one `sample()`. Blocks; one thread at a time.

    *Resource handling*: NVML is started by the first sample, and again after a failure. It is not shut down at the
    end: it holds nothing that outlives the process, and a driver that hangs would hold up our exit.

    *Error handling*: raises NoDriver and DriverFailed. A call the board does not support yields None instead.
    """

    indices: tuple[int, ...]
    nvml: Any = attrs.field(factory=_pynvml)
    """The module; tests put a stand-in here."""
    _handles: tuple[_Handle, ...] | None = attrs.field(default=None, init=False)
    _missing: str | None = attrs.field(default=None, init=False)

    def sample(self) -> tuple[tuple[Device, ...], str | None]:
        """The devices, and a message if some of those wanted do not exist."""
        if self._handles is None:
            self._start()
        try:
            if self._handles is None:
                self._handles = self._find()
            return tuple(self._device(handle) for handle in self._handles), self._missing
        except self.nvml.NVMLError as exc:
            self._stop()
            raise DriverFailed(f"NVML: {exc}") from exc

    def _start(self) -> None:
        nvml = self.nvml
        absent = {
            nvml.NVML_ERROR_LIBRARY_NOT_FOUND,
            nvml.NVML_ERROR_DRIVER_NOT_LOADED,
            nvml.NVML_ERROR_NO_PERMISSION,
            # The driver was replaced under a running process: only a new process gets the new library.
            nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        }
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as exc:
            raise (NoDriver if exc.value in absent else DriverFailed)(f"NVML: {exc}") from exc

    def _stop(self) -> None:
        self._handles = None
        try:
            self.nvml.nvmlShutdown()
        except self.nvml.NVMLError:
            return  # it is in no state to be shut down; starting again is what helps

    def _find(self) -> tuple[_Handle, ...]:
        nvml, count = self.nvml, self.nvml.nvmlDeviceGetCount()
        absent = [index for index in self.indices if not 0 <= index < count]
        self._missing = f"gpu_devices {absent}: not there, NVML shows {count}" if absent else None
        found = []
        for index in sorted(set(self.indices) - set(absent)):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
            found.append(_Handle(index=index, handle=handle, uuid=uuid, name=name))
        return tuple(found)

    def _device(self, known: _Handle) -> Device:
        nvml, handle = self.nvml, known.handle
        memory = self._memory(handle)
        utilization = self._optional(nvml.nvmlDeviceGetUtilizationRates, handle)
        milliwatts = self._optional(nvml.nvmlDeviceGetPowerUsage, handle)
        return Device(
            index=known.index,
            uuid=known.uuid,
            name=known.name,
            total_bytes=None if memory is None else int(memory.total),
            used_bytes=None if memory is None else int(memory.used),
            free_bytes=None if memory is None else int(memory.free),
            utilization_percent=None if utilization is None else int(utilization.gpu),
            temperature_celsius=self._optional(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power_watts=None if milliwatts is None else milliwatts / 1000,
            processes=self._processes(handle),
        )

    def _memory(self, handle: Any) -> Any | None:
        """Version 2 keeps what the driver reserves out of `used`; old drivers have version 1 only."""
        nvml = self.nvml
        unsupported = {
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
            nvml.NVML_ERROR_NO_PERMISSION,  # the parent of MIG devices
        }
        for version in (nvml.nvmlMemory_v2, None):
            try:
                return nvml.nvmlDeviceGetMemoryInfo(handle, version=version)
            except nvml.NVMLError as exc:
                if exc.value not in unsupported:
                    raise
        return None

    def _optional(self, call: Callable[..., Any], *arguments: Any) -> Any | None:
        try:
            return call(*arguments)
        except self.nvml.NVMLError:
            return None

    def _processes(self, handle: Any) -> Mapping[int, int | None]:
        """A pid may stand in both lists, with the same bytes: it counts once."""
        nvml = self.nvml
        found: dict[int, int | None] = {}
        for call in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            for process in self._optional(call, handle) or ():
                sizes = [size for size in (found.get(process.pid), process.usedGpuMemory) if size is not None]
                found[process.pid] = max(sizes, default=None)
        return found
