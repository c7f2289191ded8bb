"""The lean way in: plain HTTP/1.1 inference requests, from a client's socket to the backend's and back.

The same admission, registry, queue, lease and retries as behind Quart (`web.inference`); only how bytes come and go
is different: a head is matched, not modelled; a body is read into one buffer; the answer's pieces go out as they
came, as many at once as one read brought. What is not plain (another path, HTTP/2, an upgrade, `Expect`, a chunked
body, anything `web.head` does not match) is handed to Hypercorn with every byte that was read.

*Error handling.* Errors become the JSON every path has; one in the middle of an answer closes the connection.

*Cancellation.* A client that hangs up cancels its request, wherever that is (`web.hangup`).
"""

import json
import socket
from typing import Final

import attrs
import structlog
import trio

from trio_router.backend.connection import Headers
from trio_router.errors import BodyTooLarge, HeadRefused, InternalError, RequestTimeout, RouterError
from trio_router.fleet.registry import Registry
from trio_router.telemetry.events import Events
from trio_router.web.admission import Admission, request_id
from trio_router.web.client_socket import ClientLeft, ClientSocket
from trio_router.web.cors import cors_headers
from trio_router.web.head import END, HTTP2, MAX_HEAD_BYTES, Head, check_head, read_head
from trio_router.web.in_flight import InFlight
from trio_router.web.inference import Exchange, InferenceRequest, refusal
from trio_router.web.relay import Answer

log = structlog.get_logger("trio_router.web")

HEAD_SECONDS: Final = 30.0
"""How long a connection may be idle, or take to send a head: the guard against slow headers."""
BODY_IDLE_SECONDS: Final = 30.0
BODY_BYTES_PER_SECOND: Final = 16 * 1024
"""A body may take `BODY_IDLE_SECONDS`, and a second more for each of these."""
WRITE_STALL_SECONDS: Final = 60.0
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 4 * 1024 * 1024
BLANK: Final = ord(" ")
"""No method begins with this or a lesser byte; a TLS handshake does."""
REASONS: Final = {200: b"OK", 400: b"Bad Request", 401: b"Unauthorized", 403: b"Forbidden", 404: b"Not Found"}


class AnswerCut(Exception):
    """Raised when an answer that had begun cannot be completed."""


