"""`/v1/models/{alias}/logs`: what a model's llama-servers wrote, and what they write.

Only so much is kept, so a follower that reads more slowly than a llama-server writes misses lines; it is told how
many. It follows the model, not one llama-server: lines that begin with `---` say where one ended and the next began.
"""

from collections.abc import Sequence
from typing import Final

import attrs
import trio
from quart import Request, Response, g, request
from quart_trio import QuartTrio

from trio_router.fleet.registry import Registry
from trio_router.telemetry.ring import Ring
from trio_router.web.query import count
from trio_router.web.sse import (
    BOOT,
    HEARTBEAT_SECONDS,
    PIECE_BYTES,
    RETRY,
    Source,
    event_bytes,
    resume_position,
    stream_response,
)

DEFAULT_LINES: Final = 100
PLAIN: Final = "text/plain; charset=utf-8"


@attrs.define(eq=False, kw_only=True)
class Follower:
    """Somebody's place in a journal."""

    journal: Ring[str]
    position: int

    async def next_lines(self) -> tuple[int, list[str]]:
        """How many lines were missed, and those after them; no lines when nothing is to come."""
        await self.journal.until_after(self.position)
        missed = max(0, self.journal.forgotten - self.position)
        lines = self.journal.after(self.position, PIECE_BYTES)
        self.position += missed + len(lines)
        return missed, lines


@attrs.define(eq=False)
class PlainLines:
    """Lines as they are."""

    _follower: Follower

    async def receive(self) -> bytes:
        """The next lines; b"" at the end."""
        missed, lines = await self._follower.next_lines()
        note = [f"--- {missed} lines missed ---"] if missed else []
        return text([*note, *lines])


@attrs.define(eq=False)
class LineEvents:
    """An event without a name for each line, `missed` where some were, `heartbeat` when it is quiet."""

    _follower: Follower
    _begun: bool = False

    async def receive(self) -> bytes:
        """The next events; b"" at the end."""
        if not self._begun:
            self._begun = True
            return RETRY
        missed, lines = 0, list[str]()
        with trio.move_on_after(HEARTBEAT_SECONDS) as quiet:
            missed, lines = await self._follower.next_lines()
        position = self._follower.position
        if quiet.cancelled_caught:
            return event_bytes("heartbeat", f"{BOOT}-{position}", "{}")
        before = position - len(lines)
        note = event_bytes("missed", f"{BOOT}-{before}", f'{{"lines": {missed}}}') if missed else b""
        return note + b"".join(
            event_bytes("message", f"{BOOT}-{number}", line) for number, line in enumerate(lines, before + 1)
        )


def text(lines: Sequence[str]) -> bytes:
    """Lines, each ended."""
    return "".join(f"{line}\n" for line in lines).encode()


def followed(incoming: Request, journal: Ring[str], lines: int) -> tuple[Source, str]:
    """What follows `journal` in the way that was asked for, and its content type."""
    position = max(journal.forgotten, journal.written - lines)
    if "text/event-stream" not in incoming.headers.get("Accept", ""):
        return PlainLines(Follower(journal=journal, position=position)), PLAIN
    resumed = resume_position(incoming.headers.get("Last-Event-ID"), BOOT, journal)
    position = position if resumed is None else resumed
    return LineEvents(Follower(journal=journal, position=position)), "text/event-stream"


def add_routes(app: QuartTrio, registry: Registry) -> None:
    """Add them to `app`."""

    @app.get("/v1/models/<path:alias>/logs")
    async def logs(alias: str) -> Response:
        model = registry.model(alias)
        if g.holder is not None:  # it may hold what others said
            g.holder.check_model(model.alias, alias)
        journal = model.supervisor.journal
        lines = count("lines", request.args.get("lines"), default=DEFAULT_LINES, at_most=journal.max_items)
        if request.args.get("follow", "0").strip().lower() in {"", "1", "true", "yes", "on"}:
            response = stream_response(*followed(request, journal, lines))
        else:
            response = Response(text(journal.last(lines)), content_type=PLAIN)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response
