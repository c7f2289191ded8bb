"""Weighing loads on a fake driver, in virtual time."""

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.memory.fake_nvml import FakeGpu, FakeNvml
from trio_router.backend.scales import Scales, load_between
from trio_router.memory.devices import DeviceMonitor
from trio_router.memory.learned import Held
from trio_router.memory.projection import MIB

OURS = 7


async def inline(sample):
    await trio.lowlevel.checkpoint()
    return sample()


@attrs.define
class Bench:
    """Scales, and the devices that they look at."""

    gpus: list[FakeGpu]
    nvml: FakeNvml = attrs.field(init=False)
    scales: Scales = attrs.field(init=False)

    async def start(self, nursery: trio.Nursery) -> "Bench":
        self.nvml = FakeNvml(self.gpus)
        monitor = DeviceMonitor(gpu_devices=tuple(range(len(self.gpus))), nvml=self.nvml, call=inline)
        await nursery.start(monitor.run)
        self.scales = Scales(monitor)
        return self

    def take(self, mib: int, *, gpu: int = 0, pid: int = OURS, listed: int | None = None) -> None:
        self.gpus[gpu].used += mib * MIB
        self.gpus[gpu].compute.append((pid, None if listed is None else listed * MIB))
        self.gpus[gpu].graphics.append((pid, None if listed is None else listed * MIB))


@pytest.fixture
async def bench(nursery: trio.Nursery, autojump_clock: MockClock) -> Bench:
    return await Bench([FakeGpu("GPU-0"), FakeGpu("GPU-1")]).start(nursery)


async def test_a_load_is_weighed(bench: Bench) -> None:
    loading = bench.scales.moving()
    before = await bench.scales.before()
    bench.take(340, listed=309)
    load = await bench.scales.after(before, OURS)
    loading.end()
    assert load.held == (Held(uuid="GPU-0", device="NVIDIA H100 80GB HBM3", bytes=340 * MIB),)
    assert load.alone


async def test_one_beside_others_on_two_devices(bench: Bench) -> None:
    bench.take(500, pid=99, gpu=1)
    loading = bench.scales.moving()
    before = await bench.scales.before()
    bench.take(200)
    bench.take(150, gpu=1)
    load = await bench.scales.after(before, OURS)
    loading.end()
    assert [held.bytes for held in load.held] == [200 * MIB, 150 * MIB]
    assert not load.alone


async def test_a_little_on_another_device_is_no_split(bench: Bench) -> None:
    bench.take(500, pid=99)
    loading = bench.scales.moving()
    before = await bench.scales.before()
    bench.take(16)
    bench.take(340, gpu=1)
    load = await bench.scales.after(before, OURS)
    loading.end()
    assert [(held.uuid, held.bytes) for held in load.held] == [("GPU-1", 340 * MIB)]
    assert [(held.uuid, held.bytes) for held in load.strays] == [("GPU-0", 16 * MIB)]
    assert load.alone, "where it computes"


async def test_two_loads_at_once_are_not_told_apart(bench: Bench) -> None:
    first = bench.scales.moving()
    before = await bench.scales.before()
    second = bench.scales.moving()
    assert await bench.scales.before() is None
    bench.take(340)
    assert await bench.scales.after(before, OURS) is None
    first.end()
    assert await bench.scales.after(before, OURS) is None
    second.end()
    bench.scales.moving()
    assert await bench.scales.before() is not None


async def test_one_that_ends_while_it_is_looked_at_disturbs(bench: Bench) -> None:
    loading = bench.scales.moving()
    before = await bench.scales.before()
    bench.take(340)
    leaving = bench.scales.moving()
    loading.end()
    assert await bench.scales.after(before, OURS) is None
    leaving.end()
    leaving.end()
    assert bench.scales.under_way == 0


@pytest.mark.parametrize("change", ["came", "grew", "left", "gave back"])
async def test_other_programs_disturb(bench: Bench, change: str) -> None:
    bench.take(100, pid=99, listed=90)
    loading = bench.scales.moving()
    before = await bench.scales.before()
    bench.take(340, listed=309)
    gpu = bench.gpus[0]
    match change:
        case "came":
            bench.take(50, pid=98)
        case "grew":
            gpu.compute[0] = gpu.graphics[0] = (99, 200 * MIB)
        case "left":
            gpu.compute, gpu.graphics = gpu.compute[1:], gpu.graphics[1:]
        case "gave back":
            gpu.used -= 60 * MIB
    assert loading.scales.under_way == 1
    assert await bench.scales.after(before, OURS) is None


async def test_a_driver_that_fails_weighs_nothing(bench: Bench) -> None:
    bench.scales.moving()
    before = await bench.scales.before()
    bench.nvml.failing["nvmlDeviceGetMemoryInfo"] = bench.nvml.NVML_ERROR_GPU_IS_LOST
    assert await bench.scales.after(before, OURS) is None
    assert await bench.scales.before() is None


async def test_nothing_is_weighed_without_devices() -> None:
    for scales in (Scales(), Scales(DeviceMonitor(gpu_devices=()))):
        assert await scales.before() is None
        scales.moving().end()
        assert (scales.under_way, scales.moves) == (0, 1)


async def test_a_device_that_is_new_or_mute_is_no_measure(bench: Bench) -> None:
    devices = bench.scales.devices.snapshot.devices
    mute = (attrs.evolve(devices[0], used_bytes=None), devices[1])
    assert load_between(devices[:1], devices, OURS) is None
    assert load_between(mute, devices, OURS) is None
    assert load_between(devices, devices, OURS) is None


async def test_a_probe_makes_way_for_a_load(bench: Bench, nursery: trio.Nursery) -> None:
    record = []

    async def probe() -> None:
        await bench.scales.until_quiet()
        async with bench.scales.probing():
            record.append("probe")
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.05)  # its process ends
                record.append("gone")

    nursery.start_soon(probe)
    await trio.testing.wait_all_tasks_blocked()
    loading = bench.scales.moving()
    before = await bench.scales.before()
    record.append("before")
    assert record == ["probe", "gone", "before"]
    nursery.start_soon(probe)
    await trio.testing.wait_all_tasks_blocked()
    assert record[3:] == []
    bench.take(340)
    assert await bench.scales.after(before, OURS) is not None
    loading.end()
    await trio.testing.wait_all_tasks_blocked()
    assert record[3:] == ["probe"]


async def test_a_load_that_could_not_be_weighed_ends_a_probe_too(bench: Bench, nursery: trio.Nursery) -> None:
    async with bench.scales.probing():
        bench.scales.moving()
        await trio.sleep_forever()
    assert bench.scales.under_way == 1
