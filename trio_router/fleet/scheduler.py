"""Who gets a slot of one model next.

A request takes a *ticket*, whose key is the moment it arrived plus `aging` seconds for each step its priority is below
high. The next slot is for the priority whose oldest waiter has the smallest key. The key never changes, so a heap is
enough, and yet a low request that has waited two `aging` overtakes a high one that has just come: nobody waits for ever
(linear aging).

Inside a priority clients share fairly, answer by answer (start-time fair queueing, Goyal, Vin and Cheng 1996, where every
answer is of length 1): a client's next request has its turn one answer, over the client's weight, after its last one, but
not before that which is served now. So one client's hundred requests do not stand before another's one; each client's own
are served in the order of arrival, and no turn is put off for ever.

Hand-over is synchronous. Whoever frees a slot wakes the first waiter's task with a lease, as its result. Trio asks a
task that is cancelled before it was woken to give up (`_Waiter.abort`), and never one that was woken already. So a
lease is in exactly one pair of hands at any time, and is released exactly once.

A request that may be what killed two backends is to have the next one for itself (`Ticket.alone`), so that it kills
nobody else's. When its turn comes, free slots are set aside until no lease is out, and while it runs; whoever comes
meanwhile waits too.

The queue outlives backends: `open` brings a backend's slots, `close` takes them away; leases on a lost backend
are released into nothing. `statistics()` is `IDLE` when nobody waits and nobody holds.
"""

import enum
import heapq
import itertools
import math
from collections.abc import Callable

import attrs
import outcome
import trio

from trio_router.backend.backend import Backend, Slot
from trio_router.errors import QueueFull, QueueTimeout, RouterError

FORGOTTEN_CLIENTS = 16
"""So many clients that wait no more are not worth forgetting."""


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
    """It waits no longer."""

    def abort(self, _: object) -> trio.lowlevel.Abort:
        """Cancelled, or out of time, before there was a slot."""
        self.scheduler._left(self)  # noqa: SLF001  (the two are one mechanism)
        return trio.lowlevel.Abort.SUCCEEDED


_Heap = list[tuple[float, float, int, _Waiter]]
_NEVER = (math.inf, 0)


@attrs.define(eq=False)
class _Rank:
    """Those of one priority who wait."""

    waiting: int = 0
    now: float = 0.0
    """The turn that was served last."""
    _next: dict[str, float] = attrs.field(factory=dict)
    """The next turn of each client that had one of late."""
    _by_age: _Heap = attrs.field(factory=list)
    _by_turn: _Heap = attrs.field(factory=list)

    def add(self, waiter: _Waiter, number: int) -> None:
        ticket = waiter.ticket
        if not ticket.requeued:
            ticket.turn = max(self.now, self._next.get(ticket.client, 0.0))
            self._next[ticket.client] = ticket.turn + 1.0 / ticket.weight
            if len(self._next) > 2 * self.waiting + FORGOTTEN_CLIENTS:
                self._next = {client: turn for client, turn in self._next.items() if turn > self.now}
        else:  # it has had its turn, which the end of a queue may have made a late one
            ticket.turn = min(ticket.turn, self.now)
        self.waiting += 1
        heapq.heappush(self._by_age, (ticket.key, ticket.turn, number, waiter))
        heapq.heappush(self._by_turn, (ticket.turn, ticket.key, number, waiter))

    def remove(self, waiter: _Waiter) -> None:
        """It stays where it is in the heaps until it is on top, or they are mostly such as it."""
        waiter.gone = True
        self.waiting -= 1
        if not self.waiting:
            self.now = 0.0
            self._next.clear()
        if len(self._by_age) > 2 * self.waiting:
            self._by_age = _without_gone(self._by_age)
        if len(self._by_turn) > 2 * self.waiting:
            self._by_turn = _without_gone(self._by_turn)

    def key(self) -> tuple[float, int]:
        """Of the oldest, and which one that was of all; infinite if nobody waits."""
        if not self.waiting:
            return _NEVER
        key, _, number, _ = _top(self._by_age)
        return key, number

    def next(self) -> _Waiter:
        """Whose turn it is."""
        return _top(self._by_turn)[3]

    def all(self) -> list[_Waiter]:
        return [waiter for *_, waiter in self._by_turn if not waiter.gone]


def _without_gone(heap: _Heap) -> _Heap:
    heap = [entry for entry in heap if not entry[3].gone]
    heapq.heapify(heap)
    return heap


