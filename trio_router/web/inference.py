"""One inference request from its admission to its last byte; both ways in use this, and only this.

`Inference.open` is an async context manager: entering it admits the request, waits for a slot, sends the request
and returns an `Answer` that has begun; leaving it gives the slot back, and tells what became of the request.
"""

from types import TracebackType

import attrs
import structlog
import trio

from trio_router.backend.connection import Headers
from trio_router.errors import RouterError, TimedOut
from trio_router.fleet.dispatch import dispatch
from trio_router.fleet.registry import Registry
from trio_router.telemetry.events import Events, Outcome, RequestFinished
from trio_router.web.admission import check_encoding, priority, read_wish
from trio_router.web.relay import Answer, Outgoing

log = structlog.get_logger("trio_router.request")

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left before it was answered; nobody sees it but logs and metrics."""


@attrs.frozen(kw_only=True)
class InferenceRequest:
    """A request as it came: everything that is needed to answer it, whoever read it."""

    path: str
    target: str
    """The path with its query, as the client wrote it."""
    headers: Headers
    """As they came, without any that the server added."""
    body: bytes
    request_id: str
    arrived_at: float
    """Trio time."""

    def header(self, name: bytes) -> str | None:
        """The first value of `name` (lower case)."""
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == name), None)


@attrs.define(eq=False, kw_only=True)
class Exchange:
    """One request under way. Use as `async with`."""

    registry: Registry
    events: Events
    request: InferenceRequest
    _answer: Answer | None = None
    _alias: str | None = None
    _priority: str | None = None
    _first_byte: float | None = None

    async def __aenter__(self) -> Answer:
        """Admit, queue, send; the answer has begun. Raises RouterError."""
        try:
            self._answer = await self._open()
        except BaseException as error:
            self._tell(error)
            raise
        self._first_byte = trio.current_time()
        return self._answer

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release; needs no await, so a cancelled request releases like any other."""
        if self._answer is not None:
            whole = self._answer.handed_out
            if whole:  # a client may go away with its last byte: that is no cancellation
                self.registry.model(self._answer.lease.slot.backend.alias).supervisor.proved()
            self._answer.close()
            self._tell(None if whole else self._answer.error or error)

    async def _open(self) -> Answer:
        request = self.request
        check_encoding(request.header(b"content-encoding"))
        wanted = priority(request.header(b"x-request-priority"))
        wish = read_wish(request.body)
        ticket = self.registry.ticket(wish.model, wanted)
        self._alias, self._priority = wish.model, wanted.label
        silence = self.registry.config.system.request_timeout_sec
        outgoing = Outgoing(
            target=request.target,
            headers=request.headers,
            body=request.body,
            request_id=request.request_id,
            silence_seconds=silence,
        )
        lease, opened = await dispatch(self.registry, ticket, outgoing.attempt)
        return Answer(
            endpoint=request.path,
            lease=lease,
            opened=opened,
            queue_seconds=lease.granted_at - request.arrived_at,
            silence_seconds=silence,
        )

    def _tell(self, error: BaseException | None) -> None:
        """Say what became of the request, once."""
        now = trio.current_time()
        answer = self._answer
        if answer is not None:
            status = answer.status
        else:
            status = error.status if isinstance(error, RouterError) else CLIENT_CLOSED_REQUEST
        outcome = outcome_of(error, status)
        duration = now - self.request.arrived_at
        self.events.emit(
            RequestFinished(
                alias=self._alias,
                endpoint=self.request.path,
                priority=self._priority,
                outcome=outcome,
                status=status,
                code=error.code if isinstance(error, RouterError) else None,
                duration_seconds=duration,
                queue_seconds=None if answer is None else answer.queue_seconds,
                first_byte_seconds=None if self._first_byte is None else self._first_byte - self.request.arrived_at,
            )
        )
        log.info(
            "request",
            id=self.request.request_id,
            path=self.request.path,
            model=self._alias,
            priority=self._priority,
            outcome=outcome.value,
            status=status,
            seconds=round(duration, 4),
            incarnation=None if answer is None else answer.lease.slot.backend.incarnation,
        )


def outcome_of(error: BaseException | None, status: int) -> Outcome:
    """How an operator counts a request that ended with `error`, or with a backend's `status`."""
    if isinstance(error, TimedOut):
        return Outcome.TIMEOUT
    if isinstance(error, RouterError):
        if error.status == 503 and status == 503:
            return Outcome.REJECTED
        return Outcome.CLIENT_ERROR if error.status < 500 else Outcome.BACKEND_ERROR
    if error is not None:  # cancelled, or the way out to the client broke: either way it is the client who left
        return Outcome.CANCELLED
    return Outcome.OK if status < 400 else Outcome.CLIENT_ERROR if status < 500 else Outcome.BACKEND_ERROR
