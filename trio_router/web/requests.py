"""`/v1/requests`: what is being answered now, whichever way it came in, and its end by an operator's word."""

import time
from collections.abc import Iterable
from typing import Any, Final

import trio
from quart import Response, g
from quart_trio import QuartTrio

from trio_router.errors import RequestCancelled, UnknownRequest, shown
from trio_router.fleet.status import timestamp
from trio_router.web.inference import Exchange
from trio_router.web.responses import json_response

MOST: Final = 1000
"""So many are listed, the oldest."""


def described(exchange: Exchange) -> dict[str, Any]:
    """One of them, for people."""
    ticket, asked = exchange.ticket, exchange.asked
    now, unix = trio.current_time(), time.time()
    waited = None
    if ticket is not None and ticket.granted_at is not None:
        waited = round(1000 * (ticket.granted_at - exchange.arrived_at))
    return {
        "id": exchange.request_id,
        "model": None if ticket is None else ticket.alias,
        "endpoint": asked.path,
        "priority": None if ticket is None else ticket.priority.label,
        "key": None if asked.holder is None else asked.holder.name,
        "client": exchange.client or None,
        "state": exchange.state,
        "arrived_at": timestamp(unix - (now - exchange.arrived_at)),
        "age_ms": round(1000 * (now - exchange.arrived_at)),
        "queue_time_ms": waited,
    }


def add_routes(app: QuartTrio, exchanges: Iterable[Exchange]) -> None:
    """Add them to `app`; whoever comes with a key that is no operator's sees its own requests."""

    def visible() -> list[Exchange]:
        holder = g.holder
        if holder is None or holder.config.admin:
            return list(exchanges)
        return [exchange for exchange in exchanges if exchange.asked.holder is holder]

    @app.get("/v1/requests")
    async def under_way() -> Response:
        found = sorted(visible(), key=lambda exchange: exchange.arrived_at)
        return json_response({"total": len(found), "requests": [described(exchange) for exchange in found[:MOST]]})

    @app.post("/v1/requests/<path:id>/cancel")
    async def cancel(id: str) -> Response:
        found = [exchange for exchange in exchanges if exchange.request_id == id]
        if not found:
            raise UnknownRequest(f"no request that is under way has the id {shown(id)}")
        ended = [exchange.cancel(RequestCancelled("the request was cancelled by an operator")) for exchange in found]
        return json_response({"status": "success", "cancelled": sum(ended)})
