"""Plans of a registry, as it is now: reads everything, touches nothing."""

import math
import time
from typing import TYPE_CHECKING

import attrs
import trio

from trio_router.backend.lifecycle import State
from trio_router.errors import QueueFull, ShuttingDown
from trio_router.fleet.estimate import expected_wait
from trio_router.fleet.explain import Plan, room_for
from trio_router.fleet.placement import Decision, ModelSnapshot, Refuse, Retire, Snapshot, Start
from trio_router.fleet.refusal import no_room
from trio_router.fleet.ticket import Ticket
from trio_router.fleet.turns import Head, due, turn_seconds

if TYPE_CHECKING:
    from trio_router.fleet.model import Model
    from trio_router.fleet.registry import Registry


def plan_for(registry: "Registry", ticket: Ticket) -> Plan:
    """What would happen to a request with this ticket."""
    model = registry.model(ticket.alias)
    scheduler = model.scheduler
    held = registry.projected_bytes()
    plan = _Telling(model=model, ticket=ticket, held=held)
    if registry.draining:
        return plan.never("the router is shutting down", ShuttingDown.code)
    if model.state is State.FAILED and not model.supervisor.to_be_tried:
        error = model.supervisor.failure()
        return plan.never(error.message, error.code)
    ahead = scheduler.ahead(ticket)
    if scheduler.has_slot:
        return plan.told("run", f"model {model.alias!r} has a free slot", position=0, wait=0.0)
    if scheduler.waiting >= scheduler.room:
        return plan.never(
            f"{scheduler.waiting} requests wait for model {model.alias!r}, as many as may", QueueFull.code
        )
    if scheduler.paused or model.retiring is not None or not model.state.resident:
        return _with_place(registry, plan, ahead)
    ready = scheduler.backend is not None
    why = f"the slots of model {model.alias!r} are taken" if ready else f"model {model.alias!r} is being loaded"
    return plan.told(
        "queue" if ready else "load",
        f"{why}; {ahead} requests go before",
        position=ahead + 1,
        wait=scheduler.expected(ticket, ahead),
    )


def _never(registry: "Registry", model: "Model") -> tuple[str, str] | None:
    """Why a request for it would be refused, and the error's code."""
    scheduler = model.scheduler
    if registry.draining:
        return "the router is shutting down", ShuttingDown.code
    if model.state is State.FAILED and not model.supervisor.to_be_tried:
        error = model.supervisor.failure()
        return error.message, error.code
    if scheduler.waiting >= scheduler.room and not scheduler.has_slot:
        return f"{scheduler.waiting} requests wait for model {model.alias!r}, as many as may", QueueFull.code
    return None


def _with_place(registry: "Registry", plan: "_Telling", ahead: int) -> Plan:
    """The plan for a request whose model is not in memory, or on its way out."""
    model, ticket = plan.model, plan.ticket
    room = room_for(registry.snapshot(model), model.alias, ticket.head)
    if room.refusal is not None:
        models = [*registry.models.values(), *registry.leaving]
        error = no_room(model, room.refusal.shortage, models, registry.config.system)
        return plan.never(error.message, error.code)
    if room.seconds is None:
        why = f"model {model.alias!r} waits for a place: every model in memory has work, and others wait before it"
        return plan.told("wait", why, position=ahead + 1, wait=model.scheduler.expected(ticket, ahead))
    victims = [model for model in registry.everyone() if model.alias in room.evicts]
    drains = [victim.scheduler.drained_in() for victim in victims]
    begins = _sum(room.seconds, *drains, model.load_seconds)
    scheduler = model.scheduler
    wait = expected_wait(scheduler.pace, ahead=ahead, slots=scheduler.slots, elapsed=(), opens_in=begins)
    after = plan.held + (model.footprint_bytes or 0) - sum(
        victim.footprint_bytes or 0 for victim in victims
    )  # fmt: skip
    outcome, why = "load", f"model {model.alias!r} is loaded: there is room for it"
    if room.evicts:
        names = ", ".join(map(repr, room.evicts))
        outcome = "wait" if room.seconds else "load"
        when = f"whose turn ends in {room.seconds:.1f} s" if room.seconds else "which makes room now"
        why = f"model {model.alias!r} is loaded in the place of {names}, {when}"
    return plan.told(
        outcome, why, position=ahead + 1, wait=wait, evicts=room.evicts, place=room.seconds, after=after
    )  # fmt: skip


