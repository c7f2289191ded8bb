"""Which models are loaded and which leave: a pure decision over a snapshot.

The registry takes a snapshot whenever something happened that could change the answer, asks `decide`, and does
what it says. Nothing here waits, logs, or touches a model.

The cases, in order; the numbers stand beside the code that is their case:

1. A load that nobody waits for any more, and that nobody asked for by name, is given up. (A model that was ready
   and is being restarted after a crash is not such a load: healing it needs nobody's wish.)
2. Any other resident that was idle for the idle timeout leaves.
3. Models that are wanted and not resident are served in the order of their first waiter's key (priority, then
   arrival, with aging as in the queue). Models wanted only by the preload list come after all those, in the
   order of the file.
4. While fewer models are resident than may be, the next wanted one is started. A model that is stopping still
   holds its memory: it counts.
5. Else, if a model is on its way out already, the place it frees is this one's: wait for it.
6. Else the idle resident that was used least recently leaves, to make room. It is idle when nobody holds or
   waits for a slot of it and nobody asked for it by name. Preloading never makes another model leave.
7. Else every resident is busy: the request waits.
"""

import math
from collections.abc import Sequence

import attrs

from trio_router.backend.lifecycle import State
from trio_router.telemetry.events import UnloadReason


@attrs.frozen(kw_only=True)
class ModelSnapshot:
    """One model at the moment of a decision. Times are trio times."""

    alias: str
    state: State
    retiring: bool = False
    """Told to leave, whatever its state says yet."""
    first_key: float | None = None
    """Key of the first who waits; None when nobody does."""
    active: int = 0
    """Leases that are out."""
    asked: bool = False
    """Somebody asked for it by name, and it is not ready yet."""
    preload: bool = False
    """On the preload list, and not ready for the first time yet."""
    was_ready: bool = False
    """It was ready since it came into memory."""
    last_used: float = -math.inf

    @property
    def resident(self) -> bool:
        """Whether it holds a place."""
        return self.state.resident

    @property
    def wanted(self) -> bool:
        """Whether it would be loaded if there were room."""
        return self.state is State.OFF and (self.first_key is not None or self.asked or self.preload)

    @property
    def idle(self) -> bool:
        """Whether it could leave without hurting anyone."""
        return (
            self.resident
            and not self.retiring
            and self.state is not State.STOPPING
            and self.active == 0
            and self.first_key is None
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


@attrs.frozen
class Start:
    """Load this model."""

    alias: str


@attrs.frozen
class Retire:
    """Unload this model, which is idle."""

    alias: str
    reason: UnloadReason


@attrs.frozen(kw_only=True)
class Decision:
    """What to do now."""

    actions: tuple[Start | Retire, ...] = ()
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
    timeout = math.inf if snapshot.idle_timeout is None else snapshot.idle_timeout
    for model in snapshot.models:
        if not model.idle:
            if model.state is State.READY:  # busy now: it cannot have been idle for the timeout before this
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
    places = snapshot.max_resident - len(residents)
    promised = sum(model.retiring or model.state is State.STOPPING or model.alias in leaving for model in residents)
    idle = sorted(
        (model for model in residents if model.idle and model.alias not in leaving), key=lambda model: model.last_used
    )
    someone_waits = False
    for model in sorted((m for m in snapshot.models if m.wanted), key=_urgency):  # 3
        if places > 0:
            places -= 1
            actions.append(Start(model.alias))  # 4
            continue
        someone_waits = True
        if promised > 0:
            promised -= 1  # 5
        elif idle and (model.first_key is not None or model.asked):
            actions.append(Retire(idle.pop(0).alias, UnloadReason.EVICTED))  # 6
        # 7
    return Decision(actions=tuple(actions), look_again_at=look_again_at, someone_waits=someone_waits)


def _urgency(model: ModelSnapshot) -> tuple[int, float]:
    """Sorts by who is to be loaded first; stable, so equal ones stay in the order of the file."""
    if model.first_key is not None:
        return (0, model.first_key)
    return (1, 0.0) if model.asked else (2, 0.0)
