"""The monitoring routes on a registry that runs in virtual time, and on a driver that does what it is told."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pynvml
import pytest
import trio
from quart_trio import QuartTrio
from trio.testing import MockClock

from tests.fleet.conftest import _quiet as quiet  # noqa: F401  (a fixture)
from tests.fleet.fake_servers import FakeServers
from tests.fleet.fleet import LOW, Fleet, running
from tests.memory.fake_nvml import GIB, FakeGpu, FakeNvml
from tests.telemetry.samples import samples
from trio_router.backend.client import NoAnswer
from trio_router.memory.devices import DeviceMonitor
from trio_router.memory.footprint import Footprint, Part, Place
from trio_router.telemetry.metrics import Metrics
from trio_router.telemetry.summary import Summary
from trio_router.web import monitoring


@pytest.fixture
def servers() -> FakeServers:
    """Fake llama-servers that load in one second."""
    return FakeServers()


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of these tests does not wait for threads."""

    async def run_sync(call: Callable[..., Any], *args: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return call(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


@attrs.define(eq=False)
class Watched:
    fleet: Fleet
    app: QuartTrio
    nvml: FakeNvml
    devices: DeviceMonitor

    async def get(self, path: str, status: int = 200) -> Any:
        answer = await self.app.test_client().get(path)
        assert answer.status_code == status, await answer.get_data()
        assert ("Retry-After" in answer.headers) == (status == 503)
        text = (await answer.get_data()).decode()
        return await answer.get_json() if answer.mimetype == "application/json" else text

    async def look(self) -> None:
        """Let NVML be sampled again."""
        await trio.sleep(2.5)


def footprint(gibibytes: float) -> Footprint:
    parts = [("weights", gibibytes * 0.75, "header"), ("cache", gibibytes * 0.25, "formula")]
    device = [Part(name=name, bytes=int(size * GIB), source=why, place=Place.DEVICE) for name, size, why in parts]
    host = Part(name="compute", bytes=GIB, source="formula", place=Place.HOST)
    return Footprint(parts=(*device, host))


@asynccontextmanager
async def watched(servers: FakeServers, gpus: list[FakeGpu] | None = None, **system: Any) -> AsyncIterator[Watched]:
    nvml = FakeNvml(gpus or [])
    devices = DeviceMonitor(gpu_devices=tuple(range(len(nvml.gpus))), nvml=nvml, call=_inline)
    async with running(servers, devices=devices, **system) as fleet:
        summary = Summary(fleet.registry.models, trio.current_time)
        metrics = Metrics(fleet.registry.models, (), version="1")
        fleet.registry.events.sinks += [summary, metrics]
        for model in fleet.registry.models.values():
            model.footprint = footprint(20)
        fleet.registry.enter("ready")
        await fleet.nursery.start(devices.run)
        app = QuartTrio("test")
        monitoring.add_routes(app, fleet.registry, devices, metrics, summary)
        yield Watched(fleet, app, nvml, devices)


async def _inline(sample: Callable[[], Any]) -> Any:
    await trio.lowlevel.checkpoint()
    return sample()


async def test_probes(autojump_clock: MockClock, servers: FakeServers) -> None:
    async with watched(servers) as seen:
        assert await seen.get("/livez") == {"status": "ok"}
        assert await seen.get("/readyz") == {"status": "ready"}
        seen.fleet.registry.enter("starting")
        assert await seen.get("/readyz", 503) == {"status": "starting"}
        assert (await seen.get("/health"))["status"] == "ok"
        seen.fleet.registry.enter("draining")
        assert await seen.get("/livez") == {"status": "ok"}
        assert await seen.get("/readyz", 503) == {"status": "draining"}
        told = await seen.get("/health", 503)
        assert (told["status"], told["checks"]["manager"]) == ("degraded", {"status": "draining", "active_models": 0})


async def test_health_says_that_the_driver_fails(autojump_clock: MockClock, servers: FakeServers) -> None:
    async with watched(servers, [FakeGpu("GPU-a")]) as seen:
        assert (await seen.get("/health"))["checks"]["gpu"]["status"] == "ok"
        seen.nvml.failing = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_GPU_IS_LOST}
        await seen.look()
        told = await seen.get("/health", 503)
        assert (told["status"], told["checks"]["gpu"]["status"]) == ("degraded", "error")
        vram = await seen.get("/vram")
        assert (vram["status"], vram["stale"], vram["message"]) == ("healthy", True, "NVML: GPU is lost")


async def test_vram_without_a_gpu(autojump_clock: MockClock, servers: FakeServers) -> None:
    async with watched(servers) as seen:
        await seen.fleet.load("a")
        told = await seen.get("/vram")
        assert told["status"] == "unavailable"
        assert told["gpu_info"] == {"total_mb": None, "used_mb": None, "free_mb": None, "usage_percentage": None}
        assert told["gpus"] == []
        assert (told["loaded_models_count"], told["can_load_more"]) == (1, True)
        assert told["estimated_free_for_new_model_mb"] is None


@pytest.mark.parametrize(
    ("used", "status"), [(0, "healthy"), (79, "healthy"), (80, "warning"), (94, "warning"), (95, "critical"), (100, "critical")]
)  # fmt: skip
async def test_vram_by_the_fullest_device(
    autojump_clock: MockClock, servers: FakeServers, used: int, status: str
) -> None:
    gpus = [FakeGpu("GPU-a", total=100 * GIB, used=0), FakeGpu("GPU-b", total=100 * GIB, used=used * GIB)]
    async with watched(servers, gpus) as seen:
        told = await seen.get("/vram")
        assert told["status"] == status
        assert told["gpu_info"]["usage_percentage"] == used / 2
        assert [gpu["usage_percentage"] for gpu in told["gpus"]] == [0, used]


async def test_vram_of_unified_memory(autojump_clock: MockClock, servers: FakeServers) -> None:
    async with watched(servers, [FakeGpu("GPU-a")]) as seen:
        seen.nvml.failing = {"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}
        await seen.look()
        told = await seen.get("/vram")
        assert told["status"] == "unavailable"
        assert (told["gpus"][0]["total_mb"], told["gpus"][0]["utilization_percent"]) == (None, 42)


async def test_vram_of_models(autojump_clock: MockClock, servers: FakeServers) -> None:
    gpu = FakeGpu("GPU-a", total=80 * GIB, used=10 * GIB)
    async with watched(servers, [gpu], max_concurrent_models=2) as seen:
        servers.plan("b").load_seconds = 100
        await seen.fleet.load("a")
        gpu.compute = [(seen.fleet["a"].supervisor.pid, 16 * GIB)]
        gpu.used = 30 * GIB
        seen.fleet.registry.load_soon("b")
        await seen.look()
        told = await seen.get("/vram")
        assert [(one["model_alias"], one["status"]) for one in told["models"]] == [("a", "ready"), ("b", "loading")]
        first, second = told["models"]
        assert (first["vram_used_mb"], first["vram_percentage"], first["vram_source"]) == (16384, 20.0, "measured")
        assert (first["load_duration_sec"], first["gpus"]) == (1.0, {"0": 16384})
        assert (second["vram_used_mb"], second["vram_source"]) == (20480, "projected")
        assert told["loaded_models_count"] == 1
        reserve = seen.fleet.registry.config.system.vram_reserve_mb
        assert told["estimated_free_for_new_model_mb"] == (50 - 20) * 1024 - reserve  # b has its memory still to take
        assert told["gpus"][0]["reserved_mb"] == 40 * 1024
        assert told["gpus"][0]["free_for_new_model_mb"] == told["estimated_free_for_new_model_mb"]
        assert first["reserved_mb"] == second["reserved_mb"] == {"0": 20 * 1024, "ram": 1024}
        assert told["ram"] == {"reserved_mb": 2048, "free_for_new_model_mb": None}
        assert told["can_load_more"] is False  # two are as many as may
        metrics = samples(await seen.get("/metrics"))
        assert metrics["router_model_vram_bytes", "model=a"] == 16 * GIB
        assert metrics["router_model_device_memory_bytes", "device=0", "model=a"] == 16 * GIB
        assert metrics["router_model_vram_bytes", "model=b"] == 20 * GIB
        assert metrics["router_model_vram_bytes", "model=c"] == 0
        assert metrics["router_model_reserved_bytes", "device=0", "model=b"] == 20 * GIB
        assert metrics["router_model_reserved_bytes", "device=ram", "model=b"] == GIB
        assert ("router_model_reserved_bytes", "device=0", "model=c") not in metrics
        assert metrics["router_device_memory_bytes", "device=0", "kind=used"] == 30 * GIB
        assert metrics["router_device_power_watts", "device=0"] == 312.5


async def test_whether_another_fits(autojump_clock: MockClock, servers: FakeServers) -> None:
    gpu = FakeGpu("GPU-a", total=80 * GIB, used=65 * GIB)
    async with watched(servers, [gpu]) as seen:
        for model in seen.fleet.registry.models.values():  # whose llama-servers are not to make them smaller
            model.config = attrs.evolve(model.config, flags=("-c", "4096", "-ngl", "99"))
        assert (await seen.get("/vram"))["can_load_more"] is False
        seen.fleet["c"].footprint = footprint(14)
        assert (await seen.get("/vram"))["can_load_more"] is True


async def test_footprint(autojump_clock: MockClock, servers: FakeServers) -> None:
    async with watched(servers, [FakeGpu("GPU-a")]) as seen:
        told = await seen.get("/v1/models/a/footprint")
        assert told == {
            "model": "a",
            "vram_mb": 20480,
            "reserve_mb": 20480,
            "source": "formula",
            "host_mb": 1024,
            "total_mb": 21504,
            "vram_used_mb": None,
            "reserved_mb": {},
            "parts": [
                {"name": "weights", "bytes": 15 * GIB, "mb": 15360, "place": "gpu", "source": "header"},
                {"name": "cache", "bytes": 5 * GIB, "mb": 5120, "place": "gpu", "source": "formula"},
                {"name": "compute", "bytes": GIB, "mb": 1024, "place": "host", "source": "formula"},
            ],
            "note": None,
        }
        seen.fleet["a"].footprint, seen.fleet["a"].footprint_problem = None, "a.gguf: no such file"
        told = await seen.get("/v1/models/a/footprint")
        assert (told["vram_mb"], told["parts"], told["note"]) == (None, [], "a.gguf: no such file")


async def test_queues(autojump_clock: MockClock, servers: FakeServers) -> None:
    async with watched(servers) as seen:
        for _ in range(3):
            seen.fleet.soon("a", 10)
        seen.fleet.soon("a", 10, priority=LOW)
        await trio.sleep(5)
        told = await seen.get("/v1/queue/stats")
        assert told["summary"] == {"total_queued": 3, "total_processing": 1, "total_processed": 0, "total_rejected": 0}
        assert told["per_model"]["a"] == {
            "queue_length": 3,
            "total_requests": 0,
            "total_processed": 0,
            "total_rejected": 0,
            "current_processing": 1,
            "processing": True,
            "by_priority": {"high": 0, "normal": 2, "low": 1},
        }
        assert told["per_model"]["b"]["processing"] is False


async def test_health_of_models(autojump_clock: MockClock, servers: FakeServers) -> None:
    async with watched(servers) as seen:
        assert await seen.get("/v1/health/models") == {}
        seen.fleet.registry.load_soon("a")
        await trio.sleep(0.5)
        assert await seen.get("/v1/health/models") == {}  # loading is not loaded
        await seen.fleet.load("a")
        await trio.sleep(97)
        told = (await seen.get("/v1/health/models"))["a"]
        assert told.pop("last_check") is not None
        assert told == {
            "status": "healthy",
            "uptime_percentage": 100.0,
            "consecutive_failures": 0,
            "avg_response_time_ms": 2.0,  # of the probe that found it ready
            "last_error": None,
        }
        health = seen.fleet["a"].supervisor.health
        health.record(0.004, None)
        health.record(0.006, None)
        health.record(5.0, "/health did not answer")
        told = (await seen.get("/v1/health/models"))["a"]
        assert (told["status"], told["consecutive_failures"], told["avg_response_time_ms"]) == ("degraded", 1, 4.0)
        assert told["last_error"] == "/health did not answer"
        servers.plan("a").load_seconds = 10
        servers.alive["a"].die()
        await trio.sleep(5)
        told = (await seen.get("/v1/health/models"))["a"]
        assert told["status"] == "down"
        assert 90 < told["uptime_percentage"] < 100
        await seen.fleet.load("a")
        assert (await seen.get("/v1/health/models"))["a"]["status"] == "healthy"
        await seen.fleet.eject("a")
        assert await seen.get("/v1/health/models") == {}


async def test_metrics_of_backends(
    autojump_clock: MockClock, servers: FakeServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"a": "x 1\n", "b": None, "c": ""}

    async def metrics(server: Any) -> str:
        text = said[server.alias]
        if text is None:
            await trio.sleep_forever()
        if not text:
            raise NoAnswer("/metrics answered 501")
        return text

    monkeypatch.setattr("tests.fleet.fake_servers.FakeServer.metrics", metrics, raising=False)
    async with watched(servers) as seen:
        assert await seen.get("/metrics/backends") == "\n"
        for alias in "abc":
            await seen.fleet.load(alias)
        before = trio.current_time()
        told = await seen.get("/metrics/backends")
        assert trio.current_time() - before == 2.0
        assert told == '# model b: no answer within 2 s\n# model c: /metrics answered 501\nx{model="a"} 1\n'


async def test_summary_without_requests(autojump_clock: MockClock, servers: FakeServers) -> None:
    async with watched(servers) as seen:
        told = await seen.get("/v1/telemetry/summary")
        assert (told["total_requests"], told["success_rate"], told["requests_by_model"]) == (0, 100.0, {})