def _top(heap: _Heap) -> tuple[float, float, int, _Waiter]:
    while heap[0][3].gone:
        heapq.heappop(heap)
    return heap[0]


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
    _aside: list[Slot] = attrs.field(factory=list)
    """Slots that are free, and kept so for who is to be alone."""
    _alone: Lease | None = None
    """Of who is."""
    _ranks: dict[Priority, _Rank] = attrs.field(factory=lambda: {priority: _Rank() for priority in Priority})
    _order: "itertools.count[int]" = attrs.field(factory=itertools.count)
    waiting: int = 0
    """Requests that wait for a slot."""
    active: int = 0
    _idle: trio.Event | None = None

    @property
    def idle(self) -> bool:
        """Whether nobody waits and nobody holds a lease."""
        return self.active == 0 and not self.waiting

    def statistics(self) -> SchedulerStatistics:
        """A snapshot, for status, metrics and tests."""
        high, normal, low = (self._ranks[priority].waiting for priority in Priority)
        return SchedulerStatistics(
            waiting=self.waiting,
            waiting_by_priority=(high, normal, low),
            active=self.active,
            free=len(self._free) + len(self._aside),
        )

    def first_key(self) -> float | None:
        """The smallest of all who wait; None when nobody does."""
        return min(rank.key() for rank in self._ranks.values())[0] if self.waiting else None

    # --- requests ---------------------------------------------------------------------------------

    async def acquire(self, ticket: Ticket) -> Lease:
        """Wait for a slot. Raises QueueFull, QueueTimeout, or what `refuse` was told.

        *Cancellation.* Leaves nothing behind. A free slot is taken without a checkpoint. A waiter that was given a slot
        and is cancelled before it runs has it still: it ends at its next await.
        """
        if self._free and (not ticket.alone or not self._busy):  # and so nobody waits
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
        self._enqueue(waiter)
        self.changed()
        if self.backend is None:
            self.demand()
        self._set_aside()
        with trio.CancelScope(deadline=ticket.deadline):
            lease: Lease = await trio.lowlevel.wait_task_rescheduled(waiter.abort)
            return lease
        waited = trio.current_time() - ticket.arrived_at
        raise QueueTimeout(
            f"no slot of model {self.alias!r} became free within {waited:.1f} s",
            param="model",
            details={"model": self.alias, "queued": self.waiting},
        )

    def _enqueue(self, waiter: _Waiter) -> None:
        self._ranks[waiter.ticket.priority].add(waiter, next(self._order))
        self.waiting += 1

    def _dequeue(self, waiter: _Waiter) -> None:
        self._ranks[waiter.ticket.priority].remove(waiter)
        self.waiting -= 1

    def _left(self, waiter: _Waiter) -> None:
        """The waiter gives up."""
        self._dequeue(waiter)
        self.changed()
        if self.backend is None:
            self.demand()
        elif self._aside and self._alone is None:
            self._take_back()
            self._dispatch()

    # --- backends ---------------------------------------------------------------------------------

    def open(self, backend: Backend) -> None:
        """`backend` is ready: lease its slots."""
        self.close()
        self.backend = backend
        self._free = list(reversed(backend.slots))
        self._dispatch()

    def close(self) -> None:
        """The backend is going: no new lease. Leases that are out stay so until they are released."""
        self.backend = self._alone = None
        self._free, self._aside = [], []

    def refuse(self, error: RouterError) -> None:
        """Tell everyone who waits `error`."""
        for rank in self._ranks.values():
            for waiter in rank.all():
                self._dequeue(waiter)
                trio.lowlevel.reschedule(waiter.task, outcome.Error(error.again()))
        if self._alone is None:
            self._take_back()
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
        lease = Lease(slot, self)
        if ticket.alone:
            self._alone = lease
            self._set_aside()
        return lease

    @property
    def _busy(self) -> bool:
        """Whether a lease on the backend at hand is out."""
        return self.backend is not None and len(self._free) + len(self._aside) < len(self.backend.slots)

    def _set_aside(self) -> None:
        self._aside += self._free
        self._free = []

    def _take_back(self) -> None:
        self._free += self._aside
        self._aside = []

    def _released(self, lease: Lease) -> None:
        self.active -= 1
        self.changed()
        if lease.slot.backend is self.backend:
            self._free.append(lease.slot)
            if self._aside:
                self._alone = None
                self._take_back()
            self._dispatch()
        if not self.active and self._idle is not None:
            self._idle.set()
            self._idle = None
        if self.idle:
            self.rest()

    def _dispatch(self) -> None:
        """Hand free slots to those who are next."""
        while self._free and self.waiting:
            rank = min(self._ranks.values(), key=_Rank.key)
            waiter = rank.next()
            if waiter.ticket.alone and self._busy:
                self._set_aside()
                return
            rank.now = max(rank.now, waiter.ticket.turn)
            self._dequeue(waiter)
            trio.lowlevel.reschedule(waiter.task, outcome.Value(self._grant(waiter.ticket, self._free.pop())))
