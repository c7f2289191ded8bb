"""The models in memory: each is a task, from its start until its llama-server is gone.

Decides nothing: `Registry.run` says who comes and who leaves.

*Resource handling.* The tasks run in one nursery; cancelling that cancels them, side by side, and each ends its
llama-server.
"""

import math
from collections.abc import Callable

import attrs
import trio

from trio_router.backend.lifecycle import Move, State
from trio_router.errors import BackendUnavailable
from trio_router.fleet.model import Model
from trio_router.memory.ledger import Ledger
from trio_router.memory.room import Spot
from trio_router.telemetry.events import Events, Unloaded, UnloadReason


@attrs.define(eq=False, kw_only=True)
class Residents:
    """Brings models into memory and out of it."""

    nursery: trio.Nursery
    ledger: Ledger
    events: Events
    left: Callable[[Model], None]
    """Told when a model's llama-server is gone, before those who wait for that."""

    def start(self, model: Model, spot: Spot) -> None:
        """Begin to load a model that is not in memory; `spot` is reserved for it."""
        model.supervisor.spot = spot
        grows = 0 if model.footprint is None else model.footprint.growth_bytes
        self.ledger.reserve(model.alias, spot, model.seen, known=model.footprint is not None, growth=grows)
        model.scope = trio.CancelScope()
        model.retiring, model.cut, model.was_ready, model.keep_seconds = None, False, False, None
        model.residency += 1
        model.heir = model.behind = model.told_at = None
        model.supervisor.move(Move.SPAWN)  # from here on it is resident: the next decision must see it
        self.nursery.start_soon(self._reside, model, model.scope, name=f"supervisor[{model.alias}]")

    async def _reside(self, model: Model, scope: trio.CancelScope) -> None:
        """A model's time in memory."""
        try:
            with scope:
                await model.supervisor.run()
        finally:
            reason = model.retiring
            failed = model.gone() or model.state is State.FAILED
            if reason is None:
                reason = UnloadReason.FAILED if failed else UnloadReason.SHUTDOWN
            model.scope = model.retiring = None
            self.ledger.left(model.alias, model.seen, trio.current_time())
            self.left(model)
            model.renew()
            stopped = None if model.told_at is None else trio.current_time() - model.told_at
            self.events.emit(Unloaded(alias=model.alias, reason=reason, seconds=stopped))
            model.settle()

    def retire(self, model: Model, reason: UnloadReason, *, cut: bool = False, drain_seconds: float = math.inf) -> None:
        """Begin to unload a model, when its requests have ended or `drain_seconds` are over, or at once if `cut`.

        One that is on its way out already is only hurried if `cut`; for one that is not in memory, that is settled.
        """
        if not model.state.resident or model.scope is None:
            model.settle()
            return
        if model.retiring is None:
            model.retiring = reason
            self.ledger.leaving(model.alias)
            if reason is UnloadReason.EJECTED:
                model.refuse_askers(BackendUnavailable(f"model {model.alias!r} was ejected", param="model"))
            model.scheduler.close()
            if model.state is not State.STOPPING:
                model.supervisor.move(Move.STOP)
            self.nursery.start_soon(self._drain, model, model.scope, drain_seconds)
        if cut and not model.cut:
            model.cut = True
            self._cut(model, model.scope)

    async def _drain(self, model: Model, scope: trio.CancelScope, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await model.scheduler.until_no_lease()
        self._cut(model, scope)

    def _cut(self, model: Model, scope: trio.CancelScope) -> None:
        if model.scope is not scope:  # it left by itself while it drained, and may be back already
            return
        if model.supervisor.backend is not None:
            model.supervisor.backend.lose("it was unloaded", wanted=True)
        model.told_at = trio.current_time()
        scope.cancel()
