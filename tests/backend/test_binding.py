"""Which GPUs a llama-server is shown."""

from trio_router.backend.binding import NONE, PROBE, Binding, matched, split_flags
from trio_router.memory.devices import Device, DeviceMonitor, DeviceStatus, Snapshot
from trio_router.memory.room import RAM, Spot

FIRST, SECOND = "GPU-ba38b479-621b-3142-520e-7319cfe46619", "GPU-03301946-e2a6-3999-0a3c-83c221cafeba"
SAID = "03301946e2a639990a3c83c221cafeba\n00000000000000000000000000000000\nba38b479621b3142520e7319cfe46619\n"
"""Another order than NVML's, and a software device between."""


def monitor(*uuids: str, gpu_devices: tuple[int, ...] = (0, 1)) -> DeviceMonitor:
    made = DeviceMonitor(gpu_devices=gpu_devices)
    devices = tuple(
        Device(
            index=index, uuid=uuid, name="GPU", total_bytes=None, used_bytes=None, free_bytes=None,
            utilization_percent=None, temperature_celsius=None, power_watts=None, processes={},
        )
        for index, uuid in enumerate(uuids)
    )  # fmt: skip
    made._snapshot = Snapshot(taken_at=0, devices=devices, status=DeviceStatus.OK)
    return made


def test_by_uuid_and_by_vulkans_own_numbers() -> None:
    binding = Binding(monitor(FIRST, SECOND), matched({0: FIRST, 1: SECOND}, SAID))
    assert binding.environment((0,)) == {"CUDA_VISIBLE_DEVICES": FIRST, "GGML_VK_VISIBLE_DEVICES": "2"}
    assert binding.environment((1,)) == {"CUDA_VISIBLE_DEVICES": SECOND, "GGML_VK_VISIBLE_DEVICES": "0"}
    both = {"CUDA_VISIBLE_DEVICES": f"{FIRST},{SECOND}", "GGML_VK_VISIBLE_DEVICES": "2,0"}
    assert binding.environment((0, 1)) == binding.environment() == both


def test_vulkan_is_left_alone_where_its_numbers_are_not_known() -> None:
    assert Binding(monitor(FIRST)).environment((0,)) == {"CUDA_VISIBLE_DEVICES": FIRST}


def test_gpus_that_nvml_does_not_show_are_llama_servers_own_business() -> None:
    assert Binding(monitor()).environment() == {}
    assert Binding().environment() == {}


def test_one_that_is_gone_is_not_shown() -> None:
    assert Binding(monitor(FIRST)).environment((1,)) == {"CUDA_VISIBLE_DEVICES": FIRST}


def test_none_wanted() -> None:
    assert Binding(monitor(gpu_devices=())).environment() == NONE


def test_vulkans_numbers() -> None:
    assert matched({0: FIRST, 1: SECOND}, SAID) == {0: 2, 1: 0}
    assert matched({0: FIRST}, "") == {}
    assert matched({0: "GPU-fake"}, SAID) == {}
    assert matched({1: SECOND}, SAID + SAID) == {1: 0}, "the first of several that show the same device"


async def test_a_machine_without_vulkan() -> None:
    binding = Binding(monitor(FIRST))
    await binding.ask_vulkan({"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": "/nowhere"})
    assert binding.vulkan == {}
    compile(PROBE, "probe", "exec")


def test_a_model_is_split_as_was_reserved() -> None:
    mib = 1024 * 1024
    split = Spot(bytes={0: 6500 * mib, 2: 3500 * mib, RAM: 5}, devices=(0, 2), shares=(6000 * mib, 3000 * mib))
    assert split_flags(split) == ["--split-mode", "layer", "--tensor-split", "6000,3000"]
    assert split_flags(Spot(bytes={0: mib}, devices=(0,))) == split_flags(Spot()) == []
