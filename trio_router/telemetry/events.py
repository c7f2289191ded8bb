"""What happened, told once to every sink.

The rooms that decide emit these; metrics, status streams and logs listen. A sink is called synchronously in
the trio thread, must not block and must not raise: one that raises is a bug.

What became of a request is told apart from the rest, and a little later, many at a time: reading an answer's token
counts, counting it and writing its line takes longer than passing it on, and would stand between two requests.
"""

import enum
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import attrs
import trio

SETTLE_SECONDS: Final = 0.01
"""How long after the first of them requests that ended are told of."""
SETTLE_AT_ONCE: Final = 8
"""How many of them, at least, before others get their turn: a quarter of a millisecond's work."""


class Outcome(enum.Enum):
    """How a request ended, as an operator counts it."""

    OK = "ok"
    CLIENT_ERROR = "client_error"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    BACKEND_ERROR = "backend_error"

    def __init__(self, value: str) -> None:
        self.word = value
        """The same as `value`, which takes longer to read."""
        self.timed = value in {"ok", "timeout", "backend_error"}
        """Whether how long it took says how fast we are: refusals are quick, and a client leaves when it likes."""


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
    RELOADED = "reloaded"


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
class Reloaded:
    """Another configuration holds from now on: these are its models."""

    aliases: tuple[str, ...]


@attrs.frozen(kw_only=True)
class LoadFinished:
    """An attempt to load a model ended, `seconds` after its spawn."""

    alias: str
    result: LoadResult
    seconds: float


@attrs.frozen(kw_only=True)
class Unloaded:
    """A model's memory is free again, `seconds` after its llama-server was told to stop, if it was."""

    alias: str
    reason: UnloadReason
    seconds: float | None = None


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


@attrs.define(kw_only=True)
class RequestFinished:
    """A request of an inference endpoint ended; fields it never reached are None.

    `alias` is None when the request named no model of ours. Times are seconds. Not frozen: making one would take
    five times as long, and one is made for every request.
    """

    request_id: str
    finished_at: float
    """Unix time."""

    alias: str | None
    endpoint: str
    priority: str | None
    outcome: Outcome
    status: int
    code: str | None
    duration_seconds: float
    waited_seconds: float | None = None
    """From its place in the queue to its last slot; None when it got none."""
    held_seconds: float | None = None
    """From its last slot to its end."""
    queue_seconds: float | None = None
    """From its arrival to its slot; None when no answer of a backend began."""
    incarnation: int | None = None
    """Of the backend that answered."""
    first_byte_seconds: float | None = None
    first_token_seconds: float | None = None
    seconds_per_output_token: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    key: str | None = None
    """Name of the key it came with."""
    client: str | None = None
    """Who shares fairly with others: the name of a key, or an address."""


Event = ModelChanged | ServerChanged | Reloaded | LoadFinished | Unloaded | BackendExited | BackendRestarted

Sink = Callable[[Event], None]
RequestSink = Callable[[Sequence[RequestFinished]], None]


@attrs.define(eq=False)
class Events:
    """The one place events pass through."""

    sinks: list[Sink] = attrs.field(factory=list)
    request_sinks: list[RequestSink] = attrs.field(factory=list)
    """Told of requests that ended, oldest first."""
    _ended: deque[Callable[[], RequestFinished]] = attrs.field(factory=deque)
    _some: trio.Event | None = None

    def emit(self, event: Event) -> None:
        """Tell every sink, in the order they were added."""
        for sink in self.sinks:
            sink(event)

    def ended(self, tell: Callable[[], RequestFinished]) -> None:
        """A request ended; `tell` says how, when there is time for it."""
        self._ended.append(tell)
        if self._some is not None:
            self._some.set()
            self._some = None

    def settle(self, most: int | None = None) -> bool:
        """Tell of up to `most` requests that ended; whether there are more. Whoever shows numbers calls this first."""
        ended = self._ended
        if ended:
            count = len(ended) if most is None else min(most, len(ended))
            told = [ended.popleft()() for _ in range(count)]
            for sink in self.request_sinks:
                sink(told)
        return bool(ended)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell of requests that ended, a few at a time, until cancelled."""
        task_status.started()
        while True:
            if not self._ended:
                self._some = trio.Event()
                await self._some.wait()
                await trio.sleep(SETTLE_SECONDS)
            # a share of what there is, or there would be more and more of it while many ask without a pause
            self.settle(max(SETTLE_AT_ONCE, len(self._ended) // 4))
            await trio.lowlevel.checkpoint()
