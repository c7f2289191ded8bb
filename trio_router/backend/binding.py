"""Which GPUs a llama-server sees: those that the ledger gave it, by UUID, whatever the order of NVML and the driver.

CUDA takes UUIDs (`CUDA_VISIBLE_DEVICES`). Vulkan builds take numbers in the order in which Vulkan's loader enumerates
(`GGML_VK_VISIBLE_DEVICES`, ggml-vulkan.cpp), which need not be NVML's and may have other vendors' devices and software
ones in it. So the loader is asked once, with the environment that llama-servers get, for each device's UUID, which is
NVML's. It is asked in a process of its own: a driver may crash, or hang.

`system.gpu_devices = []` hides every GPU. Where NVML shows none of those wanted, nothing is set: an AMD or Intel GPU is
llama-server's own business.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from subprocess import DEVNULL
from typing import Final

import attrs
import structlog
import trio

from trio_router.memory.devices import DeviceMonitor
from trio_router.memory.room import Spot

CUDA: Final = "CUDA_VISIBLE_DEVICES"
VULKAN: Final = "GGML_VK_VISIBLE_DEVICES"
NONE: Final = {CUDA: "-1", VULKAN: "", "HIP_VISIBLE_DEVICES": "-1", "ROCR_VISIBLE_DEVICES": "-1"}
"""Hides all GPUs. An empty list is none for ggml-vulkan, which ends at a number that it does not know."""
PROBE_SECONDS: Final = 10.0
MIB: Final = 1024 * 1024
PROBE: Final = """
import ctypes as c
v = c.CDLL("libvulkan.so.1")
class App(c.Structure):
    _fields_ = [("type", c.c_int), ("next", c.c_void_p), ("name", c.c_char_p), ("version", c.c_uint32),
                ("engine", c.c_char_p), ("engine_version", c.c_uint32), ("api", c.c_uint32)]
class Create(c.Structure):
    _fields_ = [("type", c.c_int), ("next", c.c_void_p), ("flags", c.c_uint32), ("app", c.POINTER(App)),
                ("layers", c.c_uint32), ("layer_names", c.c_void_p), ("extensions", c.c_uint32), ("names", c.c_void_p)]
class Id(c.Structure):
    _fields_ = [("type", c.c_int), ("next", c.c_void_p), ("device", c.c_ubyte * 16), ("driver", c.c_ubyte * 16),
                ("luid", c.c_ubyte * 8), ("mask", c.c_uint32), ("valid", c.c_uint32)]
class Properties(c.Structure):
    _fields_ = [("type", c.c_int), ("next", c.c_void_p), ("properties", c.c_uint64 * 256)]
app = App(type=0, api=(1 << 22) | (2 << 12))
instance, count = c.c_void_p(), c.c_uint32()
assert v.vkCreateInstance(c.byref(Create(type=1, app=c.pointer(app))), None, c.byref(instance)) == 0
assert v.vkEnumeratePhysicalDevices(instance, c.byref(count), None) == 0
devices = (c.c_void_p * count.value)()
assert v.vkEnumeratePhysicalDevices(instance, c.byref(count), devices) == 0
for device in devices:
    found = Id(type=1000071004)
    v.vkGetPhysicalDeviceProperties2(c.c_void_p(device), c.byref(Properties(type=1000059001, next=c.addressof(found))))
    print(bytes(found.device).hex())
"""
"""Prints the UUID of each physical device, in the loader's order. Structures: vulkan_core.h, version 1.1."""

log = structlog.get_logger("trio_router.backend")


@attrs.define(eq=False)
class Binding:
    """What binds llama-servers to GPUs."""

    devices: DeviceMonitor | None = None
    vulkan: Mapping[int, int] = attrs.field(factory=dict)
    """Vulkan's number of each GPU that it knows, by NVML's index."""

    @property
    def hides_all(self) -> bool:
        """Whether llama-servers are shown no GPU at all."""
        return self.devices is not None and not self.devices.gpu_devices

    def environment(self, chosen: Sequence[int] = ()) -> dict[str, str]:
        """What shows the `chosen` GPUs, in that order, and no others; all of `system.gpu_devices` if none is."""
        if self.devices is None:
            return {}
        if self.hides_all:
            return dict(NONE)
        uuids = {device.index: device.uuid for device in self.devices.snapshot.devices}
        shown = [index for index in chosen if index in uuids] or list(uuids)
        if not shown:
            return {}
        variables = {CUDA: ",".join(uuids[index] for index in shown)}
        if all(index in self.vulkan for index in shown):
            variables[VULKAN] = ",".join(str(self.vulkan[index]) for index in shown)
        return variables

    @property
    def first(self) -> tuple[int, ...]:
        """One GPU, or none where there is none."""
        return () if self.devices is None else tuple(device.index for device in self.devices.snapshot.devices[:1])

    async def ask_vulkan(self, environment: Mapping[str, str]) -> None:
        """Find out Vulkan's numbers; the machine may have no Vulkan. A process of 0.1 to 0.5 s, `PROBE_SECONDS` at most."""
        known = () if self.devices is None else self.devices.snapshot.devices
        if not known:
            return
        text = b""
        with trio.move_on_after(PROBE_SECONDS):
            done = await trio.run_process(
                [sys.executable, "-I", "-S", "-c", PROBE],
                capture_stdout=True,
                stderr=DEVNULL,
                env=environment,
                check=False,
            )
            text = done.stdout or b""
        self.vulkan = matched({device.index: device.uuid for device in known}, text.decode("ascii", "replace"))
        log.debug("vulkan", numbers=dict(self.vulkan))


def matched(uuids: Mapping[int, str], said: str) -> dict[int, int]:
    """Vulkan's number by NVML's index: `said` has Vulkan's UUIDs in its order, a line each."""
    places: dict[str, int] = {}
    for place, line in enumerate(said.split()):
        places.setdefault(line, place)  # two drivers may show one device; llama-server takes the first too
    plain = {index: re.sub(r"[^0-9a-f]", "", uuid.lower().removeprefix("gpu-")) for index, uuid in uuids.items()}
    return {index: places[digits] for index, digits in plain.items() if digits in places}


def split_flags(spot: Spot) -> list[str]:
    """What has llama-server split a model as was reserved; empty when one GPU has it all."""
    if len(spot.devices) < 2:
        return []
    parts = [str(max(1, share // MIB)) for share in spot.shares]
    return ["--split-mode", "layer", "--tensor-split", ",".join(parts)]
