"""What Hypercorn refuses by itself, refused in our words: a JSON body and an id, as everything else.

The first head on a connection is read by the data plane, which refuses what is no HTTP (`web.head`). A later one on a
connection that has become Hypercorn's is read by Hypercorn alone, and its refusals are a status and nothing more.
"""

import json
import re
from typing import Final

from hypercorn.typing import ASGISendCallable

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
    body, identity = _refusal("the request is not HTTP", int(match[1]))
    return b"HTTP/1.1 %b \r\ncontent-type: application/json\r\n%bcontent-length: %d\r\nconnection: close\r\n%b%b" % (
        match[1],
        b"x-request-id: %b\r\n" % identity,
        len(body),
        bytes(data[match.end() :]),
        body,
    )


async def refuse_websocket(send: ASGISendCallable) -> None:
    """Answer a WebSocket's opening handshake."""
    body, identity = _refusal(NO_WEBSOCKETS, 400)
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", identity),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "websocket.http.response.start", "status": 400, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


def _refusal(message: str, status: int) -> tuple[bytes, bytes]:
    error = HeadRefused(message, status=status)
    return json.dumps(error.body()).encode(), request_id(None).encode("ascii")
