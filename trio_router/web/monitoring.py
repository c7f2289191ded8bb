"""The routes that say how the router is."""

from collections.abc import Mapping
from typing import Any

import trio
from quart import Response, request
from quart_trio import QuartTrio

from trio_router import __version__
from trio_router.backend.lifecycle import State
from trio_router.fleet.registry import Registry
from trio_router.fleet.reports import footprint_report, models_health, queue_stats, vram_report
from trio_router.fleet.scrape import scrape_backends
from trio_router.fleet.status import server_status
from trio_router.memory.devices import DeviceMonitor, DeviceStatus
from trio_router.telemetry.exposition import PLAIN, merge
from trio_router.telemetry.metrics import Metrics
from trio_router.telemetry.snapshot import telemetry_summary
from trio_router.telemetry.summary import Summary
from trio_router.web.llama_router import loaded, passed_on
from trio_router.web.responses import json_response

RETRY_AFTER = "1"
"""Seconds; as for any other 503."""


def add_routes(app: QuartTrio, registry: Registry, devices: DeviceMonitor, metrics: Metrics, summary: Summary) -> None:
    """Add them to `app`."""
    _add_probes(app, registry, devices)
    _add_prometheus(app, registry, devices, metrics)
    _add_reports(app, registry, devices, summary)


def _add_probes(app: QuartTrio, registry: Registry, devices: DeviceMonitor) -> None:
    """What orchestrators ask; no key needed."""

    @app.get("/health")
    @app.get("/v1/health")  # as llama-server has it
    async def health() -> Response:
        body, well = _health(registry, devices)
        server = request.scope.get("server")  # the address of ours that the client reached
        return _probed({**body, "port": server[1] if server else None}, well)

    @app.get("/livez")
    async def live() -> Response:
        return json_response({"status": "ok"})

    @app.get("/readyz")
    async def ready() -> Response:
        return _probed({"status": registry.phase}, registry.phase == "ready")


def _probed(body: Mapping[str, Any], well: bool) -> Response:
    response = json_response(body, 200 if well else 503)
    if not well:
        response.headers["Retry-After"] = RETRY_AFTER
    return response


def _health(registry: Registry, devices: DeviceMonitor) -> tuple[Mapping[str, Any], bool]:
    active = sum(model.state is State.READY for model in registry.models.values())
    gpu = devices.snapshot
    checks = {
        "gpu": {"status": gpu.status.value, "devices": len(gpu.devices), "message": gpu.message},
        "manager": {"status": "draining" if registry.draining else "ok", "active_models": active},
        "http_client": {"status": "ok"},
    }
    well = not registry.draining and gpu.status is not DeviceStatus.ERROR
    body = {
        "status": "ok" if well else "degraded",
        "checks": checks,
        "version": __version__,
        "uptime_seconds": server_status(registry)["uptime_seconds"],
    }
    return body, well


def _add_prometheus(app: QuartTrio, registry: Registry, devices: DeviceMonitor, metrics: Metrics) -> None:
    """What Prometheus scrapes. Text is made in threads: requests do not wait for it."""
    merging = trio.CapacityLimiter(1)

    @app.get("/metrics")
    async def own_metrics() -> Response:
        alias = request.args.get("model")
        if alias is not None:  # llama-server's own router means that model's
            return await passed_on(await loaded(registry, alias), "/metrics")
        accept = request.headers.get("Accept")
        body, content_type = await metrics.render(accept, registry.facts(), devices.snapshot)
        return Response(body, content_type=content_type)

    @app.get("/metrics/backends")
    async def backend_metrics() -> Response:
        scraped = await scrape_backends(registry)
        body = await trio.to_thread.run_sync(merge, scraped, limiter=merging, abandon_on_cancel=True)
        return Response(body, content_type=PLAIN)


def _add_reports(app: QuartTrio, registry: Registry, devices: DeviceMonitor, summary: Summary) -> None:
    """What people ask."""

    @app.get("/vram")
    async def vram() -> Response:
        return json_response(vram_report(registry, devices.snapshot))

    @app.get("/v1/queue/stats")
    async def queues() -> Response:
        return json_response(queue_stats(registry, summary))

    @app.get("/v1/telemetry/summary")
    async def telemetry() -> Response:
        return json_response(telemetry_summary(summary))

    @app.get("/v1/health/models")
    async def health_of_models() -> Response:
        return json_response(models_health(registry, summary))

    @app.get("/v1/models/<path:alias>/footprint")
    async def footprint(alias: str) -> Response:
        return json_response(footprint_report(registry.model(alias)))
