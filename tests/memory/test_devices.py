import threading
from collections.abc import Callable

import pynvml
import pytest
import trio
from trio.testing import MockClock

from tests.memory.fake_nvml import GIB, FakeGpu, FakeNvml
from trio_router.memory.devices import DeviceMonitor, DeviceStatus, Snapshot

NO_LIBRARY = {"nvmlInit": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}
LOST = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_GPU_IS_LOST}


async def inline(sample: Callable):
    """Instead of a thread, which virtual time would not wait for."""
    await trio.lowlevel.checkpoint()
    return sample()


def monitor(nvml: FakeNvml, *, indices: tuple[int, ...] = (0,), call=inline) -> tuple[DeviceMonitor, list[Snapshot]]:
    record: list[Snapshot] = []
    return DeviceMonitor(indices, nvml=nvml, on_change=record.append, call=call, clock=trio.current_time), record


async def test_samples_every_two_seconds(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    gpu = FakeGpu("GPU-a")
    devices, record = monitor(FakeNvml([gpu]))
    assert (devices.snapshot.status, devices.snapshot.message) == (DeviceStatus.NONE, "not looked yet")
    await nursery.start(devices.run)
    first = devices.snapshot
    assert (first.status, first.stale, first.message) == (DeviceStatus.OK, False, None)
    assert first.devices[0].used_bytes == 1 * GIB
    gpu.used = 2 * GIB
    await trio.sleep(1.9)
    assert devices.snapshot is first
    await trio.sleep(0.2)
    assert devices.snapshot.devices[0].used_bytes == 2 * GIB
    assert devices.snapshot.taken_at == first.taken_at + 2
    await trio.sleep(20)
    assert len(record) == 1
    nursery.cancel_scope.cancel()


async def test_no_driver_is_said_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    nvml = FakeNvml([FakeGpu("GPU-a")], failing=NO_LIBRARY)
    devices, record = monitor(nvml)
    await nursery.start(devices.run)
    snapshot = devices.snapshot
    assert (snapshot.status, snapshot.devices, snapshot.stale) == (DeviceStatus.NONE, (), False)
    assert snapshot.message == "NVML: NVML Shared Library Not Found"
    await trio.sleep(3600)
    assert len(record) == 1
    assert len(nvml.record) == pytest.approx(61, abs=1)
    nvml.failing = {}  # the driver's module was loaded
    await trio.sleep(61)
    assert [change.status for change in record] == [DeviceStatus.NONE, DeviceStatus.OK]
    nursery.cancel_scope.cancel()


async def test_a_driver_that_fails_leaves_the_last_good_sample(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    nvml = FakeNvml([FakeGpu("GPU-a")])
    devices, record = monitor(nvml)
    await nursery.start(devices.run)
    good = devices.snapshot
    nvml.failing = LOST
    await trio.sleep(2.5)
    bad = devices.snapshot
    assert (bad.status, bad.stale, bad.message) == (DeviceStatus.ERROR, True, "NVML: GPU is lost")
    assert (bad.devices, bad.taken_at) == (good.devices, good.taken_at)
    nvml.failing = {}
    await trio.sleep(2.5)
    assert (devices.snapshot.status, devices.snapshot.stale) == (DeviceStatus.OK, False)
    assert [change.status for change in record] == [DeviceStatus.OK, DeviceStatus.ERROR, DeviceStatus.OK]
    assert nvml.record == ["nvmlInit", "nvmlShutdown", "nvmlInit"]
    nursery.cancel_scope.cancel()


async def test_starting_again_backs_off(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    nvml = FakeNvml([FakeGpu("GPU-a")], failing={"nvmlInit": pynvml.NVML_ERROR_UNKNOWN})
    starts: list[float] = []

    async def call(sample: Callable):
        starts.append(trio.current_time())
        return await inline(sample)

    devices, _ = monitor(nvml, call=call)
    await nursery.start(devices.run)
    assert (devices.snapshot.status, devices.snapshot.stale) == (DeviceStatus.ERROR, False)
    await trio.sleep(200)
    assert [round(at - starts[0]) for at in starts] == [0, 2, 6, 14, 30, 62, 122, 182]
    nursery.cancel_scope.cancel()


async def test_a_driver_that_goes_away_is_an_error(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    nvml = FakeNvml([FakeGpu("GPU-a")])
    devices, _ = monitor(nvml)
    await nursery.start(devices.run)
    nvml.failing = LOST | {"nvmlInit": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}
    await trio.sleep(60)
    snapshot = devices.snapshot
    assert (snapshot.status, snapshot.stale, len(snapshot.devices)) == (DeviceStatus.ERROR, True, 1)
    assert snapshot.message is not None
    assert "version mismatch" in snapshot.message
    nursery.cancel_scope.cancel()


async def test_devices_that_do_not_exist(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    devices, _ = monitor(FakeNvml([FakeGpu("GPU-a")]), indices=(0, 2))
    await nursery.start(devices.run)
    assert devices.snapshot.status is DeviceStatus.OK
    assert devices.snapshot.message == "gpu_devices [2]: not there, NVML shows 1"
    none, _ = monitor(FakeNvml([]))
    await nursery.start(none.run)
    assert none.snapshot.status is DeviceStatus.NONE
    nursery.cancel_scope.cancel()


async def test_cpu_only_never_touches_nvml(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    nvml = FakeNvml([FakeGpu("GPU-a")])
    devices, record = monitor(nvml, indices=())
    await nursery.start(devices.run)
    await trio.sleep(100)
    assert (devices.snapshot.status, devices.snapshot.message) == (
        DeviceStatus.NONE,
        "gpu_devices is empty: CPU only",
    )
    assert (nvml.record, record) == ([], [])
    nursery.cancel_scope.cancel()


async def test_a_driver_that_hangs_holds_up_nobody(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    hanging = trio.Event()

    async def call(sample: Callable):
        if hanging.is_set():
            await trio.sleep_forever()
        return await inline(sample)

    devices, _ = monitor(FakeNvml([FakeGpu("GPU-a")]), call=call)
    await nursery.start(devices.run)
    hanging.set()
    await trio.sleep(7.5)
    snapshot = devices.snapshot
    assert (snapshot.status, snapshot.stale) == (DeviceStatus.ERROR, True)
    assert snapshot.message == "NVML: no answer in 5 s"
    nursery.cancel_scope.cancel()


async def test_the_thread_is_left_behind_on_cancel() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        leave.wait(10)

    devices = DeviceMonitor((0,), nvml=FakeNvml([FakeGpu("GPU-a")], hang=hang))
    try:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(devices.run)
                await trio.to_thread.run_sync(entered.wait)
                nursery.cancel_scope.cancel()
    finally:
        leave.set()
    assert devices.snapshot.status is DeviceStatus.NONE


async def test_a_real_thread_and_the_real_module() -> None:
    """Whatever this machine has: an answer, and no exception."""
    devices = DeviceMonitor((0,))
    async with trio.open_nursery() as nursery:
        await nursery.start(devices.run)
        assert devices.snapshot.message != "not looked yet"
        nursery.cancel_scope.cancel()
