"""Who gets a slot of one model next.

A request takes a *ticket* and waits in a heap ordered by the ticket's key: the moment it arrived plus `aging`
seconds for each step its priority is below high. The key never changes, so a heap is enough, and yet a low
request that has waited two `aging` overtakes a high one that has just come: nobody waits for ever (linear aging).

Hand-over is synchronous. Whoever frees a slot wakes the first waiter's task with a lease, as its result. Trio asks a
task that is cancelled before it was woken to give up (`_Waiter.abort`), and never one that was woken already. So a
lease is in exactly one pair of hands at any time, and is released exactly once.

The queue outlives backends: `open` brings a backend's slots, `close` takes them away; leases on a lost backend
are released into nothing. `statistics()` is `IDLE` when nobody waits and nobody holds.
"""

import enum
import heapq
import itertools
from collections.abc import Callable

import attrs
import outcome
import trio

from trio_router.backend.backend import Backend, Slot
from trio_router.errors import QueueFull, QueueTimeout, RouterError


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
    """Smaller is served earlier."""
    requeued: bool = False
    """Whether it was admitted before: the queue's bound does not apply again."""
    granted_at: float | None = None
    """Trio time at which it got a slot, the last one if there were several."""


@attrs.frozen(kw_only=True)
class SchedulerStatistics:
    """What stands in a model's queue at one moment."""

    waiting: int
    waiting_by_priority: tuple[int, int, int]
    """High, normal, low."""
    active: int
    """Leases that are out."""
    free: int


IDLE = SchedulerStatistics(waiting=0, waiting_by_priority=(0, 0, 0), active=0, free=0)
"""Nothing waits, nothing runs, no backend."""


@attrs.define(eq=False)
class Lease:
    """One request's right to a slot. `release` may be called any number of times, and needs no await."""

    slot: Slot
    _scheduler: "Scheduler"
    released: bool = False

    def release(self) -> None:
        """Give the slot back."""
        if not self.released:
            self.released = True
            self._scheduler._released(self)  # noqa: SLF001  (the two are one mechanism)


@attrs.define(eq=False)
class _Waiter:
    ticket: Ticket
    task: trio.lowlevel.Task
    scheduler: "Scheduler"
    gone: bool = False

    def abort(self, _: object) -> trio.lowlevel.Abort:
        """Cancelled, or out of time, before there was a slot."""
        self.scheduler._left(self)  # noqa: SLF001  (the two are one mechanism)
        return trio.lowlevel.Abort.SUCCEEDED


