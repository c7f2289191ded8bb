"""What Hypercorn refuses by itself, refused in our words: a JSON body and an id, as everything else.

The first head on a connection is read by the data plane, which refuses what is no HTTP (`web.head`). A later one on a
connection that has become Hypercorn's is read by Hypercorn alone, and its refusals are a status and nothing more.
"""

import json
import re
from typing import Final

from hypercorn.typing import ASGISendCallable

from trio_router.backend.answer import Headers
from trio_router.errors import HeadRefused
from trio_router.web.admission import request_id
from trio_router.web.head import NO_WEBSOCKETS

_BARE: Final = re.compile(rb"HTTP/1\.1 (4\d\d) [^\r\n]*\r\ncontent-length: 0\r\nconnection: close\r\n")
"""How Hypercorn's own begin, and none of the app's: those have a content type."""


def worded(data: bytes | bytearray | memoryview) -> bytes | None:
    """What is to be sent for `data` if that is a refusal of Hypercorn's own: one of ours, with the same status."""
    match = _BARE.match(data)
    if match is None:
        return None
    headers, body = _refusal("the request is not HTTP", int(match[1]))
    lines = b"".join([b"%b: %b\r\n" % header for header in headers])
    return b"HTTP/1.1 %b \r\n%b%b%b" % (match[1], lines, bytes(data[match.end() :]), body)


async def refuse_websocket(send: ASGISendCallable) -> None:
    """Answer a WebSocket's opening handshake."""
    headers, body = _refusal(NO_WEBSOCKETS, 400)
    await send({"type": "websocket.http.response.start", "status": 400, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


def _refusal(message: str, status: int) -> tuple[Headers, bytes]:
    """Head and body."""
    body = json.dumps(HeadRefused(message, status=status).body()).encode()
    identity = request_id(None).encode("ascii")
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", identity),
        (b"request-id", identity),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    return headers, body
