"""The lean way in: plain HTTP/1.1 inference requests, from a client's socket to the backend's and back.

The same admission, registry, queue, lease and retries as behind Quart (`web.inference`); only how bytes come and go
is different: a head is matched, not modelled; a body is read into one buffer; the answer's pieces go out as they
came, as many at once as one read brought. What is not plain (another path, HTTP/2, an upgrade, `Expect`, a chunked
body, anything `web.head` does not match) is handed to Hypercorn with every byte that was read.

*Error handling.* Errors become the JSON every path has; one in the middle of an answer closes the connection.

*Cancellation.* A client that hangs up cancels its request, wherever that is (`web.hangup`).
"""

import json
import re
import socket
from functools import partial
from typing import Final

import attrs
import structlog
import trio

from trio_router.backend.answer import Headers
from trio_router.errors import BodyTooLarge, HeadRefused, InternalError, RequestTimeout, RouterError
from trio_router.fleet.registry import Registry
from trio_router.telemetry.events import Events
from trio_router.web.admission import Admission, request_id
from trio_router.web.body import TOO_SLOW, due
from trio_router.web.client_socket import ClientLeft, ClientSocket
from trio_router.web.cors import cors_headers
from trio_router.web.date import date_line
from trio_router.web.error_events import error_event
from trio_router.web.head import BARE_LINE_FEED, END, HTTP2, MAX_HEAD_BYTES, Head, check_head, read_head
from trio_router.web.in_flight import InFlight
from trio_router.web.inference import Asked, Exchange, refusal
from trio_router.web.keys import Holder
from trio_router.web.known_heads import Known, KnownHeads
from trio_router.web.relay import STREAM_HEADERS, Answer
from trio_router.web.responses import error_body
from trio_router.web.waiting_streams import Waiting, WaitingStreams

log = structlog.get_logger("trio_router.web")

