"""The way of a request's bytes to a llama-server, up to the first of its answer's.

Decides nothing: whether to try again is `fleet.dispatch`'s.
"""

import re
from typing import Final

import attrs
import structlog

from trio_router.backend.answer import HOP_BY_HOP, AnswerHead, Headers
from trio_router.backend.backend import Slot
from trio_router.backend.connection import BackendLost, Connection
from trio_router.errors import BackendTimeout, RouterError
from trio_router.web.assembly import NotWhole
from trio_router.web.stoppable import Stoppable

log = structlog.get_logger("trio_router.web")

NOT_FORWARDED: Final = HOP_BY_HOP | {
    b"accept-encoding",  # llama-server does not compress; a body that passes unread must not be
    b"authorization",  # ours, not the backend's
    b"content-length",
    b"content-encoding",  # there is none, whether that is said or not
    b"content-type",  # it is JSON, whatever it is called, or else a form
    b"cookie",
    b"expect",
    b"host",
    b"origin",  # checked already; llama-server would answer with CORS headers of its own
    b"x-api-key",
    b"x-conversation-id",  # llama-server goes on for whoever left, so that its own page can come back to the answer
    b"x-request-deadline-ms",
    b"x-request-id",  # sent once, as we name the request
    b"x-request-priority",
}
WHOLE_BYTES: Final = 192 * 1024
"""An answer of known length up to this is read whole before it is begun: until then it can be tried elsewhere, or
refused with words. Less than the 256 KiB that are held for one client at most."""

EVENT_STREAM: Final = b"text/event-stream"
_CLOSES: Final = re.compile(rb"[ \t\r\n]*\}")


def is_event_stream(head: AnswerHead) -> bool:
    """Whether a stream of events follows."""
    return (head.get(b"content-type") or b"").lower().startswith(EVENT_STREAM)


def request_start(target: str, headers: Headers, content_type: bytes = b"application/json") -> bytes:
    """The head of a request for a llama-server, but for what differs from one to the next and its empty line.

    `target` is the path with its query, as the client wrote it.
    """
    left_out = NOT_FORWARDED
    if any(name == b"connection" and value.lower() not in {b"keep-alive", b"close"} for name, value in headers):
        left_out = left_out | {
            listed.strip().lower() for name, value in headers if name == b"connection" for listed in value.split(b",")
        }
    lines = [b"POST " + target.encode("ascii") + b" HTTP/1.1", b"Host: llama-server", b"Content-Type: " + content_type]
    lines += [name + b": " + value for name, value in headers if name not in left_out]
    return b"\r\n".join(lines)


def request_head(start: bytes, length: int, *, request_id: str, key: str | None) -> bytes:
    """The whole head: `start`, and what belongs to this request and to the backend that it goes to."""
    identity = request_id.encode("ascii")
    if key is None:
        return b"%b\r\nX-Request-ID: %b\r\nContent-Length: %d\r\n\r\n" % (start, identity, length)
    return b"%b\r\nX-Request-ID: %b\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (
        start,
        identity,
        key.encode("ascii"),
        length,
    )


@attrs.define(eq=False)
class Opened:
    """An answer has begun: its head, and what of its body had come when it was passed on."""

    connection: Connection
    head: AnswerHead
    first: bytes


@attrs.define(eq=False)
class Outgoing:
    """One request, ready to be sent to any slot."""

    start: bytes
    """Of its head, as `request_start` makes it."""
    body: bytes | bytearray
    request_id: str
    stoppable: Stoppable | None = None
    """What is sent in its place."""
    pinned: bool = False
    """Whether it is to be told which slot to use."""
    slot: Slot | None = None
    """Where it is, while its answer has not begun."""
    refusal: RouterError | None = None
    """Why it is not to go on."""

    def cut(self, error: RouterError) -> None:
        """Have the attempt that runs, and any other, end with `error`."""
        self.refusal = error
        if self.slot is not None:
            self.slot.disconnect()

    async def attempt(self, slot: Slot) -> Opened:
        """Send the request on `slot`'s connection and wait for the first bytes of the answer's body.

        llama-server sends the head of a stream before it has read the prompt: with only that in hand the request
        could not be given to another. Raises BackendLost, BackendTimeout, and what `cut` says.
        """
        self.slot = slot
        stoppable = None if self.stoppable is None else self.stoppable.on(slot.backend)
        head, body = self._for(slot, stoppable)
        try:
            connection = await slot.connect()
            if self.refusal is not None:
                raise self.refusal
            await connection.send(head, body)
            answer = await connection.receive_head()
            return await begun(connection, answer, stoppable)
        except NotWhole as error:
            if slot.connection is None:  # somebody else ended it just now, for a reason that holds
                self.slot = None
                raise self.refusal or BackendLost("the connection was ended") from error
            if stoppable is not None:
                self.stoppable = stoppable.otherwise(slot.backend, error)
                if error.ever:
                    log.warning("asked otherwise", model=slot.backend.alias, path=stoppable.name, why=str(error))
            slot.disconnect()
            return await self.attempt(slot)
        except BackendLost as lost:
            self.slot = None
            if self.refusal is not None:
                raise self.refusal from lost
            if lost.silent:
                raise BackendTimeout(f"model {slot.backend.alias!r}: {lost}", param="model") from lost
            raise

    def _for(self, slot: Slot, stoppable: Stoppable | None) -> tuple[bytes, bytes | bytearray]:
        """The request as it is sent there: head and body."""
        body = self.body if stoppable is None else stoppable.body
        if self.pinned and slot.backend.pins:
            body = in_slot(body, slot.index)
        return request_head(self.start, len(body), request_id=self.request_id, key=slot.backend.address.key), body


async def begun(connection: Connection, answer: AnswerHead, stoppable: Stoppable | None) -> Opened:
    """The answer with the first bytes of its body. Raises BackendLost, NotWhole."""
    if stoppable is not None:
        stoppable.check(answer)
        if is_event_stream(answer):
            answer, first = await stoppable.begin(connection, answer)
            return Opened(connection, answer, first)
    first = await connection.receive()
    if answer.length is not None and answer.length <= WHOLE_BYTES:
        pieces = [first]
        while not connection.complete:
            pieces.append(await connection.receive())
        first = b"".join(pieces)
    return Opened(connection, answer, first)


def in_slot(body: bytes | bytearray, index: int) -> bytes:
    """`body`, which is a JSON object, with the slot that it is for.

    The first of its fields, so that the client's own `id_slot`, if there is one, is the last that llama-server reads.
    """
    opened = body.index(b"{") + 1
    comma = b"" if _CLOSES.match(body, opened) else b","
    return b"".join([body[:opened], b'"id_slot":%d%b' % (index, comma), body[opened:]])
