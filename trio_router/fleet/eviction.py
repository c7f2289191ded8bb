"""Which idle models leave so that another one fits: a pure decision.

As few as make room; among sets of that size the one that is least missed. An idle model is missed by what it costs to
load it again, and the more the less time has passed since it was used: `load_seconds / idle_seconds`, summed over the
set. So of models that load equally fast the least recently used leaves, and one that takes a minute to load stays before
one that takes a second and was used a little later. (Cost over age is what GreedyDual caches go by, Young 1994.) Busy
ones, whose turn is over, are missed more than any idle one; of these the one whose first waiter comes first the most.

1. Up to `EXACT` idle models every set is looked at, smallest first: at most 4,096.
2. With more of them, those least missed leave first until the rest fits, and then whoever turned out not to be needed
   is kept, the most missed first.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

import attrs

EXACT: Final = 12
UNKNOWN_LOAD_SECONDS: Final = 1.0
"""Stands for a model of which not even the size says how long it loads."""
_LEAST_IDLE_SECONDS: Final = 0.001
_BUSY: Final = 1e12
_LATEST_KEY: Final = 1e9


@attrs.frozen(kw_only=True)
class Candidate:
    """A model that may leave."""

    alias: str
    missed: float
    """How much: `idle_missed` or `busy_missed`."""
    last_used: float
    """Trio time; of those missed equally the one with the least leaves first."""
    frees: Mapping[int, int]
    """Bytes by device."""


def idle_missed(load_seconds: float, idle_seconds: float) -> float:
    """How much an idle model is missed; 0 seconds to load it: nobody knows."""
    return (load_seconds or UNKNOWN_LOAD_SECONDS) / max(_LEAST_IDLE_SECONDS, idle_seconds)


def busy_missed(first_key: float | None) -> float:
    """The same of a busy one, whose first waiter has that key; None: nobody waits, requests only run."""
    return _BUSY - (_LATEST_KEY if first_key is None else min(first_key, _LATEST_KEY))


def fewest(
    candidates: Sequence[Candidate], fits: Callable[[Mapping[int, int]], bool], *, at_least: int
) -> tuple[Candidate, ...] | None:
    """Who leaves: at least `at_least`, and enough for `fits`, which is told what leaving frees; None if all are too few."""
    if len(candidates) < at_least or not fits(freed(candidates)):
        return None
    # in the order in which they would leave: equal sets are told apart by it
    ordered = sorted(candidates, key=lambda one: (one.missed, one.last_used))
    if len(ordered) > EXACT:
        return _greedy(ordered, fits, at_least)  # 2
    for count in range(at_least, len(ordered) + 1):  # 1
        fitting = (one for one in itertools.combinations(ordered, count) if fits(freed(one)))
        best = min(fitting, key=lambda some: sum(one.missed for one in some), default=None)
        if best is not None:
            return best
    return None


def _greedy(
    ordered: Sequence[Candidate], fits: Callable[[Mapping[int, int]], bool], at_least: int
) -> tuple[Candidate, ...]:
    count = at_least
    while not fits(freed(ordered[:count])):
        count += 1
    leaving = list(ordered[:count])
    for one in reversed(ordered[:count]):
        rest = [other for other in leaving if other is not one]
        if len(rest) >= at_least and fits(freed(rest)):
            leaving = rest
    return tuple(leaving)


class Holder(Protocol):
    """What frees memory by leaving."""

    @property
    def frees(self) -> Mapping[int, int]: ...


def freed(some: Iterable[Holder]) -> dict[int, int]:
    """What all of them free together."""
    total: dict[int, int] = {}
    for one in some:
        for device, size in one.frees.items():
            total[device] = total.get(device, 0) + size
    return total