HEAD_SECONDS: Final = 30.0
"""How long a connection may be idle, or take to send a head: the guard against slow headers."""
WRITE_STALL_SECONDS: Final = 60.0
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 4 * 1024 * 1024
ROOM_BYTES: Final = 1024 * 1024
"""How much a body is given before it is there."""
_ROOM: Final = memoryview(bytes(ROOM_BYTES))
LAST_CHUNK: Final = b"0\r\n\r\n"
BLANK: Final = ord(" ")
"""No method begins with this or a lesser byte; a TLS handshake does."""
EMPTY_LINES: Final = re.compile(rb"(?:\r\n)+")
"""Before a request they are nothing: there are clients that end a body with one (RFC 9112 section 2.2)."""
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
    waiting_streams: WaitingStreams
    under_way: set[Exchange]
    in_flight: InFlight = attrs.field(factory=InFlight)
    known_heads: KnownHeads = attrs.field(factory=KnownHeads)

    async def serve(self, client: ClientSocket) -> bytes | None:
        """Answer request after request; returns None when the connection is over.

        Or returns what was read of a request that is not for the data plane: the connection is Hypercorn's now.
        """
        with client.scope:
            answered = False
            while True:
                raw = await self._read_raw_head(client, answered=answered)
                if raw is None:
                    return None
                known, length = self.known_heads.recall(client, raw, self.admission.renewals, self.max_body_bytes)
                if known is not None:
                    with self.in_flight:
                        more = await self._answer_known(client, known, length)
                else:
                    head = read_head(raw)
                    if head is None:
                        try:
                            check_head(raw)
                        except HeadRefused as error:
                            await self._refuse_head(client, error)
                            return None
                        return bytes(raw + client.received)
                    with self.in_flight:
                        more = await self._answer(client, raw, head)
                if not more:
                    return None
                answered = True
        return None

    async def _refuse_head(self, client: ClientSocket, error: HeadRefused) -> None:
        await self._send_error(client, error, b"", "", request_id(None), close=True)
        await self._linger(client)

    async def _read_raw_head(self, client: ClientSocket, *, answered: bool) -> bytes | None:
        """The next head with its empty line, or whatever came that cannot become one; None: the client is done.

        `answered` says that the client has just been sent an answer: what it asks next is still on its way.
        """
        searched = dropped = 0
        client.asking, client.asking_since = True, None
        while True:
            received = client.received
            if (empty := EMPTY_LINES.match(received)) is not None:
                dropped += empty.end()
                received = client.received = received[empty.end() :]
                searched = 0
                if dropped > MAX_HEAD_BYTES:
                    client.asking = False
                    return b""
            end = received.find(END, max(0, searched - len(END)))
            if end >= 0:
                client.asking = False
                client.received = received[end + len(END) :]
                return received[: end + len(END)]
            fresh, searched = max(0, searched - 1), len(received)
            # nothing to gain from waiting for the rest: it cannot become a head, or not one of HTTP/1
            if searched and (
                searched >= MAX_HEAD_BYTES
                or (received[0] <= BLANK and received != b"\r")
                or received.startswith(HTTP2)
                or BARE_LINE_FEED.search(received, fresh)
            ):
                client.asking = False
                client.received = b""
                return received
            data = await client.receive(wait=answered and not searched)
            if not data:
                return None
            client.received = received + data if received else data

    async def _answer(self, client: ClientSocket, raw: bytes, head: Head) -> bool:
        """Answer the request that begins with `head`; whether the connection can carry another."""
        arrived_at = trio.current_time()
        sent_id = head.get(b"x-request-id")
        identity = request_id(sent_id)
        common = _lines(cors_headers(self.admission, head.get(b"origin")))
        try:
            holder = self._admit(head)
        except RouterError as error:
            self.events.ended(partial(refusal, head.path, error, identity, arrived_at))
            return await self._turn_away(client, error, common, head.path, identity)
        known = Known(
            asked=Asked.of(head.path, head.target, head.headers, holder),
            renewal=self.admission.renewals,
            request_id=identity if identity == sent_id else None,
            common=common,
            close=head.close,
        )
        self.known_heads.remember(client, raw, known)
        return await self._answer_known(client, known, head.length)

    async def _answer_known(self, client: ClientSocket, known: Known, length: int) -> bool:
        """Answer a request whose head was admitted; whether the connection can carry another."""
        arrived_at = trio.current_time()
        identity = known.request_id or request_id(None)
        if len(client.received) == length:
            body: bytes | bytearray = client.received
            client.received = b""
        else:
            try:
                body = await self._read_body(client, length)
            except RouterError as error:
                self.events.ended(partial(refusal, known.asked.path, error, identity, arrived_at))
                return await self._turn_away(client, error, known.common, known.asked.path, identity)
        exchange = Exchange(
            registry=self.registry,
            events=self.events,
            asked=known.asked,
            body=body,
            client=client.address,
            request_id=identity,
            arrived_at=arrived_at,
            under_way=self.under_way,
        )
        if known.asked.streamed:
            exchange.waiting_streams = self.waiting_streams
            exchange.say = partial(self._say, client, known, identity)
        return await self._serve(client, exchange, known.common, close=known.close)

    async def _turn_away(
        self, client: ClientSocket, error: RouterError, lines: bytes, path: str, identity: str
    ) -> bool:
        await self._send_error(client, error, lines, path, identity, close=True)
        await self._linger(client)
        return False

    async def _serve(self, client: ClientSocket, exchange: Exchange, lines: bytes, *, close: bool) -> bool:
        """Have the request answered, and pass the answer on; whether the connection can carry another.

        `lines` are those that every answer has, but for the request's id.
        """
        path, identity = exchange.asked.path, exchange.request_id
        try:
            async with exchange as answer:
                close = close or self.registry.draining
                if exchange.waiting is None or not exchange.waiting.begun:
                    chunked = answer.chunked
                    out = _head(
                        answer.status, answer.header_lines() + _common(lines, identity), chunked=chunked, close=close
                    )
                    await self._relay(client, answer, out, chunked=chunked)
                elif answer.is_stream:
                    out, client.unsent = client.unsent, b""
                    await self._relay(client, answer, out, chunked=True)
                else:
                    await self._send_last(client, await answer.as_event())
        except AnswerCut:
            return False
        except RouterError as error:
            close = close or self.registry.draining
            await self._send_failure(client, exchange, error, lines, close=close)
        except ClientLeft:
            raise
        except Exception:
            log.exception("internal error", id=identity, path=path)
            bug = InternalError("an internal error; the router's log says more")
            await self._send_failure(client, exchange, bug, lines, close=True)
            return False
        return not close

    def _say(self, client: ClientSocket, known: Known, identity: str, waiting: Waiting, events: bytes) -> None:
        """Tell a client whose stream waits where it stands."""
        out = _chunk(events)
        if not waiting.begun:
            own = _lines([*STREAM_HEADERS, (b"x-queue-position", b"%d" % waiting.ticket.position)])
            common = own + _common(known.common, identity)
            out = _head(200, common, chunked=True, close=known.close or self.registry.draining) + out
        client.say(out)

    async def _send_failure(
        self, client: ClientSocket, exchange: Exchange, error: RouterError, lines: bytes, *, close: bool
    ) -> None:
        """The error as an answer, or as the last event of one that has begun."""
        waiting, path = exchange.waiting, exchange.asked.path
        if waiting is None or not waiting.begun:
            await self._send_error(client, error, lines, path, exchange.request_id, close=close)
        else:
            await self._send_last(client, error_event(path, error, cut=False))

    async def _send_last(self, client: ClientSocket, events: bytes) -> None:
        """The last events of a stream that began early."""
        out, client.unsent = client.unsent + _chunk(events) + LAST_CHUNK, b""
        await client.send(out, WRITE_STALL_SECONDS)

    def _admit(self, head: Head) -> Holder | None:
        """Everything that can be said before the body is read; whose key it is. Raises RouterError."""
        host = head.get(b"host")
        self.admission.check_host(host)
        self.admission.check_origin("POST", host, head.get(b"origin"))
        holder = self.admission.check_key(head.path, head.get(b"authorization"), head.get(b"x-api-key"))
        if head.length > self.max_body_bytes:
            raise BodyTooLarge(f"the body is larger than {self.max_body_bytes} bytes, the limit (api.max_body_mb)")
        return holder

    async def _read_body(self, client: ClientSocket, length: int) -> bytes | bytearray:
        """The body, which is the next `length` bytes. Raises RequestTimeout, ClientLeft."""
        received = client.received
        if len(received) >= length:
            client.received = received[length:]
            return received[:length]
        have = len(received)
        whole = bytearray(min(length, max(ROOM_BYTES, have)))
        whole[:have] = received
        client.received = b""
        began = trio.current_time()
        with trio.CancelScope(deadline=due(began, 0)) as patience:

            def came(count: int) -> None:
                patience.deadline = due(began, have + count)

            while have < length:
                if have == len(whole):  # what was only announced takes no memory
                    whole += _ROOM[: length - have]
                with memoryview(whole) as view:
                    await client.receive_into(view[have:], came)
                have = len(whole)
        if patience.cancelled_caught:
            raise RequestTimeout(TOO_SLOW)
        return whole

    async def _relay(self, client: ClientSocket, answer: Answer, out: bytes, *, chunked: bool) -> None:
        """The answer's body as it comes, after `out`. Raises AnswerCut, ClientLeft."""
        rest = b""

        def pass_on(piece: bytes) -> bool:
            nonlocal rest
            rest = client.try_send(b"%x\r\n%b\r\n" % (len(piece), piece))
            return not rest

        while True:
            try:
                piece = await answer.receive()
            except RouterError as error:
                # the connection ends without the answer's end: its client must not take what it has for the whole
                log.warning("answer cut", path=answer.endpoint, error=error.message)
                raise AnswerCut from error
            if chunked:
                out += b"%x\r\n%b\r\n" % (len(piece), piece) if piece else LAST_CHUNK
            else:
                out += piece
            if out:
                await client.send(out, WRITE_STALL_SECONDS)
            if not piece or (answer.handed_out and not chunked):
                return
            out = b""
            if chunked:
                await answer.stream(pass_on)
                out, rest = rest, b""
                if out:
                    await client.send(out, WRITE_STALL_SECONDS)
                    out = b""

    async def _send_error(
        self, client: ClientSocket, error: RouterError, lines: bytes, path: str, identity: str, *, close: bool
    ) -> None:
        body = json.dumps(error_body(error, path, identity), ensure_ascii=False).encode()
        headers: Headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in error.headers]
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        head = _head(error.status, _lines(headers) + _common(lines, identity), chunked=False, close=close)
        await client.send(head + body, WRITE_STALL_SECONDS)

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


def _lines(headers: Headers) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _common(lines: bytes, identity: str) -> bytes:
    """With the request's id, once for OpenAI's clients and once for Anthropic's."""
    shown = identity.encode("ascii")
    return b"%bx-request-id: %b\r\nrequest-id: %b\r\n" % (lines, shown, shown)


def _head(status: int, lines: bytes, *, chunked: bool, close: bool) -> bytes:
    return b"HTTP/1.1 %d %b\r\n%b%b%b%b\r\n" % (
        status,
        REASONS.get(status, b""),
        lines,
        date_line(),
        b"transfer-encoding: chunked\r\n" if chunked else b"",
        b"connection: close\r\n" if close else b"",
    )
