"""The life of a model, as a table.

A model is `off` until somebody wants it. `starting` lasts from the decision until its llama-server process
exists; `loading` until the process answers `/health` with 200; then it is `ready`. From any of these it may be
told to stop (`stopping`: leases finish, then the process is ended) or die by itself (`crashed`: it is being
restarted, after a pause that grows). A model that used up its attempts is `failed` and stays so until somebody
resets it. A model holds memory in every state but `off` and `failed`: it is *resident*.

There is no transition anywhere else: whoever moves a model asks `after`, which raises for a move that is not
in the table. That is a bug, never a client's doing.
"""

import enum
from collections.abc import Mapping
from types import MappingProxyType


class State(enum.Enum):
    """Where a model is; the values are what users see."""

    OFF = "off"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    CRASHED = "crashed"
    FAILED = "failed"

    @property
    def resident(self) -> bool:
        """Whether the model holds memory, or is about to."""
        return self not in {State.OFF, State.FAILED}


class Move(enum.Enum):
    """What happens to a model."""

    SPAWN = "spawn"
    ALIVE = "alive"
    ANSWER = "answer"
    DIE = "die"
    STOP = "stop"
    GONE = "gone"
    GIVE_UP = "give up"
    RESET = "reset"


TABLE: Mapping[State, Mapping[Move, State]] = MappingProxyType(
    {
        State.OFF: {Move.SPAWN: State.STARTING},
        State.STARTING: {Move.ALIVE: State.LOADING, Move.DIE: State.CRASHED, Move.STOP: State.STOPPING},
        State.LOADING: {Move.ANSWER: State.READY, Move.DIE: State.CRASHED, Move.STOP: State.STOPPING},
        State.READY: {Move.DIE: State.CRASHED, Move.STOP: State.STOPPING},
        State.CRASHED: {Move.SPAWN: State.STARTING, Move.GIVE_UP: State.FAILED, Move.STOP: State.STOPPING},
        State.STOPPING: {Move.GONE: State.OFF},
        State.FAILED: {Move.RESET: State.OFF},
    }
)


def after(state: State, move: Move) -> State:
    """The state `move` leads to. Raises ValueError for a move the table does not have."""
    try:
        return TABLE[state][move]
    except KeyError:
        raise ValueError(f"a model that is {state.value!r} cannot {move.value!r}") from None
