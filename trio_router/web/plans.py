"""What would happen to a request, and what was decided."""

from quart import Response, request
from quart_trio import QuartTrio

from trio_router.errors import MissingModel
from trio_router.fleet.registry import Registry
from trio_router.web.admission import PLAN_PATH, priority
from trio_router.web.body import read_object
from trio_router.web.responses import json_response


def add_routes(app: QuartTrio, registry: Registry) -> None:
    """Add them to `app`."""

    @app.post(PLAN_PATH)
    async def plan() -> Response:
        wanted = await read_object(request)
        alias = wanted.get("model")
        if not isinstance(alias, str):
            raise MissingModel("the body has no field `model` that is a string", param="model")
        sent = wanted.get("priority", request.headers.get("X-Request-Priority"))
        ticket = registry.ticket(alias, priority(None if sent is None else str(sent)))
        return json_response(registry.plan(ticket).as_json())

    @app.get("/v1/router/decisions")
    async def decisions() -> Response:
        return json_response({"decisions": [each.as_json() for each in registry.decisions]})
