"""Streams that wait are told so, before their clients, or what stands between, give up.

For `system.keepalive_after_sec` a request that asks for a stream gets the status it deserves. If it waits for longer,
its answer begins: 200, the head of a stream, and comments that say where it stands, every `PERIOD_SECONDS` until there
is something of the answer itself. What goes wrong from then on is an event of that stream.

How a way in begins an answer early is its business (`Waiting.say`); one task here tells all who wait, so that a
request that does not wait costs nothing, and one that does an entry in a dictionary.
"""

from collections.abc import Callable
from typing import Final

import attrs
import trio

from trio_router.backend.lifecycle import State
from trio_router.fleet.model import Model
from trio_router.fleet.ticket import Ticket

PERIOD_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 0.25
"""How late somebody may be told."""
STREAMED: Final = frozenset(
    {
        "/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions", "/completion",
        "/v1/responses", "/responses", "/v1/messages", "/infill",
    }
)  # fmt: skip
"""Paths at which `"stream": true` is answered by a stream of events."""
PING: Final = b'event: ping\ndata: {"type": "ping"}\n\n'
"""Anthropic's sign of life; its clients know it."""


@attrs.define(eq=False, kw_only=True)
class Waiting:
    """A stream that waits, from the first time that there was no slot for it until its answer has begun."""

    model: Model
    ticket: Ticket
    endpoint: str
    say: Callable[["Waiting", bytes], None]
    """Sends its client whole events, and the head of the answer before the first ones. Does not wait."""
    due: float
    """Trio time at which it is to be told something."""
    begun: bool = False
    """Whether its client has been told anything."""


@attrs.define(eq=False)
class WaitingStreams:
    """All streams that wait. Both collections are in the order in which they are due."""

    _quiet: dict[Waiting, None] = attrs.field(factory=dict)
    _told: dict[Waiting, None] = attrs.field(factory=dict)
    _some: trio.Event | None = None

    @property
    def attended(self) -> int:
        """How many there are."""
        return len(self._quiet) + len(self._told)

    def attend(self, waiting: Waiting) -> None:
        """There is no slot for it: tell it so, when it is due. Again after it had one that it lost."""
        if not waiting.begun:
            self._quiet[waiting] = None
            if self._some is not None:
                self._some.set()
                self._some = None

    def forget(self, waiting: Waiting) -> None:
        """Its answer has begun, or it waits no longer."""
        self._quiet.pop(waiting, None)
        self._told.pop(waiting, None)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell them, until cancelled."""
        task_status.started()
        while True:
            if not self._quiet and not self._told:
                self._some = trio.Event()
                await self._some.wait()
            await trio.sleep(LOOK_SECONDS)
            self._tell(trio.current_time())

    def _tell(self, now: float) -> None:
        places: dict[str, dict[Ticket, int]] = {}
        for queue in (self._quiet, self._told):
            while queue and (waiting := next(iter(queue))).due <= now:
                del queue[waiting]
                model = waiting.model
                if model.alias not in places:
                    places[model.alias] = model.scheduler.places()
                place = places[model.alias].get(waiting.ticket)
                if place is None and not waiting.begun:  # it has its slot, and comes again if it loses that
                    continue
                waiting.say(waiting, news(model, place, waiting.endpoint))
                waiting.begun = True
                waiting.due = now + PERIOD_SECONDS
                self._told[waiting] = None


def news(model: Model, place: int | None, endpoint: str) -> bytes:
    """What a client is told whose request is at that place in the queue; None: it has a slot."""
    lines = []
    if model.scheduler.backend is None and model.state in {State.STARTING, State.LOADING}:
        progress = model.load_progress
        lines.append(f": loading {model.alias}" + ("" if progress is None else f" {progress}%"))
    lines.append(": running" if place is None else f": queued position={place}")
    comments = "\n".join(lines).encode("ascii") + b"\n\n"
    return comments + PING if endpoint.endswith("/messages") else comments
