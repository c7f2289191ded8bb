"""Numbers over sliding windows: the last minute of each model, the last hour of the router, totals since its start.

A sink. Memory is bounded: sixty one-second buckets and a few totals a model, sixty one-minute buckets a model, and
the last `MAX_DURATIONS` durations, from which the percentiles are. Everything is read and written in the trio thread.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import attrs

from trio_router.telemetry.availability import Availability
from trio_router.telemetry.events import (
    BackendExited,
    Event,
    ExitKind,
    LoadFinished,
    LoadResult,
    Outcome,
    Reloaded,
    RequestFinished,
    Unloaded,
)
from trio_router.telemetry.window import Counts, Window

HOUR_SECONDS = 3600.0
MAX_DURATIONS = 10_000
UNKNOWN = "unknown"
"""Stands for whatever a client asked for that is no model of ours."""


@attrs.define(eq=False, kw_only=True)
class Totals:
    """What one model was asked since the router's start."""

    requests: int = 0
    processed: int = 0
    """Answered by its llama-server, well or not."""
    rejected: int = 0
    """Refused, or given up on, before they had a slot."""


@attrs.define(eq=False)
class _OfModel:
    totals: Totals = attrs.field(factory=Totals)
    minute: Window = attrs.field(factory=lambda: Window(60, 1.0))
    hour: Window = attrs.field(factory=lambda: Window(60, 60.0))
    availability: Availability = attrs.field(factory=Availability)


@attrs.frozen(kw_only=True)
class Report:
    """The last hour of the whole router. Times in seconds; None when nothing was timed."""

    counts: Counts
    by_model: dict[str, int]
    """Requests; only models that were asked."""
    p50: float | None
    p95: float | None
    p99: float | None


@attrs.define(eq=False)
class Summary:
    """What the endpoints for people say of requests. Made for the models of one configuration."""

    aliases: Iterable[str]
    clock: Callable[[], float] = time.monotonic
    _models: dict[str | None, _OfModel] = attrs.field(init=False)
    _durations: deque[tuple[float, float]] = attrs.field(factory=lambda: deque(maxlen=MAX_DURATIONS))

    def __attrs_post_init__(self) -> None:
        self._models = {None: _OfModel(), **{alias: _OfModel() for alias in self.aliases}}

    def __call__(self, event: Event) -> None:
        """Take note."""
        match event:
            case LoadFinished(alias=alias, result=LoadResult.OK):
                self._of(alias).availability.mark(self.clock(), up=True)
            case BackendExited(alias=alias, kind=kind) if kind is not ExitKind.STOPPED:
                self._of(alias).availability.mark(self.clock(), up=False)
            case Unloaded(alias=alias):
                self._of(alias).availability.mark(self.clock(), up=None)
            case Reloaded(aliases=aliases):
                self._models = {alias: self._models.get(alias, _OfModel()) for alias in (None, *aliases)}
            case _:
                pass

    def requests(self, ended: Sequence[RequestFinished]) -> None:
        """Take note of requests that ended."""
        now = self.clock()
        for event in ended:
            self._finished(event, now)

    # --- what is asked of it ----------------------------------------------------------------------

    def minute(self, alias: str) -> Counts:
        """The last minute of one model."""
        return self._of(alias).minute.total(self.clock())

    def totals(self, alias: str) -> Totals:
        """One model since the start."""
        return self._of(alias).totals

    def uptime_percentage(self, alias: str) -> float:
        """Of the time one model was wanted in the last hour, how much it was up: 0 to 100."""
        return self._of(alias).availability.percentage(self.clock())

    def report(self) -> Report:
        """The last hour."""
        now = self.clock()
        whole = Counts()
        by_model: dict[str, int] = {}
        for alias, model in self._models.items():
            counts = model.hour.total(now)
            whole.add(counts)
            if counts.requests:
                name = UNKNOWN if alias is None else alias
                by_model[name] = by_model.get(name, 0) + counts.requests
        recent = sorted(seconds for at, seconds in self._durations if at > now - HOUR_SECONDS)
        p50, p95, p99 = (percentile(recent, share) for share in (0.5, 0.95, 0.99))
        return Report(counts=whole, by_model=by_model, p50=p50, p95=p95, p99=p99)

    # --- the mechanism ----------------------------------------------------------------------------

    def _of(self, alias: str | None) -> _OfModel:
        return self._models.get(alias) or self._models[None]

    def _finished(self, event: RequestFinished, now: float) -> None:
        model = self._of(event.alias)
        model.totals.requests += 1
        if event.queue_seconds is not None:
            model.totals.processed += 1
        elif event.outcome in {Outcome.REJECTED, Outcome.TIMEOUT}:
            model.totals.rejected += 1
        _count(model.minute.at(now), event)
        _count(model.hour.at(now), event)
        if event.outcome.timed:
            self._durations.append((now, event.duration_seconds))


def _count(counts: Counts, event: RequestFinished) -> None:
    counts.requests += 1
    if event.outcome is Outcome.OK:
        counts.succeeded += 1
    else:
        counts.errors_by_type[event.code or event.outcome.value] += 1
    if event.outcome.timed:
        counts.timed += 1
        counts.seconds += event.duration_seconds
    if event.first_token_seconds is not None:
        counts.first_tokens += 1
        counts.first_token_seconds += event.first_token_seconds
    counts.input_tokens += event.input_tokens or 0
    counts.output_tokens += event.output_tokens or 0


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that is not below `share` (0 to 1) of them: nearest rank. None of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
