"""Those of one priority who wait for one model: whose turn it is, who has waited longest, and how many are before whom.

Inside a priority clients share fairly, answer by answer (start-time fair queueing, Goyal, Vin and Cheng 1996, where every
answer is of length 1): a client's next request has its turn one answer, over the client's weight, after its last one, but
not before that which is served now. So one client's hundred requests do not stand before another's one; each client's own
are served in the order of arrival, and no turn is put off for ever.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import attrs
import trio

from trio_router.fleet.ticket import Ticket

FORGOTTEN_CLIENTS: Final = 16
"""So many clients that wait no more are not worth forgetting."""


@attrs.define(eq=False)
class Waiter:
    """Who waits."""

    ticket: Ticket
    task: trio.lowlevel.Task
    give_up: Callable[["Waiter"], None]
    gone: bool = False
    """It waits no longer."""

    def abort(self, _: object) -> trio.lowlevel.Abort:
        """Cancelled, or out of time, before there was a slot."""
        self.give_up(self)
        return trio.lowlevel.Abort.SUCCEEDED


_Heap = list[tuple[float, float, int, Waiter]]
_NEVER = (math.inf, 0)


@attrs.define(eq=False)
class Rank:
    """Those of one priority who wait."""

    waiting: int = 0
    now: float = 0.0
    """The turn that was served last."""
    _next: dict[str, float] = attrs.field(factory=dict)
    """The next turn of each client that had one of late."""
    _by_age: _Heap = attrs.field(factory=list)
    _by_turn: _Heap = attrs.field(factory=list)
    _of_client: dict[str, int] = attrs.field(factory=dict)
    """How many requests of each client wait."""
    _weight: float = 0.0
    """Of all clients of whom one waits."""
    _newest: float = 0.0
    """Key of the one that came last."""

    def add(self, waiter: Waiter, number: int) -> None:
        ticket = waiter.ticket
        if not ticket.requeued:
            ticket.turn = max(self.now, self._next.get(ticket.client, 0.0))
            self._next[ticket.client] = ticket.turn + 1.0 / ticket.weight
            if len(self._next) > 2 * self.waiting + FORGOTTEN_CLIENTS:
                self._next = {client: turn for client, turn in self._next.items() if turn > self.now}
        else:  # it has had its turn, which the end of a queue may have made a late one
            ticket.turn = min(ticket.turn, self.now)
        self.waiting += 1
        if (own := self._of_client.get(ticket.client, 0)) == 0:
            self._weight += ticket.weight
        self._of_client[ticket.client] = own + 1
        self._newest = ticket.key
        heapq.heappush(self._by_age, (ticket.key, ticket.turn, number, waiter))
        heapq.heappush(self._by_turn, (ticket.turn, ticket.key, number, waiter))

    def remove(self, waiter: Waiter) -> None:
        """It stays where it is in the heaps until it is on top, or they are mostly such as it."""
        ticket = waiter.ticket
        waiter.gone = True
        self.waiting -= 1
        if own := self._of_client[ticket.client] - 1:
            self._of_client[ticket.client] = own
        else:
            del self._of_client[ticket.client]
            self._weight -= ticket.weight
        if not self.waiting:
            self.now = self._weight = 0.0
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

    def oldest(self) -> Waiter:
        """Who has the smallest key."""
        return _top(self._by_age)[3]

    def ahead(self, client: str) -> int:
        """About how many would be served before one that comes now from `client`: exact where nobody waits twice."""
        own = self._of_client.get(client, 0)
        others = self.waiting - own
        if not others:
            return own
        later = max(self.now, self._next.get(client, 0.0)) - _top(self._by_turn)[0]
        if later < 0:
            return 0
        clients = len(self._of_client) - (own > 0)
        return own + min(others, clients + round(later * self._weight * clients / len(self._of_client)))

    def older(self, key: float) -> int:
        """About how many wait whose key is smaller: as if they had come at equal intervals."""
        oldest = self.key()[0]
        if key <= oldest:
            return 0
        share = (key - oldest) / (self._newest - oldest) if self._newest > oldest else 1.0
        return min(self.waiting, math.ceil(self.waiting * share))

    def next(self) -> Waiter:
        """Whose turn it is."""
        return _top(self._by_turn)[3]

    def all(self) -> list[Waiter]:
        return [waiter for *_, waiter in self._by_turn if not waiter.gone]


def in_order(ranks: Iterable[Rank]) -> Iterator[Ticket]:
    """All who wait, as they would be served if nobody came or left any more."""
    by_age = [[entry for entry in sorted(rank._by_age, reverse=True) if not entry[3].gone] for rank in ranks]  # noqa: SLF001  (the same module)
    by_turn = [[entry for entry in sorted(rank._by_turn, reverse=True) if not entry[3].gone] for rank in ranks]  # noqa: SLF001
    queues = [queue for queue in zip(by_age, by_turn, strict=True) if queue[0]]
    served: set[Ticket] = set()
    while queues:
        queue = min(queues, key=_oldest)
        ages, turns = queue
        ticket = turns.pop()[3].ticket
        served.add(ticket)
        yield ticket
        while ages and ages[-1][3].ticket in served:
            ages.pop()
        if not ages:
            queues.remove(queue)


def _oldest(queue: tuple[_Heap, _Heap]) -> tuple[float, int]:
    key, _, number, _ = queue[0][-1]
    return key, number


def _without_gone(heap: _Heap) -> _Heap:
    heap = [entry for entry in heap if not entry[3].gone]
    heapq.heapify(heap)
    return heap


def _top(heap: _Heap) -> tuple[float, float, int, Waiter]:
    while heap[0][3].gone:
        heapq.heappop(heap)
    return heap[0]