@attrs.define(eq=False, kw_only=True)
class Scheduler:
    """The slots and the queue of one model."""

    alias: str
    slots: int
    """How many a backend of this model has."""
    max_waiting: int
    demand: Callable[[], None] = attrs.field(default=lambda: None)
    """Called when somebody begins or ceases to wait while there is no backend."""
    rest: Callable[[], None] = attrs.field(default=lambda: None)
    """Called when the model becomes idle."""
    changed: Callable[[], None] = attrs.field(default=lambda: None)
    """Called when more or fewer wait or hold a lease."""

    backend: Backend | None = None
    _free: list[Slot] = attrs.field(factory=list)
    _heap: list[tuple[float, int, _Waiter]] = attrs.field(factory=list)
    _order: "itertools.count[int]" = attrs.field(factory=itertools.count)
    _waiting: dict[Priority, int] = attrs.field(factory=lambda: dict.fromkeys(Priority, 0))
    _gone: int = 0
    active: int = 0
    _idle: trio.Event | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return sum(self._waiting.values())

    @property
    def idle(self) -> bool:
        """Whether nobody waits and nobody holds a lease."""
        return self.active == 0 and not self.waiting

    def statistics(self) -> SchedulerStatistics:
        """A snapshot, for status, metrics and tests."""
        high, normal, low = (self._waiting[priority] for priority in Priority)
        return SchedulerStatistics(
            waiting=self.waiting,
            waiting_by_priority=(high, normal, low),
            active=self.active,
            free=len(self._free),
        )

    def first_key(self) -> float | None:
        """The key of whoever is next; None when nobody waits."""
        self._drop_gone()
        return self._heap[0][0] if self._heap else None

    # --- requests ---------------------------------------------------------------------------------

    async def acquire(self, ticket: Ticket) -> Lease:
        """Wait for a slot. Raises QueueFull, QueueTimeout, or what `refuse` was told.

        *Cancellation.* Leaves nothing behind. A free slot is taken without a checkpoint. A waiter that was given a slot
        and is cancelled before it runs has it still: it ends at its next await.
        """
        if self._free:  # and so nobody waits
            return self._grant(ticket, self._free.pop())
        # while no backend is open its slots are still to come: those who will get them do not wait for each other
        room = self.max_waiting + (self.slots if self.backend is None else 0)
        if not ticket.requeued and self.waiting >= room:
            raise QueueFull(
                f"{self.waiting} requests wait for model {self.alias!r}, as many as may",
                param="model",
                details={"model": self.alias, "queued": self.waiting},
            )
        waiter = _Waiter(ticket, trio.lowlevel.current_task(), self)
        heapq.heappush(self._heap, (ticket.key, next(self._order), waiter))
        self._waiting[ticket.priority] += 1
        self.changed()
        if self.backend is None:
            self.demand()
        with trio.CancelScope(deadline=ticket.deadline):
            lease: Lease = await trio.lowlevel.wait_task_rescheduled(waiter.abort)
            return lease
        waited = trio.current_time() - ticket.arrived_at
        raise QueueTimeout(
            f"no slot of model {self.alias!r} became free within {waited:.1f} s",
            param="model",
            details={"model": self.alias, "queued": self.waiting},
        )

    def _left(self, waiter: _Waiter) -> None:
        """The waiter gives up."""
        waiter.gone = True
        self._gone += 1
        self._waiting[waiter.ticket.priority] -= 1
        self.changed()
        if self._gone > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if not entry[2].gone]
            heapq.heapify(self._heap)
            self._gone = 0
        if self.backend is None:
            self.demand()

    # --- backends ---------------------------------------------------------------------------------

    def open(self, backend: Backend) -> None:
        """`backend` is ready: lease its slots."""
        self.backend = backend
        self._free = list(reversed(backend.slots))
        self._dispatch()

    def close(self) -> None:
        """The backend is going: no new lease. Leases that are out stay so until they are released."""
        self.backend = None
        self._free = []

    def refuse(self, error: RouterError) -> None:
        """Tell everyone who waits `error`."""
        heap, self._heap, self._gone = self._heap, [], 0
        for _, _, waiter in heap:
            if not waiter.gone:
                self._waiting[waiter.ticket.priority] -= 1
                trio.lowlevel.reschedule(waiter.task, outcome.Error(error.again()))
        self.changed()

    async def until_no_lease(self) -> None:
        """Return when no lease is out."""
        while self.active:
            if self._idle is None:
                self._idle = trio.Event()
            await self._idle.wait()

    # --- the mechanism ----------------------------------------------------------------------------

    def _grant(self, ticket: Ticket, slot: Slot) -> Lease:
        self.active += 1
        ticket.granted_at = trio.current_time()
        self.changed()
        return Lease(slot, self)

    def _released(self, lease: Lease) -> None:
        self.active -= 1
        self.changed()
        if lease.slot.backend is self.backend:
            self._free.append(lease.slot)
            self._dispatch()
        if not self.active and self._idle is not None:
            self._idle.set()
            self._idle = None
        if self.idle:
            self.rest()

    def _dispatch(self) -> None:
        """Hand free slots to the first in order."""
        while self._free and self._heap:
            self._drop_gone()
            if not self._heap:
                return
            waiter = heapq.heappop(self._heap)[2]
            self._waiting[waiter.ticket.priority] -= 1
            trio.lowlevel.reschedule(waiter.task, outcome.Value(self._grant(waiter.ticket, self._free.pop())))

    def _drop_gone(self) -> None:
        while self._heap and self._heap[0][2].gone:
            heapq.heappop(self._heap)
            self._gone -= 1
