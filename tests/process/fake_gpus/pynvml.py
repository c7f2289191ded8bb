"""Stands in for the module `pynvml` in a router's process, which finds it first by way of PYTHONPATH.

The file that `FAKE_GPUS` names says what there is, and is read again at each look: `{"gpus": {uuid: [total, others]},
"models": {alias: takes}, "freed_seconds": 0}`, sizes in MiB. A llama-server that the router has started takes its model's
memory from the GPUs that `CUDA_VISIBLE_DEVICES` shows it, in the parts that `--tensor-split` says; what it took is free
again `freed_seconds` after it is gone.
"""

# ruff: noqa: N802 -- the names are NVML's

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

MIB = 1024**2
NVML_ERROR_UNKNOWN = 999
NVML_ERROR_NO_PERMISSION = 4
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_FUNCTION_NOT_FOUND = 13
NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18
NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25
NVML_TEMPERATURE_GPU = 0
nvmlMemory_v2 = 0x02000028  # noqa: N816

held = {}
"""What each llama-server took, by pid: bytes by UUID, and when it was first missed; None while it is there."""


class NVMLError(Exception):
    """Raised while the file says that the driver fails."""

    value = NVML_ERROR_UNKNOWN


def world():
    return json.loads(Path(os.environ["FAKE_GPUS"]).read_text())


def takes(pid, models):
    arguments = Path("/proc", str(pid), "cmdline").read_bytes().decode().split("\0")
    if "--alias" not in arguments or "-c" in arguments[:5]:  # not yet, or no, llama-server
        return None
    variables = dict(
        line.split("=", 1) for line in Path("/proc", str(pid), "environ").read_bytes().decode().split("\0") if line
    )
    shown = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
    parts = [1.0] * len(shown)
    if "--tensor-split" in arguments:
        parts = [float(part) for part in arguments[arguments.index("--tensor-split") + 1].split(",")]
    size = models.get(arguments[arguments.index("--alias") + 1], 0) * MIB
    return {uuid: int(size * part / sum(parts)) for uuid, part in zip(shown, parts, strict=True)}


def look():
    now, there = time.monotonic(), world()
    children = [
        int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    for pid in children:
        try:
            sizes = takes(pid, there["models"])
        except OSError:  # it ended while we looked
            continue
        if sizes is not None:
            held[pid] = (sizes, None)
    for pid, (sizes, missed) in list(held.items()):
        if pid not in children:
            held[pid] = (sizes, missed or now)
            if now >= (missed or now) + there.get("freed_seconds", 0):
                del held[pid]
    return there


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return len(world()["gpus"])


def nvmlDeviceGetHandleByIndex(index):
    return list(world()["gpus"])[index]


def nvmlDeviceGetUUID(handle):
    return handle


def nvmlDeviceGetName(handle):
    return "Fake GPU"


def nvmlDeviceGetMemoryInfo(handle, version=None):
    there = look()
    if there.get("fails"):
        raise NVMLError("GPU is lost")
    total, others = (size * MIB for size in there["gpus"][handle])
    used = others + sum(sizes.get(handle, 0) for sizes, _ in held.values())
    return SimpleNamespace(total=total, used=used, free=total - used)


def nvmlDeviceGetUtilizationRates(handle):
    return SimpleNamespace(gpu=42, memory=7)


def nvmlDeviceGetTemperature(handle, sensor):
    return 55


def nvmlDeviceGetPowerUsage(handle):
    return 312_500


def nvmlDeviceGetComputeRunningProcesses(handle):
    return []


def nvmlDeviceGetGraphicsRunningProcesses(handle):
    return []
