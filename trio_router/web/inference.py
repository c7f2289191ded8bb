"""One inference request from its admission to its last byte; both ways in use this, and only this.

`Inference.open` is an async context manager: entering it admits the request, waits for a slot, sends the request
and returns an `Answer` that has begun; leaving it gives the slot back, and tells what became of the request.
"""

import math
import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

import attrs
import msgspec
import trio

from trio_router.backend.answer import Headers
from trio_router.errors import (
    DeadlineExceeded,
    DeadlineUnreachable,
    HeadTooLarge,
    ModelNotLoaded,
    RequestCancelled,
    RouterError,
    TargetTooLong,
    TimedOut,
)
from trio_router.fleet.dispatch import dispatch
from trio_router.fleet.model import Model
from trio_router.fleet.registry import Registry
from trio_router.fleet.rewriting import AS_IT_IS
from trio_router.fleet.ticket import Priority, Ticket
from trio_router.telemetry.events import Events, Outcome, RequestFinished
from trio_router.telemetry.usage import HEAD_BYTES, Usage, usage_of
from trio_router.web.admission import Talk, check_encoding, check_json, deadline_seconds, priority, read_wish
from trio_router.web.continuing import Continuing
from trio_router.web.form import FORM_PATHS, boundary_of, model_of
from trio_router.web.keep_alive import keep_alive_seconds
from trio_router.web.keys import Holder
from trio_router.web.outgoing import Outgoing, request_start
from trio_router.web.relay import Answer
from trio_router.web.stoppable import Stoppable
from trio_router.web.waiting_streams import STREAMED, Waiting, WaitingStreams

SESSIONS: Final = (
    b"x-session-id", b"x-session-affinity", b"session-id", b"x-claude-code-session-id", b"x-conversation-id",
)  # fmt: skip
"""Headers by which clients name the conversation that a request belongs to."""
AUTOLOAD_OFF = re.compile(r"[?&]autoload=(?:false|0)(?:&|$)")
MAX_FORWARDED: Final = 90
"""llama-server takes a head of 100 headers, our own among them, and answers a longer one with an empty 400 (cpp-httplib's
CPPHTTPLIB_HEADER_MAX_COUNT)."""
MAX_LINE_BYTES: Final = 8190
"""Of a header, and of a target: llama-server answers longer ones with an empty 400 or 414, or with nothing
(CPPHTTPLIB_HEADER_MAX_LENGTH, CPPHTTPLIB_REQUEST_URI_MAX_LENGTH: 8,192 with the end of the line)."""
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
"""Before JSON it is nothing, to llama-server too (RFC 8259 section 8.1)."""
INTERNAL_ERROR = 500
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left before it was answered; nobody sees it but logs and metrics."""


@attrs.define(eq=False, kw_only=True)
class Asked:
    """What a request's head says to those who answer it. Depends on nothing else: one may serve many requests."""

    path: str
    start: bytes
    """Of the head that goes to a backend."""
    holder: Holder | None = None
    """Whose key it came with; None where none is needed."""
    priority: Priority = Priority.NORMAL
    deadline_seconds: float = math.inf
    """How long after its arrival its client waits no longer for it to begin."""
    session: bytes | None = None
    """Its client's name for the conversation that it belongs to."""
    streamed: bool = False
    """Whether it may be answered by a stream of events."""
    autoload: bool = True
    """Whether a model may be loaded for it: llama-server's router takes `?autoload=false`."""
    boundary: bytes | None = None
    """Of the parts of a form; None for a body that is JSON."""
    problem: RouterError | None = None
    """Why a request with this head cannot be answered, whatever its body is."""

    @classmethod
    def of(cls, path: str, target: str, headers: Headers, holder: Holder | None = None) -> "Asked":
        """Read a head: `headers` in the order they came, none of the server's own, names in lower case.

        `target` is the path with its query, as the client wrote it.
        """
        asked = cls(path=path, start=request_start(target, headers), holder=holder, streamed=path in STREAMED)
        fields = first_values(headers)
        content_type = fields.get(b"content-type")
        asked.session = next((fields[name] for name in SESSIONS if name in fields), None)
        asked.autoload = "autoload=" not in target or AUTOLOAD_OFF.search(target) is None
        try:
            if path in FORM_PATHS and content_type is not None:
                asked.boundary = boundary_of(_text(content_type))
                if asked.boundary is not None:
                    asked.start = request_start(target, headers, content_type)
            check_target(target)
            check_headers(asked.start)
            check_encoding(_text(fields.get(b"content-encoding")))
            asked.priority = priority(_text(fields.get(b"x-request-priority")))
            asked.deadline_seconds = deadline_seconds(_text(fields.get(b"x-request-deadline-ms")))
        except RouterError as error:
            asked.problem = error
        return asked


