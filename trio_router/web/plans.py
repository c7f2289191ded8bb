"""What would happen to a request, what was decided, and what really happened."""

from collections.abc import AsyncIterator
from itertools import islice
from typing import Final

import trio
from quart import Response, g, request
from quart_trio import QuartTrio

from trio_router.errors import MissingModel
from trio_router.fleet.registry import Registry
from trio_router.telemetry.events import Events
from trio_router.telemetry.trace import Trace
from trio_router.web.admission import PLAN_PATH, priority
from trio_router.web.body import read_object
from trio_router.web.query import count
from trio_router.web.responses import json_response

LINES_AT_ONCE: Final = 200
"""A few milliseconds' work."""


def add_routes(app: QuartTrio, registry: Registry, events: Events) -> None:
    """Add them to `app`."""
    kept = Trace()
    events.sinks.append(kept)
    events.request_sinks.append(kept.requests)

    @app.post(PLAN_PATH)
    async def plan() -> Response:
        wanted = await read_object(request)
        alias = wanted.get("model")
        if not isinstance(alias, str):
            raise MissingModel("the body has no field `model` that is a string", param="model")
        sent = wanted.get("priority", request.headers.get("X-Request-Priority"))
        wished = priority(None if sent is None else str(sent))
        if g.holder is not None:
            g.holder.check_model(registry.model(alias).alias, alias)
            wished = g.holder.allowed(wished)
        ticket = registry.ticket(alias, wished)
        return json_response(registry.plan(ticket).as_json())

    @app.get("/v1/router/decisions")
    async def decisions() -> Response:
        kept = list(registry.decisions)
        last = count("last", request.args.get("last"), default=len(kept), at_most=len(kept))
        return json_response({"decisions": [each.as_json() for each in kept[len(kept) - last :]]})

    @app.get("/v1/router/trace")
    async def trace() -> Response:
        async def pieces() -> AsyncIterator[str]:
            lines = kept.lines()
            while piece := "".join(islice(lines, LINES_AT_ONCE)):
                yield piece
                await trio.lowlevel.checkpoint()

        return Response(pieces(), content_type="application/jsonl")
