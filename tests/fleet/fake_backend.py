"""Incarnations without a server: for what only hands out their slots."""

from pathlib import Path
from typing import cast

from trio_router.backend.address import Address
from trio_router.backend.backend import Backend, Slot
from trio_router.backend.client import BackendClient
from trio_router.backend.connection import Connection
from trio_router.backend.logtail import LogTail


class FakeConnection:
    """A slot's connection that knows whether it was closed."""

    closed = awaited = spoke = False

    def close(self) -> None:
        self.closed = True

    def salvage(self) -> None:
        """It had said nothing."""
        self.close()

    def expire_silent(self, now: float) -> None:
        """It is never silent."""


def connect(slot: Slot) -> FakeConnection:
    """Give the slot a connection."""
    connection = FakeConnection()
    slot.connection = cast("Connection", connection)
    return connection


def backend_of(slots: int, *, incarnation: int = 1) -> Backend:
    """An incarnation of model `a` that is ready."""
    backend = Backend(
        alias="a",
        incarnation=incarnation,
        address=Address(port=incarnation),
        pid=incarnation,
        tail=LogTail(),
        client=cast("BackendClient", None),
        model_file=Path("a.gguf"),
    )
    backend.open_slots(slots)
    return backend
