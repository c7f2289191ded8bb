"""Counts over the last so many seconds, in bounded memory: a ring of buckets, each of them a moment wide."""

from collections import Counter
from collections.abc import Iterator

import attrs


@attrs.define(eq=False, kw_only=True)
class Counts:
    """What ended within one bucket, or within a whole window."""

    requests: int = 0
    succeeded: int = 0
    timed: int = 0
    """Requests whose duration counts: see `Outcome.timed`."""
    seconds: float = 0.0
    """The sum of those durations."""
    first_tokens: int = 0
    """Requests whose time to the first token is known."""
    first_token_seconds: float = 0.0
    """The sum of those times."""
    input_tokens: int = 0
    output_tokens: int = 0
    errors_by_type: Counter[str] = attrs.field(factory=Counter)

    @property
    def errors(self) -> int:
        """Requests that did not end well, for whatever reason."""
        return self.requests - self.succeeded

    @property
    def mean_seconds(self) -> float | None:
        """How long a request took; None when none was timed."""
        return self.seconds / self.timed if self.timed else None

    @property
    def mean_ms(self) -> float | None:
        """The same as people read it."""
        mean = self.mean_seconds
        return None if mean is None else round(mean * 1000, 3)

    @property
    def first_token_ms(self) -> float | None:
        """The mean time to the first token; None when none is known."""
        return round(self.first_token_seconds / self.first_tokens * 1000, 3) if self.first_tokens else None

    def add(self, other: "Counts") -> None:
        """Count what `other` has counted too."""
        self.requests += other.requests
        self.succeeded += other.succeeded
        self.timed += other.timed
        self.seconds += other.seconds
        self.first_tokens += other.first_tokens
        self.first_token_seconds += other.first_token_seconds
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        if other.errors_by_type:
            self.errors_by_type.update(other.errors_by_type)


@attrs.define(eq=False)
class Window:
    """The last `buckets * width_seconds` seconds. The bucket at hand is one of them, and still being filled."""

    buckets: int
    width_seconds: float
    _ring: list[Counts | None] = attrs.field(init=False)
    _epochs: list[int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._ring = [None] * self.buckets
        self._epochs = [-1] * self.buckets

    def at(self, now: float) -> Counts:
        """The bucket of this moment."""
        epoch = int(now // self.width_seconds)
        place = epoch % self.buckets
        found = self._ring[place]
        if found is None or self._epochs[place] != epoch:
            found = self._ring[place] = Counts()
            self._epochs[place] = epoch
        return found

    def total(self, now: float) -> Counts:
        """Everything that is not too old."""
        whole = Counts()
        for counts in self._recent(now):
            whole.add(counts)
        return whole

    def _recent(self, now: float) -> Iterator[Counts]:
        oldest = int(now // self.width_seconds) - self.buckets
        return (
            counts
            for counts, epoch in zip(self._ring, self._epochs, strict=True)
            if epoch > oldest and counts is not None
        )
