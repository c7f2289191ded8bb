"""JSON answers of our own, and errors in the words of the API that was asked."""

import json
from typing import Any, Final

from quart import Response

from trio_router.errors import RouterError

ANTHROPIC_ENDS: Final = ("/messages", "/messages/count_tokens")


def json_response(body: Any, status: int = 200) -> Response:
    """`body` as JSON."""
    return Response(json.dumps(body, ensure_ascii=False), status, content_type="application/json")


def error_body(error: RouterError, path: str, request_id: str) -> dict[str, Any]:
    """The error object; on the paths of Anthropic's API with what its clients look for beside it."""
    if path.endswith(ANTHROPIC_ENDS):
        return {"type": "error", **error.body(), "request_id": request_id}
    return error.body()


def error_response(error: RouterError, path: str, request_id: str) -> Response:
    """An error as its client sees it."""
    response = json_response(error_body(error, path, request_id), error.status)
    for name, value in error.headers:
        response.headers[name] = value
    return response
