"""Which models are loaded and which leave: a pure decision over a snapshot.

The registry takes a snapshot whenever something happened that could change the answer, asks `decide`, and does
what it says. Nothing here waits, logs, or touches a model.

The cases, in order; the numbers stand beside the code that is their case:

1. A load that nobody waits for any more, and that nobody asked for by name, is given up. (A model that was ready
   and is being restarted after a crash is not such a load: healing it needs nobody's wish.)
2. Any other resident that was idle for the idle timeout, or for as long as its last request said, leaves.
3. Models that are wanted and not resident are served in the order of their first waiter's key (priority, then
   arrival, with aging as in the queue). Models wanted only by the preload list come after all those, in the
   order of the file.
4. While fewer models are resident than may be, the next wanted one is started. A model that is stopping still
   holds its memory: it counts.
5. Else, if a model is on its way out already for this one, or for nobody else who waits, the place it frees is this
   one's: wait for it.
6. Else a resident that has had its turn leaves, to make room (`turns.due`): if one of these is idle, then that of all
   idle ones which was used least recently; else the one whose first waiter comes last. While requests run on it, it is
   yielding to its heir: no new lease. If the heir gives up, or gets another place, it stays. Back in the order of
   case 3 it stands behind those who got its place, unless it is wanted with higher priority than they had. Preloading
   never makes another model leave.
7. Else every resident has its turn: the request waits, and when the first of these turns ends is looked at again.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import attrs

from trio_router.backend.lifecycle import State
from trio_router.fleet.turns import Head, TurnRules, due
from trio_router.telemetry.events import UnloadReason


@attrs.frozen(kw_only=True)
class ModelSnapshot:
    """One model at the moment of a decision. Times are trio times."""

    alias: str
    state: State
    retiring: bool = False
    """Told to leave, whatever its state says yet."""
    head: Head | None = None
    """Of those who wait; None when nobody does."""
    behind: Head | None = None
    """Those who got its place though some who waited for it were older."""
    active: int = 0
    """Leases that are out."""
    asked: bool = False
    """Somebody asked for it by name, and it is not ready yet."""
    preload: bool = False
    """On the preload list, and not ready for the first time yet."""
    serving: bool = False
    """Its slots can be leased."""
    yielding: bool = False
    """It gives no new lease, by the decision before."""
    heir: str | None = None
    """For whom it does so, or leaves."""
    was_ready: bool = False
    """It was ready since it came into memory."""
    ready_at: float = -math.inf
    """When it became ready, the first time since."""
    load_seconds: float = 0.0
    """What its load took, as far as is known."""
    last_used: float = -math.inf
    keep_seconds: float | None = None
    """How long it may be idle; None: as long as any."""

    @property
    def resident(self) -> bool:
        """Whether it holds a place."""
        return self.state.resident

    @property
    def wanted(self) -> bool:
        """Whether it would be loaded if there were room."""
        return self.state is State.OFF and (self.head is not None or self.asked or self.preload)

    @property
    def leaving(self) -> bool:
        """Whether it is on its way out."""
        return self.retiring or self.state is State.STOPPING

    @property
    def idle(self) -> bool:
        """Whether it could leave without hurting anyone."""
        return (
            self.resident
            and not self.leaving
            and self.active == 0
            and self.head is None
            and not self.asked
            and not self.preload
        )


@attrs.frozen(kw_only=True)
class Snapshot:
    """Everything a decision may depend on."""

    now: float
    models: Sequence[ModelSnapshot]
    """In the order of the file."""
    max_resident: int
    idle_timeout: float | None
    """Seconds; None: models do not leave by being idle."""
    turns: TurnRules = attrs.field(factory=TurnRules)


@attrs.frozen
class Start:
    """Load this model."""

    alias: str


@attrs.frozen
class Retire:
    """Unload this model, on which nothing runs."""

    alias: str
    reason: UnloadReason
    heir: str | None = attrs.field(default=None, eq=False)
    """The model it makes room for."""
    behind: Head | None = attrs.field(default=None, eq=False)
    """Those it makes room for, if some who wait for it are older."""


@attrs.frozen(kw_only=True)
class Decision:
    """What to do now."""

    actions: tuple[Start | Retire, ...] = ()
    yielding: Mapping[str, str] = attrs.Factory(dict)
    """Models that give no new lease from now on, and for whom; all others do."""
    look_again_at: float = math.inf
    """When the answer may change though nothing else happens."""
    someone_waits: bool = False
    """Whether a wanted model got no place: every model that becomes idle is then worth another look."""


def decide(snapshot: Snapshot) -> Decision:
    """What to start and what to unload now."""
    leaving, look_again_at = _leave(snapshot)
    return _make_room(snapshot, leaving, look_again_at)


def _leave(snapshot: Snapshot) -> tuple[dict[str, Retire], float]:
    """Cases 1 and 2: who leaves whoever else wants room, and when that is to be asked again."""
    leaving: dict[str, Retire] = {}
    again = math.inf
    usual = math.inf if snapshot.idle_timeout is None else snapshot.idle_timeout
    for model in snapshot.models:
        timeout = usual if model.keep_seconds is None else model.keep_seconds
        if not model.idle:
            # busy now: it cannot have been idle for the timeout before this; one with a wish is looked at when it rests
            if model.state is State.READY and model.keep_seconds is None:
                again = min(again, snapshot.now + timeout)
        elif not model.was_ready:
            leaving[model.alias] = Retire(model.alias, UnloadReason.ABANDONED)  # 1
        elif model.last_used + timeout <= snapshot.now:
            leaving[model.alias] = Retire(model.alias, UnloadReason.IDLE)  # 2
        else:
            again = min(again, model.last_used + timeout)
    return leaving, again


def _make_room(snapshot: Snapshot, leaving: dict[str, Retire], look_again_at: float) -> Decision:
    """Cases 3 to 7: who is loaded, and who makes room for that."""
    actions: list[Start | Retire] = list(leaving.values())
    residents = [model for model in snapshot.models if model.resident]
    places = max(0, snapshot.max_resident - len(residents))
    wanted = sorted((model for model in snapshot.models if model.wanted), key=_urgency)  # 3
    actions += [Start(model.alias) for model in wanted[:places]]  # 4
    waiting = wanted[places:]
    claims = _without_promised(waiting, [model for model in residents if model.leaving or model.alias in leaving])  # 5
    stay = {model.alias: model for model in residents if not model.leaving and model.alias not in leaving}
    heirs = {model.heir: model for model in stay.values() if model.yielding}
    kept = {
        model.alias: yields
        for model in claims
        if (yields := heirs.get(model.alias)) and due(yields, _claim(model), snapshot.turns) <= snapshot.now
    }
    for model in kept.values():
        del stay[model.alias]
    yielding: dict[str, str] = {}
    for model in claims:
        victim, again = kept.get(model.alias), math.inf
        if victim is None:
            victim, again = _victim(model, stay.values(), snapshot)
        if victim is None:
            look_again_at = min(look_again_at, again)  # 7
            continue
        stay.pop(victim.alias, None)
        if victim.active and victim.serving:
            yielding[victim.alias] = model.alias  # 6
        else:
            reason = UnloadReason.EVICTED
            actions.append(Retire(victim.alias, reason, heir=model.alias, behind=_behind(victim, model)))  # 6
    return Decision(actions=tuple(actions), yielding=yielding, look_again_at=look_again_at, someone_waits=bool(waiting))


def _without_promised(waiting: Sequence[ModelSnapshot], leaving: Sequence[ModelSnapshot]) -> list[ModelSnapshot]:
    """Those for whom somebody has to make room: no place is about to be free for them, and it is no preload."""
    aliases = {model.alias for model in waiting}
    promised = {model.heir for model in leaving if model.heir in aliases}
    others = len(leaving) - len(promised)
    left = [model for model in waiting if model.alias not in promised]
    return [model for model in left[others:] if model.head is not None or model.asked]


def _victim(
    model: ModelSnapshot, stay: Collection[ModelSnapshot], snapshot: Snapshot
) -> tuple[ModelSnapshot | None, float]:
    """Who makes room for it; if nobody does, when that is to be asked again."""
    claim = _claim(model)
    when = [(due(one, claim, snapshot.turns), one) for one in stay]
    over = [one for time, one in when if time <= snapshot.now]
    if over:
        # one that was used later is not to go because its turn began before
        idle = [one for one in stay if one.idle] if any(one.idle for one in over) else []
        return min(idle or over, key=_worth), math.inf
    return None, min((time for time, _ in when), default=math.inf)


def _behind(victim: ModelSnapshot, heir: ModelSnapshot) -> Head | None:
    """Those it makes room for, if some who wait for it are older."""
    claim = _claim(heir)
    older = claim is not None and victim.head is not None and victim.head.key <= claim.key
    return claim if older else None


def _claim(model: ModelSnapshot) -> Head | None:
    """Those who wait for it, with the key that counts between models."""
    head, behind = model.head, model.behind
    if head is None or behind is None or head.steps < behind.steps or head.key > behind.key:
        return head
    return attrs.evolve(head, key=behind.key)


def _urgency(model: ModelSnapshot) -> tuple[int, float, bool]:
    """Sorts by who is to be loaded first; stable, so equal ones stay in the order of the file."""
    claim = _claim(model)
    if claim is not None:
        return 0, claim.key, claim is not model.head
    return (1 if model.asked else 2), 0.0, False


def _worth(model: ModelSnapshot) -> tuple[bool, float, float]:
    """Sorts by who is to leave first."""
    first = math.inf if model.head is None else model.head.key
    return (not model.idle, -first, model.last_used)
