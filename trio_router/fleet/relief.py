"""What is done for a model whose load failed for memory, so that the next try has a better chance.

1. First it counts as larger than it was thought to be, by `RAISE`, if that leaves it a chance; an idle model leaves for
   it, whatever the numbers say; and when that has left it is tried again.
2. Then the steps of `models.<alias>.on_oom` are taken, one for each further failure. What was changed is told in the
   model's status for as long as it goes by that; its own flags hold again when it is loaded the next time.
3. When none is left, it has failed.

A load that succeeds begins this anew. That it counts as larger holds until it was measured.
"""

from typing import Final

import attrs
import trio

from trio_router.config.schema import ModelConfig
from trio_router.memory.footprint import Footprint
from trio_router.memory.lighter import Lighter, lighter

RAISE: Final = 1.15


@attrs.define(eq=False)
class Relief:
    """One model's."""

    crowded: bool = False
    """Somebody idle is to leave before it is tried again."""
    patient: bool = False
    """Somebody leaves for it, and it is not tried again before that one has left."""
    adjusted: tuple[str, ...] = ()
    """How it differs from what router.toml says, in words."""
    own: ModelConfig | None = None
    """What router.toml says, while it differs from that."""
    again: bool = False
    """It leaves memory only to be placed anew."""
    _factor: float = 1.0
    _raised: Footprint | None = None
    """What was raised by it."""
    _raised_once: bool = False
    _taken: int = 0
    """How many steps of `on_oom`."""

    def factor(self, footprint: Footprint | None) -> float:
        """What a footprint is to be multiplied by; 1 for another one than that which was too small."""
        return self._factor if footprint is self._raised else 1.0

    async def next(self, model: ModelConfig, footprint: Footprint | None) -> ModelConfig | None:
        """With what it is tried again: `model`, or a lighter one; None if nothing is left to be tried."""
        if not self._raised_once:
            self._raised_once = self.crowded = True
            self._factor, self._raised = RAISE, footprint
            return model  # 1
        while self._taken < len(model.on_oom):
            step = model.on_oom[self._taken]
            self._taken += 1
            made: Lighter | None = await trio.to_thread.run_sync(lighter, model, step, abandon_on_cancel=True)
            if made is not None:
                self.own = self.own or model
                self.adjusted = (*self.adjusted, made.change)
                return made.model  # 2
        return None  # 3

    def somebody_leaves(self) -> None:
        """For it: it waits for that, if memory was too short."""
        self.patient = self.patient or self.crowded
        self.crowded = False

    def ready(self) -> None:
        """It could be loaded."""
        self._raised_once = self.crowded = self.patient = False
        self._taken = 0

    def over(self) -> ModelConfig | None:
        """It left memory for good: what it goes by from now on, if that is another than before."""
        own, self.own = self.own, None
        self.adjusted = ()
        self.ready()
        return own
