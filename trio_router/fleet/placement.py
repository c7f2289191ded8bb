"""Which models are loaded and which leave: a pure decision over a snapshot.

The registry takes a snapshot whenever something happened that could change the answer, asks `decide`, and does
what it says. Nothing here waits, logs, or touches a model.

The cases, in order; the numbers stand beside the code that is their case:

1. A load that nobody waits for any more, and that nobody asked for by name, is given up. (A model that was ready
   and is being restarted after a crash is not such a load: healing it needs nobody's wish.)
2. Any other resident that was idle for the idle timeout, or for as long as its last request said, leaves, unless it is
   pinned.
3. Models that are wanted and not resident are served in the order of their first waiter's key (priority, then
   arrival, with aging as in the queue). Models wanted only by the preload list come after all those, in the
   order of the file.
4. While fewer models are resident than may be, the next wanted one is started, if there is memory for it: where
   `memory.room` says. A model that is stopping still holds its memory: it counts.
5. Else, if it could never be started, whatever else leaves by itself or is made to, those who wait are told at once:
   it needs more memory than there can be, or pinned models have every place.
6. Else, if a place and memory will be free without anybody else doing anything, wait for it: a model is on its way out
   already for this one, or for nobody else who waits; or it left and its memory is not seen free yet.
7. Else residents that have had their turn leave, to make room (`turns.due`): if one of these is idle, then of all idle
   ones as few as are enough, those least missed (`fleet.eviction`); if these are too few, busy ones too, those first
   whose first waiter comes last.
   One whose load failed for memory has an idle one leave even where the numbers say that there is room, and waits for it (6).
   While requests run on one, it is yielding to its heir: no new lease. If the heir gives up, or gets another place,
   it stays. Back in the order of case 3, it stands behind those who got its place, unless it is wanted with higher
   priority than they had. Pinned models stay. Preloading never makes another model leave.
8. Else too many residents have their turn: the request waits, and when the first of these turns ends is looked at again.

A model that waits (6 to 8) has a claim to the memory it needs: models that come after it in the order are started
beside that, not from it. One that waits in 8 has none to a place that is free: whoever leaves for it leaves a place, too.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import attrs

from trio_router.backend.lifecycle import State
from trio_router.fleet.eviction import Candidate, busy_missed, fewest, freed, idle_missed
from trio_router.fleet.turns import Head, TurnRules, due
from trio_router.memory.room import Need, Room, Shortage, Spot
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
    """What its load took, as far as is known; 0: it is not."""
    last_used: float = -math.inf
    keep_seconds: float | None = None
    """How long it may be idle; None: as long as any."""
    need: Need | None = None
    """Memory that it takes; None: not known, it counts by its place only."""
    frees: Mapping[int, int] = attrs.field(factory=dict)
    """What is free by device once it has left."""
    pinned: bool = False
    """Stays whoever else wants room."""
    crowded: bool = False
    """Memory was too short for it, whatever the numbers say: an idle model leaves before it is tried again."""
    patient: bool = False
    """One that was told to do so has to be gone first."""

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

    @property
    def wished(self) -> bool:
        """Whether others may have to leave for it."""
        return self.head is not None or self.asked


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
    room: Room = attrs.field(factory=Room)
    """Memory; by default there is no bound."""


@attrs.frozen
class Start:
    """Load this model, there."""

    alias: str
    spot: Spot = attrs.field(factory=Spot)


@attrs.frozen
class Refuse:
    """Tell those who wait for this model that it can never be loaded."""

    alias: str
    shortage: Shortage | None
    """None: pinned models have every place."""


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

    actions: tuple[Start | Retire | Refuse, ...] = ()
    yielding: Mapping[str, str] = attrs.Factory(dict)
    """Models that give no new lease from now on, and for whom; all others do."""
    look_again_at: float = math.inf
    """When the answer may change though nothing else happens."""
    someone_waits: bool = False
    """Whether a wanted model got no place: every model that becomes idle is then worth another look."""
    memory_waits: bool = False
    """Whether one of them waits for memory to be seen free."""


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
            if model.state is State.READY and model.keep_seconds is None and not model.pinned:
                again = min(again, snapshot.now + timeout)
        elif not model.was_ready:
            leaving[model.alias] = Retire(model.alias, UnloadReason.ABANDONED)  # 1
        elif model.pinned:
            continue
        elif model.last_used + timeout <= snapshot.now:
            leaving[model.alias] = Retire(model.alias, UnloadReason.IDLE)  # 2
        else:
            again = min(again, model.last_used + timeout)
    return leaving, again


def _make_room(snapshot: Snapshot, leaving: dict[str, Retire], look_again_at: float) -> Decision:
    """Cases 3 to 8: who is loaded, and who makes room for that."""
    wanted = sorted((model for model in snapshot.models if model.wanted), key=_urgency)  # 3
    plan = _Plan.of(snapshot, wanted, leaving)
    for model in wanted:
        plan.place(model)
    return Decision(
        actions=(*leaving.values(), *plan.actions),
        yielding=plan.yielding,
        look_again_at=min(look_again_at, plan.look_again_at),
        someone_waits=plan.someone_waits,
        memory_waits=plan.memory_waits,
    )


@attrs.define(kw_only=True)
class _Plan:
    """What is done now, and what is left for those who come later in the order."""

    snapshot: Snapshot
    free: int
    """How many more models may be resident."""
    promised: int
    """How many more may once those have left that leave for nobody who waits."""
    pinned: int
    """How many places pinned models have."""
    room: Room
    stay: dict[str, ModelSnapshot]
    """Those who may be made to leave, by alias."""
    inherited: Mapping[str, Sequence[ModelSnapshot]]
    """Those that leave for a model that waits, by its alias."""
    kept: dict[str, Sequence[ModelSnapshot]]
    """Those that yield to one already."""
    actions: list[Start | Retire | Refuse] = attrs.field(factory=list)
    yielding: dict[str, str] = attrs.field(factory=dict)
    look_again_at: float = math.inf
    someone_waits: bool = False
    memory_waits: bool = False

    @classmethod
    def of(cls, snapshot: Snapshot, wanted: Sequence[ModelSnapshot], retired: Mapping[str, Retire]) -> "_Plan":
        residents = [model for model in snapshot.models if model.resident]
        leaving = [model for model in residents if model.leaving or model.alias in retired]
        stay = {model.alias: model for model in residents if not model.leaving and model.alias not in retired}
        free = max(0, snapshot.max_resident - len(residents))
        inherited: dict[str, list[ModelSnapshot]] = {model.alias: [] for model in wanted}
        for model in leaving:
            if model.heir in inherited:
                inherited[model.heir].append(model)
        room = snapshot.room.more(freed(model for model in leaving if model.alias in retired))
        kept = _kept(snapshot, _without_place(wanted[free:], leaving), wanted, stay.values(), room)
        taken = {model.alias for models in kept.values() for model in models}
        theirs = freed(model for models in inherited.values() for model in models)
        return cls(
            snapshot=snapshot,
            free=free,
            promised=len(leaving) - sum(map(len, inherited.values())),
            pinned=sum(model.pinned for model in stay.values()),
            room=room.more({device: -size for device, size in theirs.items()}),
            stay={alias: model for alias, model in stay.items() if not model.pinned and alias not in taken},
            inherited=inherited,
            kept=kept,
        )

    def place(self, model: ModelSnapshot) -> None:
        """Decide about a model that is wanted."""
        self._place(model)
        # those that yield to it and need not do so any more may make room for others
        self.stay |= {one.alias: one for one in self.kept.pop(model.alias, ()) if not one.pinned}

    def _place(self, model: ModelSnapshot) -> None:
        self.promised += len(self.inherited[model.alias])
        self.room = self.room.more(freed(self.inherited[model.alias]))
        spot = self.room.spot(model.need)
        if model.crowded and model.wished and (idle := self._idle_victim()):
            self._make_leave(idle, model)
            self.room = self.room.less(self.room.spot_soon(model.need) or Spot())
            self.someone_waits = True
            self._take_place()
            return  # 7
        if model.patient and self.inherited[model.alias]:
            self.room = self.room.less(self.room.spot_soon(model.need) or Spot())
            self.someone_waits = True
            self._take_place()
            return  # 6
        if self.free > 0 and spot is not None:
            self.free -= 1
            self.pinned += model.pinned
            self.room = self.room.less(spot)
            self.actions.append(Start(model.alias, spot))  # 4
            return
        shortage = self.room.never(model.need)
        if shortage is not None or 0 < self.snapshot.max_resident <= self.pinned:
            self.actions.append(Refuse(model.alias, shortage))  # 5
            return
        self.someone_waits = True
        if self._has_place and (soon := self.room.spot_soon(model.need)) is not None:
            if spot is None:
                self.memory_waits, self.look_again_at = True, min(self.look_again_at, self.room.changes_at)
            self.room = self.room.less(soon)  # 6
        elif not model.wished:
            return
        elif (victims := self._victims(model)) is not None:
            for victim in victims:
                self._make_leave(victim, model)  # 7
            self.room = self.room.less(self.room.spot_soon(model.need) or Spot())
        else:
            self.room = self.room.claimed(model.need)  # 8; a place it will have from whoever leaves for it
            return
        self._take_place()

    @property
    def _has_place(self) -> bool:
        return self.free > 0 or self.promised > 0

    def _take_place(self) -> None:
        """One of them, if there is any, for a model that waits: one that is free is rather for who can start now."""
        if self.promised > 0:
            self.promised -= 1
        elif self.free > 0:
            self.free -= 1

    def _victims(self, model: ModelSnapshot) -> Sequence[ModelSnapshot] | None:
        """Who makes room for `model`; None when too few can, and it is looked at again when more can."""
        claim, now = _claim(model), self.snapshot.now
        already = self.kept.get(model.alias, ())
        begun = freed(already)
        when = [(due(one, claim, self.snapshot.turns), one) for one in self.stay.values()]
        over = [one for time, one in when if time <= now]
        idle = [one for one in self.stay.values() if one.idle] if any(one.idle for one in over) else []
        # an idle one that was used later is not to go because its turn began before
        for some in (idle, [*idle, *(one for one in over if not one.idle)]):
            found = fewest(
                [_candidate(one, now) for one in some],
                partial(_fits, self.room.more(begun), model.need),
                at_least=0 if self._has_place else max(0, 1 - len(already)),
            )
            if found is not None:
                self.kept.pop(model.alias, None)
                return [*already, *(self.stay[one.alias] for one in found)]
        self.look_again_at = min(self.look_again_at, *(time for time, _ in when if time > now), math.inf)
        return None

    def _idle_victim(self) -> ModelSnapshot | None:
        """Of those that are idle the one least missed."""
        idle = [_candidate(one, self.snapshot.now) for one in self.stay.values() if one.idle]
        least = min(idle, key=lambda one: (one.missed, one.last_used), default=None)
        return None if least is None else self.stay[least.alias]

    def _make_leave(self, victim: ModelSnapshot, heir: ModelSnapshot) -> None:
        self.stay.pop(victim.alias, None)
        self.promised += 1
        self.room = self.room.more(victim.frees)
        if victim.active and victim.serving:
            self.yielding[victim.alias] = heir.alias
        else:
            behind = _behind(victim, heir)
            self.actions.append(Retire(victim.alias, UnloadReason.EVICTED, heir=heir.alias, behind=behind))


def _without_place(waiting: Sequence[ModelSnapshot], leaving: Sequence[ModelSnapshot]) -> set[str]:
    """Those for whom no place is about to be free."""
    aliases = {model.alias for model in waiting}
    promised = {model.heir for model in leaving if model.heir in aliases}
    others = len(leaving) - len(promised)
    return {model.alias for model in [model for model in waiting if model.alias not in promised][others:]}


def _kept(
    snapshot: Snapshot,
    placeless: Collection[str],
    wanted: Sequence[ModelSnapshot],
    stay: Collection[ModelSnapshot],
    room: Room,
) -> dict[str, Sequence[ModelSnapshot]]:
    """Those that go on yielding, by whom they make room for: as few as are needed of those that do."""
    kept: dict[str, Sequence[ModelSnapshot]] = {}
    for model in (model for model in wanted if model.wished):
        claim = _claim(model)
        yields = {
            one.alias: one
            for one in stay
            if one.yielding and one.heir == model.alias and due(one, claim, snapshot.turns) <= snapshot.now
        }
        if not yields or (model.alias not in placeless and room.spot_soon(model.need) is not None):
            continue
        enough = fewest(
            [_candidate(one, snapshot.now) for one in yields.values()],
            partial(_fits, room, model.need),
            at_least=int(model.alias in placeless),
        )
        kept[model.alias] = [*yields.values()] if enough is None else [yields[one.alias] for one in enough]
    return kept


def _fits(room: Room, need: Need | None, more: Mapping[int, int]) -> bool:
    return room.spot_soon(need, more) is not None


def _candidate(model: ModelSnapshot, now: float) -> Candidate:
    return Candidate(
        alias=model.alias,
        missed=idle_missed(model.load_seconds, now - model.last_used)
        if model.idle
        else busy_missed(None if model.head is None else model.head.key),
        last_used=model.last_used,
        frees=model.frees,
    )


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
