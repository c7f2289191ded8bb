"""When a model in memory makes room for one that waits: a pure rule, asked by `placement`.

A model's *turn* begins when it becomes ready. A swap costs what a load takes, so whoever was just loaded first serves
those for whom that was done: those who wait for it, and those who come meanwhile. `due` says from when on a resident
yields to a *claim*, a model that is wanted and not in memory. Yielding is: no new lease; what runs is finished; those
who wait for it wait on, with the keys they have.

The cases, in order; the numbers stand beside the code that is their case:

1. Somebody asked for the resident by name, or it is on the preload list, and it is not ready yet: never.
2. High priority ends a turn, and a load too, at once: a claim of somebody with high priority, unless somebody waits
   for the resident who has it too, or is older by their keys. (Aging: low that has waited long enough outranks high
   that comes now. So nobody's load is given up again and again.) Normal does not do that to low: what low waits for
   takes mostly less than the loads it would cost.
3. A resident that has not been ready yet in its stay is waited for.
4. An idle one yields when its turn is over, and before that when it was idle for as long as the next request for it
   is worth to be waited for: `IDLE_SHARE` of what its load took, at least `IDLE_SECONDS`. One whose load took less
   than `DEAR_SECONDS`, or that nobody used since, yields at once: to wait would cost the claim more than it could save.
5. A busy one yields when its turn is over, unless somebody who waits for it is older than the claim, by their keys.
6. In any case it yields after the claim has waited for `max_swap_wait` in this turn. So a request waits for no turn
   longer than that, and with n models before its own, for no more than n turns and n + 1 loads.
   A claim nobody waits for (it was asked for by name) has no such bound, and no key: it waits for idle residents.
"""

import math
from typing import Protocol

import attrs

MIN_TURN_SECONDS = 0.5
TURN_LOADS = 4.0
"""Where router.toml says nothing a turn is so many times what the load took, at least that long: so at most a fifth of
the time goes into loads while there is work. (`benchmarks/policies.py` compares others.)"""
DEAR_SECONDS = 1.0
"""Loads that take less are not worth that somebody waits for an idle model."""
IDLE_SECONDS = 0.5
IDLE_SHARE = 0.25


@attrs.frozen(kw_only=True)
class Head:
    """What a decision may know of those who wait for one model."""

    key: float
    """The smallest of all."""
    arrived_at: float
    """Of who waits longest."""
    steps: int
    """Of the best priority among them: 0 is high."""


@attrs.frozen(kw_only=True)
class TurnRules:
    """The bounds of router.toml."""

    min_turn: float | None = None
    """Seconds; None: by what the model's load took."""
    max_swap_wait: float = math.inf
    """Seconds."""


class Resident(Protocol):
    """What the rule asks of a model in memory."""

    @property
    def head(self) -> Head | None: ...
    @property
    def active(self) -> int: ...
    @property
    def asked(self) -> bool: ...
    @property
    def preload(self) -> bool: ...
    @property
    def was_ready(self) -> bool: ...
    @property
    def ready_at(self) -> float: ...
    @property
    def last_used(self) -> float: ...
    @property
    def load_seconds(self) -> float: ...


def turn_seconds(resident: Resident, rules: TurnRules) -> float:
    """How long its turn is."""
    return max(MIN_TURN_SECONDS, TURN_LOADS * resident.load_seconds) if rules.min_turn is None else rules.min_turn


def due(resident: Resident, claim: Head | None, rules: TurnRules) -> float:
    """The trio time from which `resident` yields to `claim`: past or future, infinite if not as things stand."""
    if resident.asked or resident.preload:
        return math.inf  # 1
    own = resident.head
    if claim is not None and claim.steps == 0 and (own is None or (own.steps > 0 and claim.key < own.key)):
        return -math.inf  # 2
    if not resident.was_ready:
        return math.inf  # 3
    end = resident.ready_at + turn_seconds(resident, rules)
    bound = math.inf if claim is None else max(claim.arrived_at, resident.ready_at) + rules.max_swap_wait  # 6
    if own is None and not resident.active:
        dear = resident.last_used > resident.ready_at and resident.load_seconds >= DEAR_SECONDS
        idle = max(IDLE_SECONDS, IDLE_SHARE * resident.load_seconds) if dear else 0.0
        return min(end, resident.last_used + idle, bound)  # 4
    if claim is None or (own is not None and own.key <= claim.key):
        return bound  # 5
    return min(end, bound)  # 5
