"""A llama-server that is a number: so many seconds until it is ready, and then it is."""

import time
from pathlib import Path
from typing import cast

import attrs
import trio

from trio_router.backend.address import Address
from trio_router.backend.backend import Backend
from trio_router.backend.client import BackendClient
from trio_router.backend.ending import Ending
from trio_router.backend.lifecycle import Move, State
from trio_router.backend.supervisor import Supervisor
from trio_router.telemetry.events import LoadFinished, LoadResult

LOAD_SECONDS = 1.0
"""Where nothing was measured."""


@attrs.define
class LoadTimes:
    """What loads take, by model, and how long llama-servers take to stop."""

    by_model: dict[str, float] = attrs.field(factory=dict)
    usual: float = LOAD_SECONDS
    stop: float = 0.0

    def of(self, alias: str) -> float:
        """Seconds from spawn to ready."""
        return self.by_model.get(alias, self.usual)


def modelled(times: LoadTimes) -> type[Supervisor]:
    """A kind of supervisor whose incarnations are timers."""

    @attrs.define(eq=False, kw_only=True)
    class Modelled(Supervisor):
        """States, gate and events as those of a real one; no process."""

        async def _live(self) -> Ending:
            self.incarnation += 1
            self.started_at, self.ready_at = time.time(), None
            self.loading_since = trio.current_time()
            seconds = times.of(self.model.alias)
            try:
                self.move(Move.ALIVE)
                await trio.sleep(seconds)
                self._open(seconds)
                await trio.sleep_forever()
            finally:
                self.loading_since = None
                if self.backend is not None:
                    self.backend.lose("its llama-server ended")
                    self.gate.closed(self.backend)
                    self.backend = None
                with trio.CancelScope(shield=True):
                    await trio.sleep(times.stop)
            raise AssertionError("only cancellation ends it")

        def _open(self, seconds: float) -> None:
            self.backend = backend = Backend(
                alias=self.model.alias,
                incarnation=self.incarnation,
                address=Address(port=1),
                pid=0,
                tail=self.tail,
                client=cast(BackendClient, None),  # nobody asks
                model_file=Path(),
            )
            backend.open_slots(self.model.slots)
            self.load_seconds, self.loading_since = seconds, None
            self.ready_at = time.time()
            if self.state is State.LOADING:
                self.move(Move.ANSWER)
                self.events.emit(LoadFinished(alias=self.model.alias, result=LoadResult.OK, seconds=seconds))
                self.gate.opened(backend)

    return Modelled
