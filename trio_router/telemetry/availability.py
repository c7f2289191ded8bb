"""For how much of the last hour a model that was wanted in memory was there."""

from collections import deque

import attrs

WINDOW_SECONDS = 3600.0
MAX_CHANGES = 1000
"""Changes kept; a model that changes more often than that in an hour is judged by a shorter time."""


@attrs.define(eq=False)
class Availability:
    """When one model was up, when it was down, and when nobody wanted it (which counts as neither)."""

    _changes: deque[tuple[float, bool | None]] = attrs.field(factory=lambda: deque(maxlen=MAX_CHANGES))
    """Since when it was up (True), down (False) or not wanted (None), in order."""

    def mark(self, now: float, *, up: bool | None) -> None:
        """From now on it is so."""
        if not self._changes or self._changes[-1][1] is not up:
            self._changes.append((now, up))
        while len(self._changes) > 1 and self._changes[1][0] <= now - WINDOW_SECONDS:
            self._changes.popleft()

    def percentage(self, now: float) -> float:
        """Of the time it was wanted in the last hour, how much it was up: 0 to 100; 100 when it was never wanted."""
        seconds = {True: 0.0, False: 0.0, None: 0.0}
        oldest, until = now - WINDOW_SECONDS, now
        for since, up in reversed(self._changes):
            seconds[up] += max(0.0, until - max(since, oldest))
            until = since
            if since <= oldest:
                break
        wanted = seconds[True] + seconds[False]
        return round(100.0 * seconds[True] / wanted, 3) if wanted else 100.0