def check_target(target: str) -> None:
    """Raise TargetTooLong for a path and query that llama-server would not take."""
    if len(target) > MAX_LINE_BYTES:
        raise TargetTooLong(f"the path and its query have more than {MAX_LINE_BYTES} characters")


def check_headers(start: bytes) -> None:
    """Raise HeadTooLarge for a head, as it begins, that llama-server would not take."""
    lines = start.split(b"\r\n")
    if len(lines) > MAX_FORWARDED + 1:
        raise HeadTooLarge(f"the head has more than {MAX_FORWARDED} headers for llama-server")
    if max(map(len, lines[1:])) > MAX_LINE_BYTES:
        raise HeadTooLarge(f"the head has a header of more than {MAX_LINE_BYTES} bytes")


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def first_values(headers: Headers) -> dict[bytes, bytes]:
    """The first value of each header, by lower-case name."""
    return {name.lower(): value for name, value in reversed(headers)}


@attrs.define(eq=False, kw_only=True)
class Exchange:
    """One request under way. Use as `async with`."""

    registry: Registry
    events: Events
    asked: Asked
    body: bytes | bytearray
    client: str
    """Address of who asks."""
    request_id: str
    arrived_at: float
    """Trio time."""
    under_way: set["Exchange"]
    """All there are; it is among them while it runs."""
    alias: str | None = None
    """The model, if not the body says it."""
    waiting_streams: WaitingStreams | None = None
    say: Callable[[Waiting, bytes], None] | None = None
    """Tells the client where its request stands, if it asks for a stream and that waits."""
    waiting: Waiting | None = None
    """Once it had to."""
    _stream: bool = False
    """Whether the body asks for a stream."""
    _talk: Talk | None = None
    _answer: Answer | None = None
    _outgoing: Outgoing | None = None
    ticket: Ticket | None = attrs.field(default=None, init=False)
    """Its place in the queue, once it has one."""
    _model: Model = attrs.field(init=False)
    """The one in whose queue that is: a reload may take the name from it."""
    _entered: bool = False
    """Whether the key's holder counts it among its own."""
    _first_byte_at: float = 0.0
    _ended_at: float = 0.0
    _finished_at: float = 0.0
    _error: BaseException | None = None

    async def __aenter__(self) -> Answer:
        """Admit, queue, send; the answer has begun. Raises RouterError."""
        self.under_way.add(self)
        try:
            self._answer = answer = await self._open()
        except BaseException as error:
            self._leave()
            self._ended(error)
            raise
        self._first_byte_at = trio.current_time()
        return answer

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release; needs no await, so a cancelled request releases like any other."""
        self._leave()
        answer = self._answer
        if answer is not None:
            whole = answer.handed_out
            if whole:  # a client may go away with its last byte: that is no cancellation
                self.registry.answered(answer.lease.slot.backend, answer.end)
            answer.close()
            self._ended(None if whole else answer.error or error)

    @property
    def state(self) -> str:
        """How far it is: waiting, running (nothing of its answer is there), or answering."""
        if self._answer is not None:
            return "answering"
        return "waiting" if self._outgoing is None or self._outgoing.slot is None else "running"

    def cancel(self, error: RouterError) -> bool:
        """Have it end with `error`, wherever it is; False for one that llama-server has answered, and its client takes."""
        if self._answer is not None:
            if self._answer.given_back_at is not None:
                return False
            self._answer.cut(error)
        elif self._outgoing is not None and self.ticket is not None:
            self._outgoing.cut(error)
            self._model.scheduler.withdraw(self.ticket, error)
        return True

    def _leave(self) -> None:
        self.under_way.discard(self)
        if self._entered and self.asked.holder is not None:
            self.asked.holder.leave()
            self._entered = False

    async def _open(self) -> Answer:
        asked = self.asked
        if asked.problem is not None:
            raise asked.problem.again()
        if self.body.startswith(BYTE_ORDER_MARK):  # noqa: FURB188  (removeprefix copies a bytearray without one, too)
            self.body = self.body[len(BYTE_ORDER_MARK) :]
        if self.alias is not None and asked.boundary is None:
            check_json(self.body)
        said, kept = (self.alias, None) if self.alias is not None else self._wanted()
        due = self.arrived_at + asked.deadline_seconds
        self.ticket = ticket = self.registry.ticket(said, asked.priority, self.client, due=due)
        self._model = self.registry.models[ticket.alias]
        if not asked.autoload and self._model.supervisor.backend is None:
            raise ModelNotLoaded(f"model {ticket.alias!r} is not loaded, and autoload=false", param="model")
        if asked.holder is not None:
            allowed = asked.holder.enter(ticket.alias, ticket.priority, said)
            self._entered = True
            self.ticket = ticket = self.registry.ticket(
                ticket.alias, allowed, asked.holder.name, asked.holder.weight, due
            )
        if due < ticket.arrived_at:
            raise DeadlineExceeded("the deadline passed before the body was there", param="X-Request-Deadline-Ms")
        keep_seconds = None if kept is None else keep_alive_seconds(kept)
        rewriting = self.registry.names.rewritings.get(said) if asked.boundary is None else None
        if rewriting is not None or kept is not None:
            self.body = (rewriting or AS_IT_IS).apply(asked.path, self.body)
        self._outgoing = outgoing = Outgoing(asked.start, self.body, self.request_id)
        if self._talk is not None:
            self._suit(self._talk, ticket, outgoing)
        try:
            lease, opened = await dispatch(self.registry, ticket, outgoing.attempt, request_id=self.request_id)
        finally:
            ticket.waits, ticket.yields = None, False
            if self.waiting is not None and self.waiting_streams is not None:
                self.waiting_streams.forget(self.waiting)
        self.registry.keep(ticket.alias, keep_seconds)
        waited = (ticket.granted_at or 0.0) - self.arrived_at
        return Answer(asked.path, lease, opened, waited, ticket.position, ticket.expected_seconds)

    def _wanted(self) -> tuple[str, msgspec.Raw | None]:
        """The model that the body names, or the default one where that is to answer for others; and its `keep_alive`.

        Raises MissingModel, InvalidJSON, InvalidForm.
        """
        default = self.registry.config.system.default_model
        if self.asked.boundary is not None:
            return self.registry.meant(model_of(self.body, self.asked.boundary, default)), None
        wish = read_wish(self.body, default, talk=self.asked.streamed)
        self._stream, self._talk = wish.stream, wish.talk
        return self.registry.meant(wish.model), wish.keep_alive

    def _suit(self, talk: Talk, ticket: Ticket, outgoing: Outgoing) -> None:
        """What a request gets whose body we read: a slot that suits it, word while it waits, a llama-server that stops."""
        system = self.registry.config.system
        yields = system.preempt_low and ticket.priority is Priority.LOW
        if system.stop_at_once or yields:
            outgoing.stoppable = Stoppable.of(self.asked.path, self.body, talk, stream=self._stream)
            stops = outgoing.stoppable is not None and outgoing.stoppable.in_prompt
            ticket.yields = yields and stops  # else llama-server would go on with it
            if ticket.yields and outgoing.stoppable is not None and not self._stream:
                continuing = Continuing.of(ticket, self.asked.path, self.body, talk)
                outgoing.stoppable = attrs.evolve(outgoing.stoppable, continuing=continuing)
        scheduler = self._model.scheduler
        if scheduler.chooses:
            ticket.conversation = talk.conversation(self.asked.session)
            outgoing.pinned = ticket.conversation is not None and scheduler.slots > 1
        if self._stream and self.say is not None:
            ticket.waits = self._attend

    def _attend(self) -> None:
        """There is no slot for it: have its client told where it stands."""
        ticket, waiting_streams, say = self.ticket, self.waiting_streams, self.say
        if ticket is None or waiting_streams is None or say is None:
            return
        if self.waiting is None and self._model.config.keepalive:
            due = self.arrived_at + self.registry.config.system.keepalive_after_sec
            self.waiting = Waiting(model=self._model, ticket=ticket, endpoint=self.asked.path, say=say, due=due)
        if self.waiting is not None:
            waiting_streams.attend(self.waiting)

    def _ended(self, error: BaseException | None) -> None:
        """Say, once, that it is over; what became of it is told by `_tell` when nobody waits for us."""
        self._ended_at, self._finished_at = trio.current_time(), time.time()
        self._error = error
        self.events.ended(self._tell)

    def _tell(self) -> RequestFinished:
        error, answer, ticket = self._error, self._answer, self.ticket
        if answer is not None:
            status = answer.status
        elif isinstance(error, RouterError):
            status = error.status
        else:  # a bug of ours, or the client left
            status = INTERNAL_ERROR if isinstance(error, Exception) else CLIENT_CLOSED_REQUEST
        event = RequestFinished(
            request_id=self.request_id,
            finished_at=self._finished_at,
            alias=None if ticket is None else ticket.alias,
            endpoint=self.asked.path,
            priority=None if ticket is None else ticket.priority.label,
            outcome=outcome_of(error, status),
            status=status,
            code=error.code if isinstance(error, RouterError) else None,
            key=None if self.asked.holder is None else self.asked.holder.name,
            duration_seconds=self._ended_at - self.arrived_at,
        )
        if ticket is not None:
            event.client = ticket.client
        if ticket is not None and ticket.granted_at is not None:
            event.waited_seconds = ticket.granted_at - ticket.arrived_at
            given_back_at = None if answer is None else answer.given_back_at
            event.held_seconds = (given_back_at or self._ended_at) - ticket.granted_at
        if answer is not None:
            usage = usage_of(answer.opened.first[:HEAD_BYTES], answer.tail)
            event.queue_seconds = answer.queue_seconds
            event.incarnation = answer.lease.slot.backend.incarnation
            event.first_byte_seconds = self._first_byte_at - self.arrived_at
            event.first_token_seconds = first_token_seconds(answer, event.first_byte_seconds, usage)
            event.seconds_per_output_token = usage.seconds_per_output_token
            event.input_tokens = usage.input_tokens
            event.output_tokens = usage.output_tokens
            event.cached_tokens = usage.cached_tokens
        return event


def refusal(path: str, error: RouterError, request_id: str, arrived_at: float) -> RequestFinished:
    """What becomes of a request that ends before there is an exchange: its key, its host or its body was no good."""
    return RequestFinished(
        request_id=request_id,
        finished_at=time.time(),
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
    if isinstance(error, RouterError):
        return _outcome_of(error, status)
    if isinstance(error, Exception) and status == INTERNAL_ERROR:  # a bug of ours, before there was an answer
        return Outcome.BACKEND_ERROR
    if error is not None:  # cancelled, or the way out to the client broke: either way it is the client who left
        return Outcome.CANCELLED
    return Outcome.OK if status < 400 else Outcome.CLIENT_ERROR if status < 500 else Outcome.BACKEND_ERROR


def _outcome_of(error: RouterError, status: int) -> Outcome:
    if isinstance(error, RequestCancelled):
        return Outcome.CANCELLED
    if isinstance(error, DeadlineUnreachable) or error.status == status == 503:
        return Outcome.REJECTED
    if isinstance(error, TimedOut):
        return Outcome.TIMEOUT
    return Outcome.CLIENT_ERROR if error.status < 500 else Outcome.BACKEND_ERROR
