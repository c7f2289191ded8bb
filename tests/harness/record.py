"""Reads what a fake llama-server wrote with `--fake-record`."""

import json
from pathlib import Path
from typing import Any

import attrs

from tests.harness.processes import wait_until

Line = dict[str, Any]


@attrs.frozen
class Record:
    """One file, which several fake servers may append to; their clocks are the same, CLOCK_MONOTONIC."""

    path: Path

    @property
    def flags(self) -> list[str]:
        """For a model's `flags`."""
        return ["--fake-record", str(self.path)]

    def lines(self, event: str | None = None, **wanted: Any) -> list[Line]:
        """Events so far, in order; of one kind, with these facts."""
        if not self.path.exists():
            return []
        found = [json.loads(line) for line in self.path.read_bytes().splitlines()]
        return [
            line
            for line in found
            if (event is None or line["event"] == event)
            and all(line.get(name) == value for name, value in wanted.items())
        ]

    def wait_for(self, event: str, count: int = 1, *, timeout_seconds: float = 5.0, **wanted: Any) -> list[Line]:
        """The events of one kind, once there are at least `count`."""

        def enough() -> list[Line]:
            found = self.lines(event, **wanted)
            return found if len(found) >= count else []

        return wait_until(enough, timeout_seconds=timeout_seconds, what=f"{count} x {event} {wanted}")

    def tags(self, event: str) -> list[str]:
        """The tags of one kind of event, in order."""
        return [line["tag"] for line in self.lines(event)]

    def most_at_once(self) -> int:
        """The largest number of requests that had a slot at one time."""
        running = most = 0
        for line in self.lines():
            if line["event"] == "started":
                running += 1
            elif line["event"] in {"finished", "cancelled"} and self._had_started(line):
                running -= 1
            most = max(most, running)
        return most

    def _had_started(self, line: Line) -> bool:
        return bool(self.lines("started", pid=line["pid"], number=line["number"]))
