"""The routes of `/v1/models`: what there is, how it is, and what an operator does to it."""

from typing import Any

from quart import Response, request
from quart_trio import QuartTrio

from trio_router.backend.lifecycle import State
from trio_router.errors import MissingModel
from trio_router.fleet.registry import Registry
from trio_router.fleet.status import fleet_status, listed, listing, status
from trio_router.web.body import read_object
from trio_router.web.query import truth
from trio_router.web.responses import json_response


async def named_model() -> str:
    """`model` of the body. Raises MissingModel, InvalidJSON."""
    body = await read_object(request)
    model = body.get("model")
    if not isinstance(model, str):
        raise MissingModel("the body has no field `model` that is a string", param="model")
    return model


def add_routes(app: QuartTrio, registry: Registry) -> None:
    """Add them to `app`."""

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response(listing(registry))

    @app.get("/v1/models/<path:alias>")
    async def one_model(alias: str) -> Response:
        return json_response(listed(registry, alias))

    @app.get("/v1/models/status")
    async def all_statuses() -> Response:
        return json_response(fleet_status(registry))

    @app.get("/v1/models/<path:alias>/status")
    async def one_status(alias: str) -> Response:
        model = registry.model(alias)
        alive = model.state is State.READY and model.supervisor.health.consecutive_failures == 0
        return json_response({**status(model), "model": alias, "is_alive": alive})

    @app.get("/v1/models/failed")
    async def failed_models() -> Response:
        failed: list[dict[str, Any]] = [
            {
                "model": model.alias,
                "attempts": max(model.supervisor.attempts, model.supervisor.crashes),
                "error": model.supervisor.error or "",
            }
            for model in registry.models.values()
            if model.state is State.FAILED
        ]
        return json_response(
            {"failed_models": failed} if failed else {"failed_models": [], "message": "No failed models"}
        )

    @app.post("/v1/models/load")
    async def load() -> Response:
        alias = await named_model()
        if not truth(request.args.get("wait"), default=True):
            model = registry.load_soon(alias)
            ready = model.state is State.READY and model.retiring is None
            message = f"model {alias!r} is {'ready' if ready else 'being loaded'}"
            return json_response({"status": "accepted", "model": alias, "message": message}, 202)
        model = await registry.load(alias)
        return json_response(
            {
                "status": "success",
                "model": alias,
                "message": f"model {alias!r} is ready",
                "load_duration_sec": model.supervisor.load_seconds,
            }
        )

    @app.post("/v1/models/eject")
    async def eject() -> Response:
        alias = await named_model()
        if await registry.eject(alias, force=truth(request.args.get("force"), default=False)):
            return json_response(
                {"status": "success", "model_ejected": alias, "message": f"model {alias!r} was unloaded"}
            )
        return json_response(
            {"status": "not_found", "model_ejected": None, "message": f"model {alias!r} is not loaded"}
        )

    @app.post("/v1/models/<path:alias>/reset")
    async def reset(alias: str) -> Response:
        done, previous = registry.reset(alias)
        if done:
            return json_response(
                {
                    "status": "success",
                    "model": alias,
                    "message": f"model {alias!r} can be loaded again",
                    "previous_error": previous,
                }
            )
        return json_response({"status": "not_found", "model": alias, "message": f"model {alias!r} has not failed"})
