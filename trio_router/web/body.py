"""Reading a request's body from Quart, bounded in size and in time.

Quart's own `MAX_CONTENT_LENGTH` does not bound a chunked upload on 0.23 (the whole is queued before it is
checked), so the bytes are counted here as they come.
"""

import json
from collections.abc import AsyncIterable
from typing import Any

import trio
from quart import Request

from trio_router.errors import BodyTooLarge, InvalidJSON, RequestTimeout
from trio_router.web.admission import TOO_DEEP

IDLE_SECONDS = 30.0
"""Longest pause of a client in the middle of its body."""
BYTES_PER_SECOND = 16 * 1024
"""A body may take `IDLE_SECONDS`, and a second more for each of these."""
DISCARD_SECONDS = 2.0
"""How long a body that is too large is still read, and thrown away, so that its client gets to our answer."""

INVITE = "trio_router.invite"
"""Under this name a request's scope has, among its extensions, what tells a client that waits for it to send its body."""
COMMAND_BYTES = 64 * 1024
"""What the body of a management request may have."""


def due(began: float, have: int) -> float:
    """Trio time until which more of a body has to come that began at trio time `began` and is there up to `have` bytes."""
    return min(trio.current_time() + IDLE_SECONDS, began + IDLE_SECONDS + have / BYTES_PER_SECOND)


TOO_SLOW = f"the body paused for {IDLE_SECONDS:g} s, or came slower than {BYTES_PER_SECOND} bytes/s"


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes. Raises BodyTooLarge, RequestTimeout."""
    declared = request.content_length
    if declared is not None and declared > limit:
        raise _too_large(request, limit)
    invite: Any = request.scope.get("extensions", {}).get(INVITE)
    if invite is not None:
        await invite()
    body = bytearray()
    began = trio.current_time()
    with trio.CancelScope(deadline=began + IDLE_SECONDS) as patience:
        async for piece in request.body:
            body += piece
            if len(body) > limit:
                break
            patience.deadline = due(began, len(body))
    if patience.cancelled_caught:
        raise RequestTimeout(TOO_SLOW)
    if len(body) > limit:
        body.clear()
        await _discard(request.body)
        raise _too_large(request, limit)
    return bytes(body)


async def read_object(request: Request) -> dict[str, Any]:
    """The body of a management request, a JSON object. Raises InvalidJSON, BodyTooLarge, RequestTimeout."""
    found = parsed(await read_body(request, COMMAND_BYTES))
    if not isinstance(found, dict):
        raise InvalidJSON("the body is JSON, but not an object")
    return found


def parsed(body: bytes) -> Any:
    """The JSON that it is. Raises InvalidJSON."""
    try:
        return json.loads(body)
    except RecursionError as error:
        raise InvalidJSON(TOO_DEEP) from error
    except ValueError as error:
        raise InvalidJSON(f"the body is not JSON: {error}") from error


async def _discard(body: AsyncIterable[bytes]) -> None:
    with trio.move_on_after(DISCARD_SECONDS):
        async for _ in body:
            pass


def _too_large(request: Request, limit: int) -> BodyTooLarge:
    whose = f"of {request.path}" if limit == COMMAND_BYTES else "(api.max_body_mb)"
    return BodyTooLarge(f"the body is larger than {limit} bytes, the limit {whose}")
