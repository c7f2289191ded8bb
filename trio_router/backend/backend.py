"""One incarnation of a model: the llama-server that runs now, and its slots."""

import math
from pathlib import Path

import attrs
import trio

from trio_router.backend.address import Address
from trio_router.backend.client import BackendClient
from trio_router.backend.connection import Connection
from trio_router.backend.logtail import LogTail


@attrs.define(eq=False)
class Slot:
    """One parallel sequence of a backend, and the connection that whoever leases it uses."""

    backend: "Backend"
    index: int
    connection: Connection | None = None

    async def connect(self) -> Connection:
        """A connection that can carry a request: the kept one if it still can. Raises BackendLost."""
        if self.connection is not None and self.connection.reusable:
            return self.connection
        self.disconnect()
        self.connection = await Connection.open(self.backend.address)
        self.connection.patience_seconds = self.backend.patience_seconds
        return self.connection

    def disconnect(self) -> None:
        """Close the connection; a request that is running on it gets a BackendLost."""
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
    model_file: Path
    patience_seconds: float = math.inf
    """Longest silence in the middle of a request."""
    slots: tuple[Slot, ...] = ()
    lost: str | None = None
    """Why it is gone, once it is."""
    unloaded: bool = False
    """Whether it was us who ended it."""
    gone: trio.Event = attrs.field(factory=trio.Event)
    """Set once it is."""

    def open_slots(self, count: int) -> None:
        """Make the slots; once."""
        self.slots = tuple(Slot(self, index) for index in range(count))

    def lose(self, why: str, *, wanted: bool = False) -> None:
        """It is gone, or about to be, by our own doing if `wanted`: end every exchange that still runs."""
        if self.lost is None:
            self.lost, self.unloaded = why, wanted
            self.gone.set()
        for slot in self.slots:
            slot.disconnect()
