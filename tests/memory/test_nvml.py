import pynvml
import pytest

from tests.memory.fake_nvml import GIB, FakeGpu, FakeNvml
from trio_router.memory.nvml import Device, DriverFailed, NoDriver, NvmlSampler


def test_what_a_device_says() -> None:
    gpu = FakeGpu("GPU-a", compute=[(10, 5 * GIB)], used=6 * GIB)
    devices, message = NvmlSampler((0,), FakeNvml([gpu])).sample()
    assert message is None
    assert devices == (
        Device(
            index=0,
            uuid="GPU-a",
            name="NVIDIA H100 80GB HBM3",
            total_bytes=80 * GIB,
            used_bytes=6 * GIB,
            free_bytes=74 * GIB,
            utilization_percent=42,
            temperature_celsius=55,
            power_watts=312.5,
            processes={10: 5 * GIB},
        ),
    )


def test_a_pid_in_both_lists_counts_once() -> None:
    gpu = FakeGpu("GPU-a", compute=[(10, 5), (11, None), (12, None)], graphics=[(10, 5), (12, 7), (13, 1)])
    ((device,), _) = NvmlSampler((0,), FakeNvml([gpu])).sample()
    assert device.processes == {10: 5, 11: None, 12: 7, 13: 1}


@pytest.mark.parametrize(
    ("call", "field", "value"),
    [
        ("nvmlDeviceGetUtilizationRates", "utilization_percent", None),
        ("nvmlDeviceGetTemperature", "temperature_celsius", None),
        ("nvmlDeviceGetPowerUsage", "power_watts", None),
        ("nvmlDeviceGetComputeRunningProcesses", "processes", {12: 7}),
        ("nvmlDeviceGetGraphicsRunningProcesses", "processes", {10: 5}),
        ("nvmlDeviceGetMemoryInfo", "total_bytes", None),  # unified memory
        ("nvmlDeviceGetMemoryInfo", "used_bytes", None),
        ("nvmlDeviceGetMemoryInfo", "free_bytes", None),
        ("nvmlDeviceGetMemoryInfo_v2", "total_bytes", 80 * GIB),  # an old driver
    ],
)
def test_what_a_board_does_not_support_is_none(call: str, field: str, value) -> None:
    nvml = FakeNvml([FakeGpu("GPU-a", compute=[(10, 5)], graphics=[(12, 7)])])
    nvml.failing = {call: pynvml.NVML_ERROR_NOT_SUPPORTED}
    ((device,), _) = NvmlSampler((0,), nvml).sample()
    assert getattr(device, field) == value


@pytest.mark.parametrize(
    ("indices", "uuids", "message"),
    [
        ((0,), ["GPU-a"], None),
        ((1, 0, 1), ["GPU-a", "GPU-b"], None),
        ((1, 3), ["GPU-b"], "gpu_devices [3]: not there, NVML shows 2"),
        ((-1, 7), [], "gpu_devices [-1, 7]: not there, NVML shows 2"),
    ],
)
def test_only_the_devices_wanted(indices: tuple[int, ...], uuids: list[str], message: str | None) -> None:
    devices, said = NvmlSampler(indices, FakeNvml([FakeGpu("GPU-a"), FakeGpu("GPU-b")])).sample()
    assert [device.uuid for device in devices] == uuids
    assert said == message


@pytest.mark.parametrize(
    "error",
    [
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    ],
)
def test_no_driver(error: int) -> None:
    with pytest.raises(NoDriver, match=r"^NVML: "):
        NvmlSampler((0,), FakeNvml([], failing={"nvmlInit": error})).sample()


@pytest.mark.parametrize("call", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetCount"])
def test_a_gpu_that_is_lost_makes_nvml_start_again(call: str) -> None:
    nvml = FakeNvml([FakeGpu("GPU-a")])
    sampler = NvmlSampler((0,), nvml)
    nvml.failing = {call: pynvml.NVML_ERROR_GPU_IS_LOST, "nvmlShutdown": pynvml.NVML_ERROR_UNKNOWN}
    with pytest.raises(DriverFailed, match="NVML: GPU is lost"):
        sampler.sample()
    nvml.failing = {}
    assert len(sampler.sample()[0]) == 1
    assert len(sampler.sample()[0]) == 1
    assert nvml.record == ["nvmlInit", "nvmlShutdown", "nvmlInit"]


def test_a_start_that_fails_otherwise() -> None:
    with pytest.raises(DriverFailed, match="NVML: Unknown Error"):
        NvmlSampler((0,), FakeNvml([], failing={"nvmlInit": pynvml.NVML_ERROR_UNKNOWN})).sample()
