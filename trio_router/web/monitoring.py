"""The routes that say how the router is."""

from quart import Response
from quart_trio import QuartTrio

from trio_router import __version__
from trio_router.backend.lifecycle import State
from trio_router.fleet.registry import Registry
from trio_router.fleet.status import server_status
from trio_router.memory.devices import DeviceMonitor
from trio_router.web.responses import json_response


def add_routes(app: QuartTrio, registry: Registry, devices: DeviceMonitor) -> None:
    """Add them to `app`."""

    @app.get("/health")
    async def health() -> Response:
        active = sum(model.state is State.READY for model in registry.models.values())
        gpu = devices.snapshot
        checks = {
            "gpu": {"status": gpu.status.value, "devices": len(gpu.devices), "message": gpu.message},
            "manager": {"status": "draining" if registry.draining else "ok", "active_models": active},
            "http_client": {"status": "ok"},
        }
        well = not registry.draining and gpu.status.value != "error"
        body = {
            "status": "ok" if well else "degraded",
            "checks": checks,
            "version": __version__,
            "uptime_seconds": server_status(registry)["uptime_seconds"],
        }
        return json_response(body, 200 if well else 503)