@attrs.define(eq=False, kw_only=True)
class DataPlane:
    """What every connection shares."""

    registry: Registry
    events: Events
    admission: Admission
    max_body_bytes: int
    in_flight: InFlight = attrs.field(factory=InFlight)

    async def serve(self, client: ClientSocket) -> bytes | None:
        """Answer request after request; returns None when the connection is over.

        Or returns what was read of a request that is not for the data plane: the connection is Hypercorn's now.
        """
        answered = False
        while True:
            raw = await self._read_raw_head(client, answered=answered)
            if raw is None:
                return None
            head = read_head(raw)
            if head is None:
                try:
                    check_head(raw)
                except HeadRefused as error:
                    await self._refuse_head(client, error)
                    return None
                return bytes(raw + client.received)
            with self.in_flight:
                more = await self._answer(client, head)
            if not more:
                return None
            answered = True

    async def _refuse_head(self, client: ClientSocket, error: HeadRefused) -> None:
        await self._send_error(client, error, [(b"x-request-id", request_id(None).encode("ascii"))], close=True)
        await self._linger(client)

    async def _read_raw_head(self, client: ClientSocket, *, answered: bool) -> bytes | None:
        """The next head with its empty line, or whatever came that cannot become one; None: the client is done.

        `answered` says that the client has just been sent an answer: what it asks next is still on its way.
        """
        buffer = client.received
        searched = 0
        with trio.move_on_after(HEAD_SECONDS):
            while True:
                end = buffer.find(END, max(0, searched - len(END)))
                if end >= 0:
                    raw = bytes(buffer[: end + len(END)])
                    del buffer[: end + len(END)]
                    return raw
                searched = len(buffer)
                # nothing to gain from waiting for the rest: it cannot become a head, or not one of HTTP/1
                if searched and (searched >= MAX_HEAD_BYTES or buffer[0] <= BLANK or buffer.startswith(HTTP2)):
                    raw = bytes(buffer)
                    buffer.clear()
                    return raw
                data = await client.receive(wait=answered and not searched)
                if not data:
                    return None
                buffer += data
        return None

    async def _answer(self, client: ClientSocket, head: Head) -> bool:
        """Answer the request that begins with `head`; whether the connection can carry another."""
        arrived_at = trio.current_time()
        identity = request_id(head.get(b"x-request-id"))
        common: Headers = [(b"x-request-id", identity.encode("ascii"))]
        common += cors_headers(self.admission, head.get(b"origin"))
        client.scope = trio.CancelScope()
        with client.scope:
            if client.gone:
                return False
            try:
                self._admit(head)
                body = await self._read_body(client, head.length)
            except RouterError as error:
                self.events.emit(refusal(head.path, error, arrived_at))
                await self._send_error(client, error, common, close=True)
                await self._linger(client)
                return False
            request = InferenceRequest(
                path=head.path,
                target=head.target,
                headers=head.headers,
                fields=head.fields,
                body=body,
                request_id=identity,
                arrived_at=arrived_at,
            )
            return await self._serve(client, request, common, close=head.close)
        return False

    async def _serve(self, client: ClientSocket, request: InferenceRequest, common: Headers, *, close: bool) -> bool:
        """Have the request answered, and pass the answer on; whether the connection can carry another."""
        try:
            async with Exchange(registry=self.registry, events=self.events, request=request) as answer:
                close = close or self.registry.draining
                await self._relay(client, answer, common, close=close)
        except AnswerCut:
            return False
        except RouterError as error:
            close = close or self.registry.draining
            await self._send_error(client, error, common, close=close)
        except ClientLeft:
            raise
        except Exception:
            log.exception("internal error", id=request.request_id, path=request.path)
            bug = InternalError("an internal error; the router's log says more")
            await self._send_error(client, bug, common, close=True)
            return False
        return not close

    def _admit(self, head: Head) -> None:
        """Everything that can be said before the body is read. Raises RouterError."""
        host = head.get(b"host")
        self.admission.check_host(host)
        self.admission.check_origin("POST", host, head.get(b"origin"))
        self.admission.check_key(head.path, head.get(b"authorization"), head.get(b"x-api-key"))
        if head.length > self.max_body_bytes:
            raise BodyTooLarge(f"the body is larger than {self.max_body_bytes} bytes, the limit (api.max_body_mb)")

    async def _read_body(self, client: ClientSocket, length: int) -> bytes | bytearray:
        """The body, which is the next `length` bytes. Raises RequestTimeout, ClientLeft."""
        buffer = client.received
        if len(buffer) >= length:
            body = bytes(buffer[:length])
            del buffer[:length]
            return body
        whole = bytearray(length)
        have = len(buffer)
        whole[:have] = buffer
        buffer.clear()
        seconds = BODY_IDLE_SECONDS + length / BODY_BYTES_PER_SECOND
        with trio.move_on_after(seconds) as patience, memoryview(whole) as view:
            await client.receive_into(view[have:])
        if patience.cancelled_caught:
            raise RequestTimeout(f"the body did not come within {seconds:.0f} s")
        return whole

    async def _relay(self, client: ClientSocket, answer: Answer, common: Headers, *, close: bool) -> None:
        """The answer's head and body, as they come. Raises AnswerCut, ClientLeft."""
        headers = answer.headers()
        chunked = not any(name == b"content-length" for name, _ in headers)
        out = _head(answer.status, [*headers, *common], chunked=chunked, close=close)
        while True:
            try:
                piece = await answer.receive()
            except RouterError as error:
                # the connection ends without the answer's end: its client must not take what it has for the whole
                log.warning("answer cut", path=answer.endpoint, error=error.message)
                raise AnswerCut from error
            if chunked:
                out += b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b"0\r\n\r\n"
            else:
                out += piece
            if out:
                await client.send(out, WRITE_STALL_SECONDS)
            if not piece:
                return
            out = b""

    async def _send_error(self, client: ClientSocket, error: RouterError, common: Headers, *, close: bool) -> None:
        body = json.dumps(error.body(), ensure_ascii=False).encode()
        headers: Headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in error.headers]
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *common]
        await client.send(_head(error.status, headers, chunked=False, close=close) + body, WRITE_STALL_SECONDS)

    async def _linger(self, client: ClientSocket) -> None:
        """Read and forget what the client still sends, or the kernel resets the connection under our answer."""
        try:
            client.sock.shutdown(socket.SHUT_WR)
            forgotten = 0
            with trio.move_on_after(LINGER_SECONDS):
                while forgotten < LINGER_BYTES and (data := await client.receive()):
                    forgotten += len(data)
        except (OSError, ClientLeft):
            return


def _head(status: int, headers: Headers, *, chunked: bool, close: bool) -> bytes:
    lines = [b"HTTP/1.1 %d %b" % (status, REASONS.get(status, b""))]
    lines += [name + b": " + value for name, value in headers]
    if chunked:
        lines.append(b"transfer-encoding: chunked")
    if close:
        lines.append(b"connection: close")
    lines.append(b"\r\n")
    return b"\r\n".join(lines)
