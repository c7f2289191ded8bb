"""Stands in for the module `pynvml` in a router's process, which finds it first by way of PYTHONPATH.

One GPU of 8 GiB. Every llama-server that the process has started holds 2 GiB of it.
"""

# ruff: noqa: N802 -- the names are NVML's

from pathlib import Path
from types import SimpleNamespace

GIB = 1024**3
NVML_ERROR_NO_PERMISSION = 4
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_FUNCTION_NOT_FOUND = 13
NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18
NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25
NVML_TEMPERATURE_GPU = 0
nvmlMemory_v2 = 0x02000028  # noqa: N816


class NVMLError(Exception):
    """Raised by no function here."""


def _servers():
    """The pids of our children that are llama-servers."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            children = (task / "children").read_text().split()
            found += [int(pid) for pid in children if b"--alias" in Path("/proc", pid, "cmdline").read_bytes()]
        except OSError:  # it ended while we looked
            continue
    return found


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return 1


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetUUID(handle):
    return "GPU-fake"


def nvmlDeviceGetName(handle):
    return "Fake GPU"


def nvmlDeviceGetMemoryInfo(handle, version=None):
    used = GIB // 2 + 2 * GIB * len(_servers())
    return SimpleNamespace(total=8 * GIB, used=used, free=8 * GIB - used)


def nvmlDeviceGetUtilizationRates(handle):
    return SimpleNamespace(gpu=42, memory=7)


def nvmlDeviceGetTemperature(handle, sensor):
    return 55


def nvmlDeviceGetPowerUsage(handle):
    return 312_500


def nvmlDeviceGetComputeRunningProcesses(handle):
    return [SimpleNamespace(pid=pid, usedGpuMemory=2 * GIB) for pid in _servers()]


def nvmlDeviceGetGraphicsRunningProcesses(handle):
    return []
