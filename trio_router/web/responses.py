"""JSON answers of our own."""

import json
from typing import Any

from quart import Response

from trio_router.errors import RouterError


def json_response(body: Any, status: int = 200) -> Response:
    """`body` as JSON."""
    return Response(json.dumps(body, ensure_ascii=False), status, content_type="application/json")


def error_response(error: RouterError) -> Response:
    """An error as its client sees it."""
    response = json_response(error.body(), error.status)
    for name, value in error.headers:
        response.headers[name] = value
    return response
