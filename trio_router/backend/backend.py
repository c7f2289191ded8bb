"""One incarnation of a model: the llama-server that runs now, and its slots."""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import attrs
import trio

from trio_router.backend.address import Address
from trio_router.backend.client import BackendClient
from trio_router.backend.connection import BackendLost, Connection
from trio_router.backend.conversation import Conversation
from trio_router.backend.logtail import LogTail
from trio_router.backend.process import is_exiting

COMPUTE_ERROR = b'"message":"Compute error."'
"""As no text of a model can stand in an answer: its quotes would be escaped."""
COMPUTE_ERRORS = 3
"""llama-server's decode failed this often without one success between: it is broken, not a request."""
ENDING: Final = "its llama-server ended"
"""Why a backend is lost whose process has ended by itself, or has begun to."""


@attrs.define(eq=False)
class Slot:
    """One parallel sequence of a backend, and the connection that whoever leases it uses."""

    backend: "Backend"
    index: int
    connection: Connection | None = None
    since: float = 0.0
    """Trio time at which it was leased last."""
    holds: Conversation | None = None
    """What it was given last, if that is known."""
    _cuts: int = 0
    """How often it was told to disconnect: a connection that is still being made has to know."""

    async def connect(self) -> Connection:
        """A connection that can carry a request: the kept one if it still can. Raises BackendLost."""
        if self.connection is not None and self.connection.reusable:
            return self.connection
        self.disconnect()
        cuts = self._cuts
        try:
            connection = await Connection.open(self.backend.address)
        except BackendLost:
            if self.backend.address.is_gone:
                self.backend.condemn("its socket was removed")
            raise
        if self._cuts != cuts:
            connection.close()
            raise BackendLost("the connection was ended while it was made")
        self.connection = connection
        self.connection.patience_seconds = self.backend.patience_seconds
        return self.connection

    def disconnect(self) -> None:
        """Close the connection; a request that is running on it, or that connects, gets a BackendLost."""
        self._cuts += 1
        if self.connection is not None:
            self.connection.close()
            self.connection = None


@attrs.define(eq=False, kw_only=True)
class Backend:
    """A llama-server that answered `/health` with 200."""

    alias: str
    incarnation: int
    address: Address
    pid: int
    tail: LogTail
    client: BackendClient
    context: int | None = None
    """Tokens of one slot, as llama-server said."""
    longest: int | None = None
    """Tokens of an answer at most, as its flags say; it does not say that itself."""
    model_file: Path
    patience_seconds: float = math.inf
    """Longest silence in the middle of a request."""
    slots: tuple[Slot, ...] = ()
    genuine: bool = False
    """Whether it says which build of llama.cpp it is: what stands in its place gets requests as they came."""
    pins: bool = False
    """Whether its slots are ours, number by number: a request can be told which one to use."""
    lost: str | None = None
    """Why it is gone, once it is."""
    unloaded: bool = False
    """Whether it was us who ended it."""
    gone: trio.Event = attrs.field(factory=trio.Event)
    """Set once it is."""
    aboard: int = 0
    """How many requests ran when it was lost."""
    unstoppable: set[str] = attrs.field(factory=set)
    """Kinds of requests whose whole answers could not be put together from its streams (`web.stoppable`)."""
    beginning: set[str] = attrs.field(factory=set)
    """Paths on which it did not go on with what it had said (`web.continuing`)."""
    compute_errors: int = 0
    """Answers in a row that said that it cannot compute."""
    _forsaken: tuple["trio.MemorySendChannel[Forsaken]", "trio.MemoryReceiveChannel[Forsaken]"] = attrs.field(
        factory=lambda: trio.open_memory_channel["Forsaken"](math.inf)
    )
    _attended: bool = False
    """Whether `attend_forsaken` runs."""
    _illness: str | None = None
    _ill: trio.Event = attrs.field(factory=trio.Event)

    def allow_silence(self, seconds: float) -> None:
        """So long may it be silent from now on, also while requests run."""
        self.patience_seconds = seconds
        for slot in self.slots:
            if slot.connection is not None:
                slot.connection.patience_seconds = seconds

    def heard(self) -> bool:
        """Whether it said something since the last time, or nobody waits for it to."""
        connections = [slot.connection for slot in self.slots if slot.connection is not None]
        spoke = any(connection.spoke for connection in connections)
        for connection in connections:
            connection.spoke = False
        return spoke or not any(connection.awaited for connection in connections)

    def answered(self, end: bytes) -> bool:
        """A whole answer came, which ended so; whether that proves that it works.

        `COMPUTE_ERRORS` in a row that say that it cannot compute, and it is to be replaced.
        """
        if COMPUTE_ERROR not in end:
            self.compute_errors = 0
            return True
        self.compute_errors += 1
        if self.compute_errors >= COMPUTE_ERRORS:
            self.condemn(f"llama-server answered 'Compute error.' {self.compute_errors} times in a row")
        return False

    def look_for_its_end(self) -> None:
        """A connection broke: if the process has begun to end, nobody is to wait until that is done."""
        if self.lost is None and is_exiting(self.pid):
            self.condemn(ENDING)

    def condemn(self, why: str) -> None:
        """Have it replaced."""
        if self._illness is None:
            self._illness = why
            self._ill.set()

    async def until_condemned(self) -> str:
        """Return why it is to be replaced, once it is."""
        await self._ill.wait()
        return self._illness or ""

    def forsake(self, slot: Slot, let_go: Callable[[], None]) -> bool:
        """Nobody waits any more for what runs on `slot`: `let_go` is called once llama-server does not work on it, either.

        False if that is not told: the slot's connection is closed then, and it may be used again at once.
        """
        connection = slot.connection
        if self._attended and self.genuine and self.lost is None and connection is not None and not connection.closed:
            self._forsaken[0].send_nowait((slot, connection, let_go))
            return True
        slot.disconnect()
        return False

    async def attend_forsaken(self) -> None:
        """See what becomes of requests that nobody waits for, until cancelled.

        llama-server computes many of them to their end if it computes for others beside (`web.stoppable`): a request that
        was sent to their slot meanwhile would wait there, out of its turn.
        """
        self._attended = True
        try:
            async with trio.open_nursery() as nursery:
                async for slot, connection, let_go in self._forsaken[1]:
                    nursery.start_soon(_until_let_go, slot, connection, let_go)
        finally:
            self._attended = False
            with suppress(trio.WouldBlock):
                while True:
                    _, connection, _ = self._forsaken[1].receive_nowait()
                    connection.close()

    def open_slots(self, count: int) -> None:
        """Make the slots; once."""
        self.slots = tuple(Slot(self, index) for index in range(count))

    def lose(self, why: str, *, wanted: bool = False) -> None:
        """It is gone, or about to be, by our own doing if `wanted`: end every exchange that still runs."""
        if self.lost is None:
            self.lost, self.unloaded = why, wanted
            self.gone.set()
        for slot in self.slots:
            if slot.connection is not None and not wanted:
                slot.connection.salvage()
            slot.disconnect()


Forsaken = tuple[Slot, Connection, Callable[[], None]]


async def _until_let_go(slot: Slot, connection: Connection, let_go: Callable[[], None]) -> None:
    await connection.until_let_go()
    if slot.connection is connection:
        slot.connection = None
    let_go()
