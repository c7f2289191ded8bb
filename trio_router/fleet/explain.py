"""What would happen to a request that came now, and what was decided for those that did.

`plan` asks the same `decide` that runs the fleet, over a snapshot in which one more waits, and goes on to the next
moment at which its answer may change until there is a place: as if nobody else came, and nobody left. Nothing is
touched.
"""

import math
from collections.abc import Sequence
from typing import Any

import attrs

from trio_router.fleet.placement import Decision, ModelSnapshot, Refuse, Retire, Snapshot, Start, decide
from trio_router.fleet.turns import Head

MAX_STEPS = 64
"""So many ends of turns are looked at, at most."""
MIB = 1024 * 1024


@attrs.frozen(kw_only=True)
class Plan:
    """What happens for one request or model. Seconds from now; None: not known."""

    model: str
    priority: str | None
    """None: for a model that was asked for by name, or a decision for all who wait for it."""
    outcome: str
    """`run`, `queue`, `load`, `wait` (for a place), `never`; of decisions: `start`, `evict`, `yield`, `unload`, `refuse`."""
    why: str
    at: float | None = None
    """Unix time of a decision."""
    queue_position: int | None = None
    """0: it has a slot at once."""
    evicts: tuple[str, ...] = ()
    place_seconds: float | None = None
    """Until a place is being made for it."""
    wait_seconds: float | None = None
    """Until it has a slot."""
    memory_before: int | None = None
    memory_after: int | None = None
    """Bytes that models in memory are projected to hold."""
    code: str | None = None
    """Of the error it would get."""

    def as_json(self) -> dict[str, Any]:
        """As users see it."""
        return {
            "at": self.at,
            "model": self.model,
            "priority": self.priority,
            "outcome": self.outcome,
            "why": self.why,
            "code": self.code,
            "queue_position": self.queue_position,
            "evicts": list(self.evicts),
            "place_in_ms": _milliseconds(self.place_seconds),
            "estimated_wait_ms": _milliseconds(self.wait_seconds),
            "memory_before_mb": _mebibytes(self.memory_before),
            "memory_after_mb": _mebibytes(self.memory_after),
        }


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(1000 * seconds)


def _mebibytes(size: int | None) -> int | None:
    return None if size is None else round(size / MIB)


@attrs.frozen(kw_only=True)
class Room:
    """How a model that is not in memory gets a place."""

    evicts: tuple[str, ...] = ()
    """Who leaves for it; empty if there is room."""
    seconds: float | None = None
    """Until that begins; None: not as things stand."""
    refusal: Refuse | None = None
    """Why it never gets one."""


def room_for(snapshot: Snapshot, alias: str, head: Head) -> Room:
    """How `alias` gets a place if `head` waits for it from now on."""
    models = [_with(model, head) if model.alias == alias else model for model in snapshot.models]
    now = snapshot.now
    for _ in range(MAX_STEPS):
        decision = decide(attrs.evolve(snapshot, models=models, now=now))
        if any(isinstance(action, Start) and action.alias == alias for action in decision.actions):
            return Room(seconds=now - snapshot.now)
        for action in decision.actions:
            if isinstance(action, Refuse) and action.alias == alias:
                return Room(refusal=action)
        if victims := _victims(decision, models, alias):
            return Room(evicts=victims, seconds=now - snapshot.now)
        if not snapshot.now <= decision.look_again_at < math.inf:
            break
        now = decision.look_again_at
    return Room()


def _with(model: ModelSnapshot, head: Head) -> ModelSnapshot:
    """The same with one more who waits."""
    own = model.head
    if own is None:
        return attrs.evolve(model, head=head)
    both = Head(
        key=min(own.key, head.key), arrived_at=min(own.arrived_at, head.arrived_at), steps=min(own.steps, head.steps)
    )
    return attrs.evolve(model, head=both)


def _victims(decision: Decision, models: Sequence[ModelSnapshot], alias: str) -> tuple[str, ...]:
    """Who makes room for it now, or does already."""
    retired = [action.alias for action in decision.actions if isinstance(action, Retire) and action.heir == alias]
    yielding = [victim for victim, heir in decision.yielding.items() if heir == alias]
    leaving = [model.alias for model in models if model.leaving and model.heir in {alias, None}]
    return tuple([*retired, *yielding] or leaving[:1])
