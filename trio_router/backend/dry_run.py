"""Have a llama-server say what a model would take, and end it before it takes that.

With `-lv 4` it says so 0.2 to 0.4 s after its start, from the header of the file, at no cost but the driver's own. Which
that is shows meanwhile: it is stopped (SIGSTOP) at that line, for as long as it takes to look at the devices.

One that says nothing of the kind, because it is older or newer than what we know, is ended when it begins to load, or
after `PATIENCE_SECONDS`.
"""

import signal
from collections.abc import Awaitable, Callable
from typing import Final

import attrs
import trio

from trio_router.backend.fit import SILENT
from trio_router.backend.launch import Launcher, LaunchFailed
from trio_router.config.flags import flag_name
from trio_router.config.schema import ModelConfig
from trio_router.memory.projection import Projection, StartLog

PATIENCE_SECONDS: Final = 20.0
REFUSALS: Final = ("error: invalid argument: ", "error while handling argument ")
"""How llama-server's complaints about its arguments begin (common/arg.cpp)."""


class FlagsRefused(LaunchFailed):
    """Raised when a llama-server does not take the flags it was started with; the message is its own."""


def can_say(model: ModelConfig) -> bool:
    """Whether its flags let it speak at all."""
    return not {flag_name(flag) for flag in model.flags} & SILENT


async def project(
    launcher: Launcher, model: ModelConfig, number: int, look: Callable[[int], Awaitable[None]] | None = None
) -> Projection | None:
    """What `model` would take; None if its llama-server did not say. `look` is called with its pid once it has said it.

    Raises LaunchFailed, FlagsRefused. Cancellation ends the process too.
    """
    process, address = launcher.launch_to_project(model, number)
    listener = _Listener()
    process.hear = listener.hear
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.read_log_until_stopped, model.alias)
        try:
            async with trio.open_nursery() as life:

                async def exit_ends_it() -> None:
                    await process.wait()
                    life.cancel_scope.cancel()

                life.start_soon(exit_ends_it)
                with trio.move_on_after(PATIENCE_SECONDS):
                    await listener.done.wait()
                process.signal(signal.SIGSTOP)
                if look is not None and listener.said.projection is not None:
                    await look(process.pid)
                life.cancel_scope.cancel()
        finally:
            await process.stop_within(0)
            address.remove()
    if listener.refusal is not None:
        raise FlagsRefused(listener.refusal)
    return listener.said.projection


@attrs.define(eq=False)
class _Listener:
    said: StartLog = attrs.field(factory=StartLog)
    refusal: str | None = None
    done: trio.Event = attrs.field(factory=trio.Event)

    def hear(self, line: str) -> None:
        self.said.hear(line)
        if self.refusal is None and line.startswith(REFUSALS):
            self.refusal = line.strip()
        if self.said.projection is not None or self.said.loads:
            self.done.set()
