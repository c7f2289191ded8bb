"""How long a request will wait: arithmetic over what was measured.

How long requests held a slot of a model lately has a mean and a spread. Where they are all alike, it is known when
each slot that is busy will be free: when the mean is over, and a mean later again. Where they are not, what a request
has behind it says little of what it has before it (of an exponential time: nothing), and all that counts is how much
work there is and how many slots share it. In between, the estimate is in between, by the squared coefficient of
variation.

Requests of a better priority that come later go first, until the one that waits is old enough. The share of the slots'
time that such requests had of late is taken to be what they will have.

Nothing here waits, looks at a clock, or grows with the number of those who wait.
"""

import math
from collections.abc import Sequence
from typing import Final

import attrs

MAX_RETRY_AFTER_SECONDS: Final = 120
NEWEST: Final = 0.05
"""Share of a new measurement in the mean, once there are many."""
OVERDUE: Final = 0.1
"""A request that has run for longer than the mean is given this share of what it has run to go on."""
LATELY_SECONDS: Final = 60.0
"""What happened that long ago counts 1/e of what happens now, in a priority's share."""
MOST_SHARE: Final = 0.9


@attrs.define(eq=False)
class Pace:
    """How long requests held a slot of one model lately, in seconds."""

    measured: int = 0
    mean: float = 0.0
    variance: float = 0.0
    _held: list[float] = attrs.field(factory=lambda: [0.0, 0.0, 0.0])
    """Seconds of slots by steps below high priority, the less the longer ago."""
    _since: float | None = None
    _at: float = 0.0
    """Times of the first and the last measurement."""

    def add(self, seconds: float, steps: int, now: float) -> None:
        """One more has ended, of a priority so many steps below high."""
        if self._since is None:
            self._since = now - seconds
        fading = math.exp((self._at - now) / LATELY_SECONDS)
        self._held = [held * fading for held in self._held]
        self._held[steps] += seconds
        self._at = now
        self.measured += 1
        share = max(1 / self.measured, NEWEST)
        off = seconds - self.mean
        self.mean += share * off
        self.variance = (1 - share) * (self.variance + share * off * off)

    @property
    def spread(self) -> float:
        """0: all alike, up to 1: the past says nothing of the rest."""
        return min(1.0, self.variance / (self.mean * self.mean)) if self.mean else 0.0

    def share(self, steps: int, slots: int, now: float) -> float:
        """The part of all slots' time that a priority had lately, at most `MOST_SHARE`."""
        if self._since is None or now <= self._since:
            return 0.0
        window = LATELY_SECONDS * (1 - math.exp((self._since - now) / LATELY_SECONDS))
        held = self._held[steps] * math.exp((self._at - now) / LATELY_SECONDS)
        return min(MOST_SHARE, held / (window * slots))


@attrs.define(eq=False)
class LoadPace:
    """How fast models of this router were loaded: says what a load will take that was never measured."""

    seconds: float = 0.0
    size_bytes: int = 0

    def add(self, seconds: float, size_bytes: int | None) -> None:
        """A model of that size was loaded."""
        if size_bytes:
            self.seconds += seconds
            self.size_bytes += size_bytes

    def projected(self, size_bytes: int | None) -> float | None:
        """Seconds for a model of that size; None: nothing is known."""
        return self.seconds * size_bytes / self.size_bytes if size_bytes and self.size_bytes else None


def expected_wait(
    pace: Pace, *, ahead: int, slots: int, elapsed: Sequence[float], opens_in: float | None
) -> float | None:
    """Seconds until a request gets a slot that `ahead` others get one before; None: too little was measured.

    `elapsed` says of each slot that is leased for how long it has been; `opens_in`, when slots can be leased at all.
    """
    if opens_in is None:
        return None
    free = slots - len(elapsed)
    if ahead < free:
        return opens_in
    if not pace.measured:
        return None
    mean, spread = pace.mean, pace.spread
    alike = 1.0 - spread
    left = [alike * _left(mean, seconds) + spread * max(mean, OVERDUE * seconds) for seconds in elapsed]
    left += [mean] * free  # those are for who is ahead
    soonest = min(left)  # who is overdue for longer is passed by the next one in that slot
    left = sorted([min(one, soonest + mean) for one in left])
    before = ahead - free
    rounds, place = divmod(before, slots)
    by_slot = left[place] + rounds * mean
    # the others are still busy then, each with what an observer finds at a random moment
    by_work = (sum(left) + before * mean - (slots - 1) * mean * (1 + spread) / 2) / slots
    return opens_in + alike * by_slot + spread * max(0.0, by_work)


def drained_in(pace: Pace, elapsed: Sequence[float]) -> float | None:
    """Seconds until all requests are done that have run for so long; None: too little was measured."""
    if not elapsed:
        return 0.0
    return max(_left(pace.mean, seconds) for seconds in elapsed) if pace.measured else None


def _left(mean: float, seconds: float) -> float:
    """Of a request that has run for so many, where all are alike; a mean of few may be far too small."""
    return max(mean - seconds, OVERDUE * max(mean, seconds))


def overtaken(seconds: float, share: float, until: float) -> float:
    """How long a wait of `seconds` becomes when others take that share of the slots for the first `until` seconds."""
    return seconds / (1 - share) if seconds <= until * (1 - share) else seconds + until * share


def overtakers(seconds: float, pace: Pace, slots: int) -> int:
    """How many come who take so many seconds more of a wait on all slots.

    They come whole, or not: half of all times no more than these (the median of a Poisson variable, within 0.02 of the
    true bounds: Choi 1994). The mean would be wrong nearly always where it is a part of one.
    """
    return math.floor(seconds * slots / pace.mean + 1 / 3) if pace.mean else 0


def retry_after(seconds: float | None) -> int | None:
    """Whole seconds for `Retry-After`; None: not known."""
    return None if seconds is None else max(1, math.ceil(min(seconds, MAX_RETRY_AFTER_SECONDS)))
