"""Server-sent events: one rendering for all who read, resumed where they stopped.

A `Hub` renders each event once, when it happens, and keeps it in a ring; a `Reader` is a position in that ring. An
event's id is `<boot>-<n>`: `n` counts the events of this hub, `boot` is of this process, so that an id from before a
restart is not taken for one of ours. Who comes without an id, or with one we cannot resume from, gets an *opening*
event first, which holds everything that is true at the position its id names; then what came after that, once and
in order.

A reader that falls too far behind is dropped: its stream ends, its client connects again with the id of the last
event it has, and goes on from there. That is decided when it could take more: until then it holds its position and
the one piece under way, whatever happens.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, Self

import attrs
import structlog
import trio
from quart import Response, request
from quart.wrappers.response import ResponseBody

from trio_router.telemetry.ring import Ring

RETRY: Final = b"retry: 2000\n\n"
"""The first bytes of every stream: how many milliseconds a client waits before it connects again."""
HEARTBEAT_SECONDS: Final = 15.0
PIECE_BYTES: Final = 64 * 1024
"""How much is handed out at once."""
EVENT_ID = re.compile(r"([0-9a-f]+)-(0|[1-9][0-9]{0,17})")

BOOT: Final = secrets.token_hex(4)
"""Tells the ids of this process from those of others."""

log = structlog.get_logger("trio_router.web")


def event_bytes(name: str, event_id: str, data: str) -> bytes:
    """One event. `data` may be of several lines."""
    lines = "".join(f"data: {line}\n" for line in data.split("\n"))
    return f"id: {event_id}\nevent: {name}\n{lines}\n".encode()


def resume_position(last_event_id: str | None, boot: str, ring: Ring[Any]) -> int | None:
    """The position that `Last-Event-ID` names, if it is one of `boot`'s that `ring` can go on from."""
    found = None if last_event_id is None else EVENT_ID.fullmatch(last_event_id.strip())
    if found is None or found[1] != boot:
        return None
    position = int(found[2])
    return position if ring.forgotten <= position <= ring.written else None


@attrs.frozen(kw_only=True)
class HubStatistics:
    """What stands in a hub at one moment."""

    readers: int
    written: int
    renderings: int
    """How often an object was made into text; what many readers do not make more of."""
    dropped: int
    """Readers that were too slow."""


@attrs.define(eq=False, kw_only=True)
class Hub:
    """The events of one stream."""

    opening: Callable[[], tuple[str, Any]]
    """The event for who begins: its name and its data."""
    joining: Callable[[], None] = attrs.field(default=lambda: None)
    """Called before the first reader comes: the chance to publish what was not worth it while nobody read."""
    opening_seconds: float = 1.0
    """How long a rendered opening is good for others, as long as nothing else happens."""
    max_behind: int = 1024
    """How many events a reader may be behind; half of what is kept, so that one who is dropped can resume."""
    boot: str = BOOT
    ring: Ring[bytes] = attrs.field(factory=lambda: Ring(max_items=2048, max_bytes=8 * 1024 * 1024))
    readers: int = 0
    renderings: int = 0
    dropped: int = 0
    _opened: tuple[int, float, bytes] = (-1, 0.0, b"")
    """The opening that was rendered last, its position and its time."""
    _read: trio.Event = attrs.field(factory=trio.Event)

    def statistics(self) -> HubStatistics:
        """A snapshot, for tests and logs."""
        return HubStatistics(
            readers=self.readers, written=self.ring.written, renderings=self.renderings, dropped=self.dropped
        )

    def publish(self, name: str, data: Any, *, opens: bool = False) -> None:
        """An event for all readers, as `data` is now; one that `opens` is what an opening would be now, too."""
        rendered = self._render(name, self.ring.written + 1, data)
        self.ring.append(rendered)
        if opens:
            self._opened = (self.ring.written, trio.current_time(), rendered)

    def close(self) -> None:
        """End every stream, now and from now on, once it has what was published."""
        self.ring.close()

    async def until_read(self) -> None:
        """Return when there is a reader."""
        while not self.readers:
            await self._read.wait()

    async def beat(self) -> None:
        """Tell readers that we are alive, as long as there are any. Runs until cancelled."""
        while True:
            await self.until_read()
            await trio.sleep(HEARTBEAT_SECONDS)
            if self.readers:
                self.publish("heartbeat", {"boot": self.boot, "readers": self.readers})

    @contextmanager
    def reader(self, last_event_id: str | None) -> Iterator["Reader"]:
        """A stream that begins now, or goes on after `last_event_id`."""
        if not self.readers:
            self.joining()
        position = resume_position(last_event_id, self.boot, self.ring)
        first = RETRY
        if position is None:
            position = self.ring.written
            first += self._open()
        self.readers += 1
        self._read.set()
        try:
            yield Reader(self, position, first, self.max_behind + self.ring.written - position)
        finally:
            self.readers -= 1
            if not self.readers:
                self._read = trio.Event()

    def _open(self) -> bytes:
        position, rendered_at, rendered = self._opened
        now = trio.current_time()
        if position != self.ring.written or now - rendered_at > self.opening_seconds:
            name, data = self.opening()
            rendered = self._render(name, self.ring.written, data)
            self._opened = (self.ring.written, now, rendered)
        return rendered

    def _render(self, name: str, number: int, data: Any) -> bytes:
        self.renderings += 1
        return event_bytes(name, f"{self.boot}-{number}", json.dumps(data, ensure_ascii=False))


class Source(Protocol):
    """Where the bytes of a stream come from."""

    async def receive(self) -> bytes:
        """The next bytes; b"" at the end."""


@attrs.define(eq=False)
class Reader:
    """One client's place in a hub."""

    hub: Hub
    position: int
    _first: bytes
    _may_be_behind: int

    async def receive(self) -> bytes:
        """The next events; b"" when the hub is closed, or the reader too slow."""
        if self._first:
            first, self._first = self._first, b""
            return first
        ring = self.hub.ring
        await ring.until_after(self.position)
        behind = ring.written - self.position
        if behind > self._may_be_behind or self.position < ring.forgotten:
            self.hub.dropped += 1
            log.info("slow reader dropped", behind=behind, may_be_behind=self._may_be_behind)
            return b""
        events = ring.after(self.position, PIECE_BYTES)
        self.position += len(events)
        if self.position == ring.written:
            self._may_be_behind = self.hub.max_behind  # it has caught up: what it missed before it came counts no more
        return b"".join(events)


class StreamBody(ResponseBody):
    """A source's bytes as they come, an answer's or a stream's. What it borrowed belongs to the request's stack."""

    def __init__(self, source: Source) -> None:
        self._source = source

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Not a generator: one that a broken send leaves behind would be the garbage collector's to end."""
        piece = await self._source.receive()
        if not piece:
            raise StopAsyncIteration
        return piece


def stream_response(source: Source, content_type: str = "text/event-stream") -> Response:
    """An answer to the request at hand that goes on until its source ends or its client leaves; to HEAD its head."""
    response = Response(b"" if request.method == "HEAD" else StreamBody(source), content_type=content_type)
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    response.timeout = None
    return response