def place_in(registry: "Registry", model: "Model", head: Head | None) -> float | None:
    """Seconds until there is room for a model that is not in memory, if `head` waits for it; None: not known.

    Every model in memory makes room when its turn is over and what runs then is done; one that nobody waits for, when it
    has nothing to do any more, if that is first. Who waits for other models and is older gets the first of these places, and keeps them
    for a turn. Without `head`: for a normal request that comes now.
    """
    if model.state.resident:
        return 0.0
    snapshot = registry.snapshot(model)
    if head is None:
        head = Head(key=snapshot.now + registry.config.system.aging_sec, arrived_at=snapshot.now, steps=1)
    room = room_for(snapshot, model.alias, head)
    if room.refusal is not None:
        return None
    if room.seconds == 0 and not room.evicts:
        return 0.0
    everyone = {each.alias: each for each in registry.everyone()}
    places = sorted(
        seconds
        for resident in snapshot.models
        if resident.resident and (seconds := _leaves_in(everyone[resident.alias], resident, head, snapshot)) is not None
    )
    before = [
        everyone[other.alias]
        for other in snapshot.models
        if other.wanted and other.alias != model.alias and other.head is not None and other.head.key < head.key
    ]
    if not places:
        return None
    rounds, place = divmod(len(before), len(places))
    turns = [(other.load_seconds or 0.0) + _turn(other, snapshot) for other in before]
    return places[place] + (rounds * sum(turns) / len(turns) if turns else 0.0)


def _turn(model: "Model", snapshot: Snapshot) -> float:
    return turn_seconds(model.snapshot(snapshot.room), snapshot.turns)


def _leaves_in(model: "Model", resident: ModelSnapshot, head: Head, snapshot: Snapshot) -> float | None:
    """Seconds until a model in memory is gone, if `head` wants its place; None: not known."""
    now = snapshot.now
    drained = model.scheduler.drained_in()
    if resident.leaving:
        return drained
    if resident.pinned:
        return None
    ends = [_sum(max(0.0, due(resident, head, snapshot.turns) - now), drained)]
    if resident.head is None and (idle := model.idle_in()) is not None:
        rested = attrs.evolve(resident, head=None, active=0, last_used=max(resident.last_used, now + idle))
        ends.append(max(idle, due(rested, head, snapshot.turns) - now))
    return min((end for end in ends if end is not None and end < math.inf), default=None)


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


class _Telling:
    """What all plans for one request have in common."""

    def __init__(self, *, model: "Model", ticket: Ticket, held: int) -> None:
        self.model, self.ticket, self.held = model, ticket, held

    def never(self, why: str, code: str) -> Plan:
        return Plan(
            model=self.model.alias, priority=self.ticket.priority.label, outcome="never", why=why, code=code,
            memory_before=self.held, memory_after=self.held,
        )  # fmt: skip

    def told(
        self, outcome: str, why: str, *, position: int, wait: float | None,
        evicts: tuple[str, ...] = (), place: float | None = None, after: int | None = None,
    ) -> Plan:  # fmt: skip
        return Plan(
            model=self.model.alias, priority=self.ticket.priority.label, outcome=outcome, why=why,
            queue_position=position, evicts=evicts, place_seconds=place, wait_seconds=wait,
            memory_before=self.held, memory_after=self.held if after is None else after,
        )  # fmt: skip


def decided(registry: "Registry", decision: Decision) -> list[Plan]:
    """What a decision is about to do, as plans that have come true; one that yields already is not told of again."""
    now = trio.current_time()
    held = registry.projected_bytes()
    replicas = [replica for model in registry.models.values() for replica in model.replicas]
    models = {model.alias: model for model in (*registry.models.values(), *replicas, *registry.leaving)}
    told = []

    def tell(alias: str, outcome: str, why: str, evicts: tuple[str, ...] = (), change: int = 0) -> None:
        head = models[alias].scheduler.head()
        priority = None if head is None else ("high", "normal", "low")[head.steps]
        told.append(
            Plan(
                model=alias, priority=priority, outcome=outcome, why=why, at=time.time(), evicts=evicts,
                wait_seconds=models[alias].load_seconds if outcome in {"start", "evict"} else None,
                memory_before=held, memory_after=held + change,
            )
        )  # fmt: skip

    for action in decision.actions:
        own = models[action.alias].footprint_bytes or 0
        match action:
            case Start(alias=alias):
                head = models[alias].scheduler.head()
                why = "nobody waits for it" if head is None else f"a request waits for {now - head.arrived_at:.3f} s"
                tell(alias, "start", f"there is room for model {alias!r}: {why}", change=own)
            case Refuse(alias=alias):
                tell(alias, "refuse", f"model {alias!r} can never be loaded: memory, or places, are too few")
            case Retire(alias=alias, heir=str(heir)):
                why = f"model {alias!r} makes room for {heir!r}"
                tell(heir, "evict", why, evicts=(alias,), change=(models[heir].footprint_bytes or 0) - own)
            case Retire(alias=alias, reason=reason):
                tell(alias, "unload", f"model {alias!r} leaves: {reason.value}", change=-own)
    for alias, heir in decision.yielding.items():
        if not models[alias].scheduler.paused:
            tell(
                heir, "yield", f"model {alias!r} makes room for {heir!r} when what runs on it is done", evicts=(alias,)
            )
    return told
