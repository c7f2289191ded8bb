"""An answer that may begin before there is one, behind Quart: `web.waiting_streams` for the other way in.

*Resource handling.* A task holds the exchange, from its admission until the request's stack is unwound.

*Error handling.* What goes wrong before the answer begins is raised by `begin`; afterwards it is an event.
"""

from contextlib import AsyncExitStack

import attrs
import structlog
import trio

from trio_router.errors import InternalError, RouterError
from trio_router.web.error_events import error_event
from trio_router.web.inference import Exchange
from trio_router.web.relay import Answer
from trio_router.web.waiting_streams import Waiting, WaitingStreams

log = structlog.get_logger("trio_router.web")


@attrs.define(eq=False)
class LateAnswer:
    """The source of a stream that began with comments."""

    exchange: Exchange
    position: int = 0
    """Where it stood when it arrived."""
    _said: list[bytes] = attrs.field(factory=list)
    _outcome: Answer | Exception | None = None
    _over: bool = False
    _news: trio.Event = attrs.field(factory=trio.Event)

    async def begin(self, stack: AsyncExitStack, waiting_streams: WaitingStreams) -> Answer | None:
        """The answer, or None when there is something to say before it. Raises what the exchange does."""
        self.exchange.waiting_streams, self.exchange.say = waiting_streams, self._say
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        nursery.start_soon(self._hold)
        await self._news.wait()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return None if self._said else self._outcome

    async def _hold(self) -> None:
        try:
            async with self.exchange as answer:
                self._tell(answer)
                await trio.sleep_forever()
        except Exception as error:  # noqa: BLE001  (raised where the request is)
            self._tell(error)

    def _tell(self, outcome: Answer | Exception) -> None:
        self._outcome = outcome
        self._news.set()

    def _say(self, waiting: Waiting, events: bytes) -> None:
        self.position = waiting.ticket.position
        if not self._said:  # else its client has yet to take what was said before
            self._said.append(events)
            self._news.set()

    async def receive(self) -> bytes:
        """The next bytes, b"" at the end."""
        while True:
            if self._over:
                return b""
            if self._said:
                return self._said.pop()
            match self._outcome:
                case None:
                    self._news = trio.Event()
                    await self._news.wait()
                case Answer(is_stream=True):
                    return await self._outcome.receive()
                case Answer():
                    self._over = True
                    return await self._outcome.as_event()
                case RouterError():
                    self._over = True
                    return error_event(self.exchange.asked.path, self._outcome, cut=False)
                case _:
                    self._over = True
                    log.error("internal error", id=self.exchange.request_id, exc_info=self._outcome)
                    bug = InternalError("an internal error; the router's log says more")
                    return error_event(self.exchange.asked.path, bug, cut=False)
