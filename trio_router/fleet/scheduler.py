"""Who gets a slot of one model next.

A request takes a *ticket*, whose key is the moment it arrived plus `aging` seconds for each step its priority is below
high. The next slot is for the priority whose oldest waiter has the smallest key. The key never changes, so a heap is
enough, and yet a low request that has waited two `aging` overtakes a high one that has just come: nobody waits for ever
(linear aging).

Inside a priority clients share fairly (`fleet.ranks`).

Hand-over is synchronous. Whoever frees a slot wakes the first waiter's task with a lease, as its result. Trio asks a
task that is cancelled before it was woken to give up (`Waiter.abort`), and never one that was woken already. So a
lease is in exactly one pair of hands at any time, and is released exactly once.

A request that may be what killed two backends is to have the next one for itself (`Ticket.alone`), so that it kills
nobody else's. When its turn comes, free slots are set aside until no lease is out, and while it runs; whoever comes
meanwhile waits too.

The queue outlives backends: `open` brings a backend's slots, `close` takes them away; leases on a lost backend
are released into nothing. `statistics()` is `IDLE` when nobody waits and nobody holds.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import attrs
import outcome
import trio

from trio_router.backend.backend import Backend, Slot
from trio_router.backend.conversation import MOST_SLOTS, choose
from trio_router.errors import DeadlineExceeded, DeadlineUnreachable, QueueFull, QueueTimeout, RouterError
from trio_router.fleet.estimate import Pace, drained_in, expected_wait, overtaken, overtakers, retry_after
from trio_router.fleet.ranks import Rank, Waiter, in_order
from trio_router.fleet.ticket import Priority, Ticket
from trio_router.fleet.turns import Head


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

    def leave(self) -> None:
        """Give the slot back in the middle of a request, once its backend has let go of that."""
        if not self.released:
            self.released = True
            slot, scheduler = self.slot, self._scheduler
            busy = slot.backend.forsake(slot, lambda: scheduler._let_go(slot))  # noqa: SLF001  (see above)
            scheduler._released(self, busy=busy)  # noqa: SLF001  (see above)


@attrs.define(eq=False, kw_only=True)
class Scheduler:
    """The slots and the queue of one model."""

    alias: str
    slots: int
    """How many a backend of this model has."""
    max_waiting: int
    cache_affinity: bool = False
    """Whether a conversation is to go on in the slot that holds it."""
    demand: Callable[[], None] = attrs.field(default=lambda: None)
    """Called when somebody begins or ceases to wait while there is no backend."""
    rest: Callable[[], None] = attrs.field(default=lambda: None)
    """Called when the model becomes idle."""
    leader: "Scheduler | None" = None
    """Whose queue our slots serve; None: our own."""
    followers: list["Scheduler"] = attrs.field(factory=list)
    """Those whose slots serve our queue besides ours."""
    grows: bool = False
    """Whether there may be another follower, if somebody waits: `demand` is called then."""
    contended: bool = False
    """Whether another model waits for a place: `demand` is called whenever others wait here, or fewer run."""
    changed: Callable[[], None] = attrs.field(default=lambda: None)
    """Called when more or fewer wait or hold a lease."""

    opens_in: Callable[[Head | None], float | None] = attrs.field(default=lambda _: None)
    """Seconds until there is a backend if somebody waits so, as far as that is known."""
    pace: Pace = attrs.field(factory=Pace)

    backend: Backend | None = None
    _free: list[Slot] = attrs.field(factory=list)
    _aside: list[Slot] = attrs.field(factory=list)
    """Slots that are free, and kept so: for who is to be alone, or since we are paused."""
    _alone: Lease | None = None
    """Of who is."""
    _yielding: dict[Lease, Ticket] = attrs.field(factory=dict)
    """Leases of those who may give their slot to a high request."""
    paused: bool = False
    """Whether no new lease is given, since the model is to make room: all free slots are set aside."""
    _ranks: dict[Priority, Rank] = attrs.field(factory=lambda: {priority: Rank() for priority in Priority})
    _order: "itertools.count[int]" = attrs.field(factory=itertools.count)
    waiting: int = 0
    """Requests that wait for a slot."""
    active: int = 0
    _idle: trio.Event | None = None

    @property
    def chooses(self) -> bool:
        """Whether it matters which slot a request gets."""
        return self.cache_affinity and 1 < self.slots * (1 + len(self.followers)) <= MOST_SLOTS

    @property
    def idle(self) -> bool:
        """Whether nobody waits and nobody holds a lease."""
        return self.active == 0 and not self.waiting

    def statistics(self) -> SchedulerStatistics:
        """A snapshot, for status, metrics and tests."""
        high, normal, low = (self._ranks[priority].waiting for priority in Priority)
        followers = [follower.statistics() for follower in self.followers]
        return SchedulerStatistics(
            waiting=self.waiting,
            waiting_by_priority=(high, normal, low),
            active=self.active + sum(each.active for each in followers),
            free=len(self._free) + len(self._aside) + sum(each.free for each in followers),
        )

    def head(self) -> Head | None:
        """What is to be known of those who wait; None when nobody does."""
        if not self.waiting:
            return None
        oldest = [(priority, rank.oldest().ticket) for priority, rank in self._ranks.items() if rank.waiting]
        return Head(
            key=min(ticket.key for _, ticket in oldest),
            arrived_at=min(ticket.arrived_at for _, ticket in oldest),
            steps=oldest[0][0].steps,
        )

    # --- requests ---------------------------------------------------------------------------------

    async def acquire(self, ticket: Ticket) -> Lease:
        """Wait for a slot. Raises QueueFull, QueueTimeout, or what `refuse` was told.

        *Cancellation.* Leaves nothing behind. A free slot is taken without a checkpoint. A waiter that was given a slot
        and is cancelled before it runs has it still: it ends at its next await.
        """
        lender = self._lender(ticket) if self._is_first(ticket) else None
        if lender is not None:
            return lender._grant(ticket, lender._take(ticket))  # noqa: SLF001  (another of us)
        if self._free and (not ticket.alone or not self._busy):  # and so nobody waits
            return self._grant(ticket, self._take(ticket))
        if not ticket.requeued:
            ahead = self.ahead(ticket)
            if self.waiting >= self.room:
                why = f"{self.waiting} requests wait for model {self.alias!r}, as many as may"
                raise self._refusal(QueueFull, why, ticket, ahead)
            ticket.position = ahead + 1
            if ticket.due < math.inf:
                self._check_due(ticket, ahead)
        waiter = Waiter(ticket, trio.lowlevel.current_task(), self._left)
        self._enqueue(waiter)
        if ticket.waits is not None:
            ticket.waits()
        if ticket.priority is Priority.HIGH and not self.paused:
            self._preempt(ticket)
        self.changed()
        if self.backend is None or self.contended or self.grows:
            self.demand()
        self._set_aside()
        with trio.CancelScope(deadline=ticket.deadline):
            lease: Lease = await trio.lowlevel.wait_task_rescheduled(waiter.abort)
            return lease
        now = trio.current_time()
        kind = DeadlineExceeded if now >= ticket.due else QueueTimeout
        why = f"no slot of model {self.alias!r} became free within {now - ticket.arrived_at:.1f} s"
        raise self._refusal(kind, why, ticket, self.ahead(ticket))

    def _check_due(self, ticket: Ticket, ahead: int) -> None:
        """Raise DeadlineUnreachable if it would wait for longer than its client does."""
        ticket.expected_seconds = seconds = self.expected(ticket, ahead)
        left = ticket.due - trio.current_time()
        if seconds is not None and seconds > left:
            why = f"model {self.alias!r} has a slot for this in about {seconds:.1f} s, its deadline is in {left:.1f} s"
            raise self._refusal(DeadlineUnreachable, why, ticket, ahead)

    def _refusal(self, kind: type[RouterError], why: str, ticket: Ticket, ahead: int) -> RouterError:
        """One that says where in the queue a request would be, and for how long."""
        seconds = self.expected(ticket, ahead)
        details: dict[str, Any] = {
            "model": self.alias,
            "queued": self.waiting,
            "queue_position": ahead + 1,
            "estimated_wait_ms": None if seconds is None else round(1000 * seconds),
        }
        return kind(why, param="model", details=details, retry_after_seconds=retry_after(seconds))

    def ahead(self, ticket: Ticket) -> int:
        """About how many of those who wait would be served before one with such a ticket that comes now."""
        return sum(
            rank.ahead(ticket.client) if priority is ticket.priority
            else rank.waiting if priority.steps < ticket.priority.steps
            else rank.older(ticket.key)
            for priority, rank in self._ranks.items()
            if rank.waiting
        )  # fmt: skip

    def places(self) -> dict[Ticket, int]:
        """Where everyone who waits stands, from 1, if nobody comes or leaves any more. Takes O(n log n)."""
        return {ticket: place for place, ticket in enumerate(in_order(self._ranks.values()), 1)}

    def expected(self, ticket: Ticket, ahead: int) -> float | None:
        """Seconds until one with such a ticket, and so many ahead, gets a slot; None: too little was measured."""
        head = ticket.head
        seconds = self.expected_wait(ahead, head)
        steps, now, slots = ticket.priority.steps, trio.current_time(), self._all_slots
        if seconds is None or not steps:
            return seconds
        aging = (ticket.key - ticket.arrived_at) / steps
        longer = seconds
        for better in reversed(range(steps)):
            longer = overtaken(longer, self.pace.share(better, slots, now), aging * (steps - better))
        return self.expected_wait(ahead + overtakers(longer - seconds, self.pace, slots), head)

    def expected_wait(self, ahead: int, head: Head | None = None) -> float | None:
        """The same as long as nobody comes who goes first."""
        slots = self._all_slots
        if not any(each.backend is not None for each in (self, *self.followers)):
            return expected_wait(self.pace, ahead=ahead, slots=slots, elapsed=(), opens_in=self.opens_in(head))
        elapsed = sum((each._elapsed() for each in self.followers), self._elapsed())  # noqa: SLF001  (others of us)
        return expected_wait(self.pace, ahead=ahead, slots=slots, elapsed=elapsed, opens_in=0.0)

    @property
    def _all_slots(self) -> int:
        """Of all backends that serve the queue; while there is none, of the one to come."""
        backends = [each.backend for each in (self, *self.followers) if each.backend is not None]
        return sum(len(backend.slots) for backend in backends) or self.slots

    def drained_in(self) -> float | None:
        """Seconds until all that run are done; None: too little was measured."""
        return drained_in(self.pace, self._elapsed())

    def _elapsed(self) -> list[float]:
        """For how long each has run."""
        slots = () if self.backend is None else self.backend.slots
        now = trio.current_time()
        return [now - slot.since for slot in slots if slot not in self._free and slot not in self._aside]

    @property
    def has_slot(self) -> bool:
        """Whether a request that comes now has a slot at once."""
        return bool(self._free) or any(follower.has_slot for follower in self.followers)

    @property
    def room(self) -> int:
        """How many may wait."""
        # while no backend is open its slots are still to come: those who will get them do not wait for each other
        return self.max_waiting + (self.slots if self.backend is None else 0)

    def _enqueue(self, waiter: Waiter) -> None:
        self._ranks[waiter.ticket.priority].add(waiter, next(self._order))
        self.waiting += 1

    def _dequeue(self, waiter: Waiter) -> None:
        self._ranks[waiter.ticket.priority].remove(waiter)
        self.waiting -= 1

    def _left(self, waiter: Waiter) -> None:
        """The waiter gives up."""
        self._dequeue(waiter)
        self.changed()
        if self.backend is None or self.contended:
            self.demand()
        if self._aside and self._alone is None and not self.paused:
            self._take_back()
            self._dispatch()
        if waiter.ticket.alone:
            self._have_others_dispatch()

    def _have_others_dispatch(self) -> None:
        """Who is to be alone, and is for our own slots only, is first in the queue no more."""
        for follower in self.followers:
            follower._dispatch()  # noqa: SLF001  (another of us)

    def withdraw(self, ticket: Ticket, error: RouterError) -> None:
        """Tell whoever waits with `ticket` `error`: now, or when it is to wait again."""
        for rank in self._ranks.values():
            for waiter in rank.all():
                if waiter.ticket is ticket:
                    self._left(waiter)
                    trio.lowlevel.reschedule(waiter.task, outcome.Error(error))
                    return
        ticket.refusal = error

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
        self.paused = False

    def pause(self) -> None:
        """No new lease on the backend at hand, until `resume`."""
        self.paused = True
        self._set_aside()

    def resume(self) -> None:
        """Lease slots again."""
        if self.paused:
            self.paused = False
            if self._alone is None:
                self._take_back()
                self._dispatch()

    def refuse(self, error: RouterError) -> None:
        """Tell everyone who waits `error`."""
        for rank in self._ranks.values():
            for waiter in rank.all():
                self._dequeue(waiter)
                trio.lowlevel.reschedule(waiter.task, outcome.Error(error.again()))
        if self._alone is None and not self.paused:
            self._take_back()
        self.changed()

    async def until_no_lease(self) -> None:
        """Return when no lease is out."""
        while self.active:
            if self._idle is None:
                self._idle = trio.Event()
            await self._idle.wait()

    # --- the mechanism ----------------------------------------------------------------------------

    def _is_first(self, ticket: Ticket) -> bool:
        """Whether those whose slots serve our queue may serve this one at once: nobody waits who comes before it.

        Somebody may wait though they have slots that are free: who is to be alone, on ours.
        """
        if not self.followers or ticket.alone:
            return False
        if not self.waiting:
            return True
        rank = min(self._ranks.values(), key=Rank.key)
        return rank.next().ticket.alone and ticket.key < rank.key()[0]

    def _lender(self, ticket: Ticket) -> "Scheduler | None":
        """Who has the slot that suits a request best: the one it goes on in, else one of who has most of them."""
        able = {each: each._free for each in (self, *self.followers) if each._free}  # noqa: SLF001  (others of us)
        if not able or ticket.conversation is None:
            return max(able, key=lambda each: len(able[each]), default=None)
        free = [slot for slots in able.values() for slot in slots]
        chosen = free[choose(free, ticket.conversation)]
        return next(each for each, slots in able.items() if chosen in slots)

    def _preempt(self, ticket: Ticket) -> None:
        """Have the one give its slot that comes last of those who may, if it comes after a high one that waits.

        Its connection is closed: llama-server stops, and `dispatch` queues it again at its old place. So it is not
        overtaken for ever: one that has waited long enough comes before those who have just come.
        """
        yielding = [pair for each in (self, *self.followers) for pair in each._yielding.items()]  # noqa: SLF001  (others of us)
        able = [pair for pair in yielding if pair[1].yields and not pair[1].yielded and pair[1].key > ticket.key]
        if able:
            lease, victim = max(able, key=lambda pair: pair[1].key)
            victim.yielded = True
            lease.slot.disconnect()

    def _take(self, ticket: Ticket) -> Slot:
        """A free slot, if there is a choice the one that suits the request."""
        conversation = ticket.conversation
        slot = self._free.pop(-1 if conversation is None else choose(self._free, conversation))
        slot.holds = conversation
        return slot

    def _grant(self, ticket: Ticket, slot: Slot) -> Lease:
        self.active += 1
        ticket.granted_at = slot.since = trio.current_time()
        self.changed()
        lease = Lease(slot, self)
        if ticket.yields:
            self._yielding[lease] = ticket
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

    def _released(self, lease: Lease, *, busy: bool = False) -> None:
        """A lease ended; its slot is `busy` if the backend still works there, for nobody."""
        self.active -= 1
        self.changed()
        if self._yielding:
            self._yielding.pop(lease, None)
        if not busy:
            self._returned(lease.slot)
        if not self.active and self._idle is not None:
            self._idle.set()
            self._idle = None
        if self.idle:
            self.rest()
        elif self.contended:
            self.demand()

    def _let_go(self, slot: Slot) -> None:
        """The backend does not work there for nobody any more."""
        self._returned(slot)
        self.changed()

    def _returned(self, slot: Slot) -> None:
        """A slot can be used again."""
        if slot.backend is self.backend:
            self._free.append(slot)
            self._alone = None
            if self._aside:
                self._take_back()
            if self.paused:
                self._set_aside()
            self._dispatch()

    def _dispatch(self) -> None:
        """Hand free slots to those who are next."""
        queue = self.leader or self
        while self._free and queue.waiting:
            rank = min(queue._ranks.values(), key=Rank.key)  # noqa: SLF001  (another of us)
            waiter = rank.next()
            if waiter.ticket.alone and queue is not self:
                return  # the leader's are for who is to be alone
            if waiter.ticket.alone and self._busy:
                self._set_aside()
                return
            rank.now = max(rank.now, waiter.ticket.turn)
            queue._dequeue(waiter)  # noqa: SLF001  (another of us)
            trio.lowlevel.reschedule(waiter.task, outcome.Value(self._grant(waiter.ticket, self._take(waiter.ticket))))
            if waiter.ticket.alone:
                self._have_others_dispatch()
