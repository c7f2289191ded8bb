"""How a stream that has begun tells of an error: as its endpoint's clients read it."""

import json
from typing import Any

from trio_router.errors import RouterError


def error_event(endpoint: str, error: RouterError, *, cut: bool) -> bytes:
    """One event that tells a stream's client what happened, in the dialect of its endpoint.

    `cut` says that the last event was not complete: an empty line ends it.
    """
    return told_event(endpoint, error.body(), error.message, cut=cut)


def told_event(endpoint: str, body: dict[str, Any], message: str, *, cut: bool) -> bytes:
    """The same of an error object that is there already, with its message."""
    name = ""
    if endpoint.endswith("/responses"):
        name = "event: response.failed\n"
        failed = {"code": "server_error", "message": message}
        body = {
            "type": "response.failed",
            "sequence_number": 0,  # llama-server's own events have none, and there are clients that insist
            "response": {"object": "response", "status": "failed", "error": failed},
            **body,
        }
    elif endpoint.endswith("/messages"):
        name = "event: error\n"
        body = {"type": "error", "error": {**body["error"], "type": "api_error"}}
    event = f"{name}data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
    return b"\n\n" + event if cut else event
