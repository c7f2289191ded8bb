"""The last lines a llama-server wrote: what an error says of it."""

from collections import deque

import attrs

from trio_router.telemetry.ring import Ring

MAX_LINE_BYTES = 4096
MAX_LINES = 200


@attrs.define(eq=False)
class LogTail:
    """The last `MAX_LINES` lines, each cut at `MAX_LINE_BYTES`: memory is bounded whatever is written.

    A line is kept as it was written, less control characters; a flood without a newline costs one line.
    """

    lines: deque[str] = attrs.field(factory=lambda: deque(maxlen=MAX_LINES))
    written: int = 0
    """Lines seen in all; `written - len(lines)` have been forgotten."""
    journal: Ring[str] | None = None
    """Takes every line too: it outlives this one, and can be followed."""
    _partial: bytes = b""
    _overlong: bool = False

    def feed(self, data: bytes) -> list[str]:
        """Take bytes as they come; return the lines they completed."""
        *complete, rest = data.split(b"\n")
        done = []
        for piece in complete:
            if not self._overlong:
                done.append(self._keep(self._partial + piece))
            self._partial, self._overlong = b"", False
        if not self._overlong:
            self._partial += rest
            if len(self._partial) > MAX_LINE_BYTES:
                done.append(self._keep(self._partial))
                self._partial, self._overlong = b"", True
        return done

    def close(self) -> list[str]:
        """The stream ended: what stood without a newline is a line too."""
        return self.feed(b"\n") if self._partial else []

    def _keep(self, raw: bytes) -> str:
        text = raw[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip("\r")
        line = text if text.isprintable() else "".join(c for c in text if c == "\t" or c.isprintable())
        self.lines.append(line)
        self.written += 1
        if self.journal is not None:
            self.journal.append(line)
        return line

    def last(self, count: int) -> str:
        """The last `count` lines that say something, joined by newlines."""
        return "\n".join([line for line in self.lines if line.strip()][-count:])
