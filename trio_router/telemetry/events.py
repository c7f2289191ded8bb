"""What happened, told once to every sink.

The rooms that decide emit these; metrics, status streams and logs listen. A sink is called synchronously in
the trio thread, must not block and must not raise: one that raises is a bug and ends the request it was told of.
"""

import enum
from collections.abc import Callable

import attrs


class Outcome(enum.Enum):
    """How a request ended, as an operator counts it."""

    OK = "ok"
    CLIENT_ERROR = "client_error"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    BACKEND_ERROR = "backend_error"

    @property
    def timed(self) -> bool:
        """Whether how long it took says how fast we are: refusals are quick, and a client leaves when it likes."""
        return self in {Outcome.OK, Outcome.TIMEOUT, Outcome.BACKEND_ERROR}


class LoadResult(enum.Enum):
    """How a load ended."""

    OK = "ok"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"


class UnloadReason(enum.Enum):
    """Why a model left memory."""

    IDLE = "idle"
    EVICTED = "evicted"
    EJECTED = "ejected"
    ABANDONED = "abandoned"
    SHUTDOWN = "shutdown"
    FAILED = "failed"


class ExitKind(enum.Enum):
    """How a llama-server process ended."""

    STOPPED = "stopped"
    """We asked it to."""
    EXITED = "exited"
    """By itself, with a status."""
    KILLED = "killed"
    """By a signal that was not ours."""
    UNHEALTHY = "unhealthy"
    """We ended it because it answered no more."""


@attrs.frozen(kw_only=True)
class ModelChanged:
    """A model's status object is different from what it was."""

    alias: str


@attrs.frozen(kw_only=True)
class ServerChanged:
    """The router itself is starting, ready or draining now."""

    status: str


@attrs.frozen(kw_only=True)
class LoadFinished:
    """An attempt to load a model ended, `seconds` after its spawn."""

    alias: str
    result: LoadResult
    seconds: float


@attrs.frozen(kw_only=True)
class Unloaded:
    """A model's memory is free again."""

    alias: str
    reason: UnloadReason


@attrs.frozen(kw_only=True)
class BackendExited:
    """A llama-server is gone. `code` is the exit status, negative for a signal."""

    alias: str
    incarnation: int
    kind: ExitKind
    code: int


@attrs.frozen(kw_only=True)
class BackendRestarted:
    """A llama-server is started again after its predecessor died."""

    alias: str


@attrs.frozen(kw_only=True)
class LeaseGranted:
    """A request got a slot after `waited_seconds`."""

    alias: str
    priority: str
    waited_seconds: float


@attrs.frozen(kw_only=True)
class RequestFinished:
    """A request of an inference endpoint ended; fields it never reached are None.

    `alias` is None when the request named no model of ours. Times are seconds.
    """

    alias: str | None
    endpoint: str
    priority: str | None
    outcome: Outcome
    status: int
    code: str | None
    duration_seconds: float
    queue_seconds: float | None = None
    """From its arrival to its slot; None when no answer of a backend began."""
    first_byte_seconds: float | None = None
    first_token_seconds: float | None = None
    seconds_per_output_token: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None


Event = (
    ModelChanged
    | ServerChanged
    | LoadFinished
    | Unloaded
    | BackendExited
    | BackendRestarted
    | LeaseGranted
    | RequestFinished
)

Sink = Callable[[Event], None]


@attrs.define(eq=False)
class Events:
    """The one place events pass through."""

    sinks: list[Sink] = attrs.field(factory=list)

    def emit(self, event: Event) -> None:
        """Tell every sink, in the order they were added."""
        for sink in self.sinks:
            sink(event)
