"""Reads server-sent events as a browser would."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import httpx


@attrs.frozen
class ServerEvent:
    """One event."""

    id: str
    name: str
    text: str

    @property
    def data(self) -> dict[str, Any]:
        """`text` as JSON."""
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def number(self) -> int:
        """What the id counts."""
        return int(self.id.rpartition("-")[2])


class EventReader:
    """The events of one answer, as they come."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self.retry: int | None = None
        self.events: list[ServerEvent] = []
        self._events = self._read()

    def _read(self) -> Iterator[ServerEvent]:
        fields: dict[str, list[str]] = {}
        for line in self.answer.iter_lines():
            if not line:
                if "data" in fields:
                    event = fields.get("event", ["message"])[-1]
                    yield ServerEvent(fields.get("id", [""])[-1], event, "\n".join(fields["data"]))
                fields = {}
                continue
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "retry":
                self.retry = int(value)
            fields.setdefault(name, []).append(value)

    def next(self) -> ServerEvent:
        """The next event; the client's own timeout is the patience."""
        event = next(self._events)
        self.events.append(event)
        return event

    def until(self, wanted: Callable[[ServerEvent], bool]) -> list[ServerEvent]:
        """What comes up to the first event that is wanted, that one included."""
        found = [self.next()]
        while not wanted(found[-1]):
            found.append(self.next())
        return found

    def rest(self) -> list[ServerEvent]:
        """What comes until the stream ends as it should."""
        found = list(self._events)
        self.events += found
        return found
