"""What a request has in its hands while it waits: a place in the order of things."""

import enum
import math
from collections.abc import Callable

import attrs

from trio_router.backend.conversation import Conversation
from trio_router.errors import RouterError
from trio_router.fleet.turns import Head


class Priority(enum.Enum):
    """What a client asks for in `X-Request-Priority`; the value is the seed's number."""

    HIGH = 1
    NORMAL = 2
    LOW = 3

    def __init__(self, value: int) -> None:
        self.label = self.name.lower()
        """The name as clients write it."""
        self.steps = value - 1
        """How far below high."""


@attrs.define(eq=False, kw_only=True)
class Ticket:
    """A request's place in the order of things; kept when the request is queued again."""

    alias: str
    priority: Priority
    arrived_at: float
    """Trio time."""
    deadline: float
    """Trio time after which the request no longer waits for a slot."""
    key: float
    """Of the priority whose oldest waiter has the smallest, somebody is served next."""
    client: str = ""
    """Who shares fairly with others: the name of a key, or an address."""
    weight: float = 1.0
    """Of this client's share."""
    turn: float = 0.0
    """Inside a priority, smaller is served earlier: answers since the queue was empty last."""
    requeued: bool = False
    """Whether it was admitted before: the queue's bound does not apply again."""
    alone: bool = False
    """Whether it is to have a backend for itself."""
    granted_at: float | None = None
    """Trio time at which it got a slot, the last one if there were several."""
    due: float = math.inf
    """Trio time at which its client waits no longer."""
    position: int = 0
    """Its place in the queue when it arrived; 0 if there was a slot for it."""
    conversation: Conversation | None = None
    """Which one it belongs to, where there is a slot to be chosen for it."""
    yields: bool = False
    """Whether it gives its slot to a high one: not once its answer has begun."""
    yielded: bool = False
    """Whether it has been told to."""
    refusal: RouterError | None = None
    """Why it is not to wait again."""
    waits: Callable[[], None] | None = None
    """Called when there is no slot for it at once; again if it lost the one it got."""
    expected_seconds: float | None = None
    """How long it was expected to wait then, if anybody asked."""

    @property
    def head(self) -> Head:
        """What a decision may know of it."""
        return Head(key=self.key, arrived_at=self.arrived_at, steps=self.priority.steps)
