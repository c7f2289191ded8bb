"""What clients send who mean no good; the rest of it never comes."""

from typing import Final

_POST: Final = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
_UPGRADE: Final = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: "
HOSTILE: Final = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    _POST[:40],
    _POST + b"Content-Length: 5000\r\n\r\n{",
    _POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
    _POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000,
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    _UPGRADE + b"websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\nearly",
    _UPGRADE + b"h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\nearly",
)
