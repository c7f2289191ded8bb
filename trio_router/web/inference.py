"""One inference request from its admission to its last byte; both ways in use this, and only this.

`Inference.open` is an async context manager: entering it admits the request, waits for a slot, sends the request
and returns an `Answer` that has begun; leaving it gives the slot back, and tells what became of the request.
"""

from collections.abc import Mapping
from types import TracebackType

import attrs
import structlog
import trio

from trio_router.backend.connection import Headers
from trio_router.errors import RouterError, TimedOut
from trio_router.fleet.dispatch import dispatch
from trio_router.fleet.registry import Registry
from trio_router.telemetry.events import Events, Outcome, RequestFinished
from trio_router.telemetry.usage import HEAD_BYTES, NOTHING, Usage, usage_of
from trio_router.web.admission import check_encoding, priority, read_wish
from trio_router.web.relay import Answer, Outgoing

log = structlog.get_logger("trio_router.request")

INTERNAL_ERROR = 500
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left before it was answered; nobody sees it but logs and metrics."""


@attrs.frozen(kw_only=True)
class InferenceRequest:
    """A request as it came: everything that is needed to answer it, whoever read it."""

    path: str
    target: str
    """The path with its query, as the client wrote it."""
    headers: Headers
    """In the order they came, without any that the server added; names are lower case."""
    fields: Mapping[bytes, bytes]
    """The first value of each, by lower-case name."""
    body: bytes | bytearray
    request_id: str
    arrived_at: float
    """Trio time."""

    def header(self, name: bytes) -> str | None:
        """The first value of `name` (lower case)."""
        value = self.fields.get(name)
        return None if value is None else value.decode("latin-1")


def first_values(headers: Headers) -> dict[bytes, bytes]:
    """The first value of each header, by lower-case name."""
    return {name.lower(): value for name, value in reversed(headers)}


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
        self._alias, self._priority = self.registry.model(wish.model).alias, wanted.label
        ticket = self.registry.ticket(wish.model, wanted)
        outgoing = Outgoing(
            target=request.target,
            headers=request.headers,
            body=request.body,
            request_id=request.request_id,
        )
        lease, opened = await dispatch(self.registry, ticket, outgoing.attempt)
        return Answer(
            endpoint=request.path,
            lease=lease,
            opened=opened,
            queue_seconds=lease.granted_at - request.arrived_at,
        )

    def _tell(self, error: BaseException | None) -> None:
        """Say what became of the request, once."""
        now = trio.current_time()
        answer = self._answer
        if answer is not None:
            status = answer.status
        elif isinstance(error, RouterError):
            status = error.status
        else:  # a bug of ours, or the client left
            status = INTERNAL_ERROR if isinstance(error, Exception) else CLIENT_CLOSED_REQUEST
        outcome = outcome_of(error, status)
        duration = now - self.request.arrived_at
        first_byte = None if self._first_byte is None else self._first_byte - self.request.arrived_at
        usage = NOTHING if answer is None else usage_of(answer.opened.first[:HEAD_BYTES], answer.tail)
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
                first_byte_seconds=first_byte,
                first_token_seconds=None if answer is None else first_token_seconds(answer, first_byte, usage),
                seconds_per_output_token=usage.seconds_per_output_token,
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                cached_tokens=usage.cached_tokens,
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


def refusal(path: str, error: RouterError, arrived_at: float) -> RequestFinished:
    """What becomes of a request that ends before there is an exchange: its key, its host or its body was no good."""
    return RequestFinished(
        alias=None,
        endpoint=path,
        priority=None,
        outcome=outcome_of(error, error.status),
        status=error.status,
        code=error.code,
        duration_seconds=trio.current_time() - arrived_at,
    )


def first_token_seconds(answer: Answer, first_byte_seconds: float | None, usage: Usage) -> float | None:
    """From a request's arrival to its first token; None for an answer that has none, or does not say.

    A stream's first byte may be a sign of life before it, so llama-server's own time for the prompt counts too.
    """
    computed = None if usage.prompt_seconds is None else answer.queue_seconds + usage.prompt_seconds
    if answer.is_stream and first_byte_seconds is not None:
        return max(first_byte_seconds, computed or 0.0)
    return computed


def outcome_of(error: BaseException | None, status: int) -> Outcome:
    """How an operator counts a request that ended with `error`, or with a backend's `status`."""
    if isinstance(error, TimedOut):
        return Outcome.TIMEOUT
    if isinstance(error, RouterError):
        if error.status == 503 and status == 503:
            return Outcome.REJECTED
        return Outcome.CLIENT_ERROR if error.status < 500 else Outcome.BACKEND_ERROR
    if isinstance(error, Exception) and status == INTERNAL_ERROR:  # a bug of ours, before there was an answer
        return Outcome.BACKEND_ERROR
    if error is not None:  # cancelled, or the way out to the client broke: either way it is the client who left
        return Outcome.CANCELLED
    return Outcome.OK if status < 400 else Outcome.CLIENT_ERROR if status < 500 else Outcome.BACKEND_ERROR
