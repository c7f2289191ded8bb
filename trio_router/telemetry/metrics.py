"""What Prometheus is told: counters and histograms that events move, gauges of what is true, in a registry of our own.

Labels hold what we know and never what a client typed: aliases of router.toml or `unknown`, paths we serve or
`other`, and words of enums. A family's children are looked up in it once: a request costs a few dictionary look-ups.
Counters that alert rules watch stand at 0 from the start, so that their first step is one that `increase()` sees.

A sink, in the trio thread. `render` works in a thread of its own, because a large board takes 200 ms.
"""

import functools
import platform
from collections.abc import Callable, Collection, Sequence
from typing import Final, TypeVar

import trio
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from trio_router.telemetry.events import (
    BackendExited,
    BackendRestarted,
    Event,
    ExitKind,
    LoadFinished,
    LoadResult,
    Outcome,
    Reloaded,
    RequestFinished,
    Unloaded,
    UnloadReason,
)
from trio_router.telemetry.exposition import encode
from trio_router.telemetry.facts import DevicesFacts, FleetFacts
from trio_router.telemetry.gauges import StateGauges

# ten or eleven bounds each: what a person feels as different, from a small model on a GPU to a large one on a CPU
WAIT_BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
FIRST_TOKEN_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
TOKEN_BUCKETS: Final = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
DURATION_BUCKETS: Final = (0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
LOAD_BUCKETS: Final = (0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)

UNKNOWN: Final = "unknown"
OTHER: Final = "other"

Family = TypeVar("Family", Counter, Histogram)


def _children(family: Family) -> Callable[..., Family]:
    """`family.labels`, which takes a lock and a walk over strings, remembered."""
    return functools.cache(family.labels)


class Metrics:
    """The families. Made for the models and the inference paths of one router."""

    def __init__(self, aliases: Collection[str], endpoints: Collection[str], *, version: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # else there is a second series beside each
        self.registry = registry = CollectorRegistry()
        self._aliases, self._endpoints = frozenset(aliases), frozenset(endpoints)
        self._state = StateGauges()
        self._thread = trio.CapacityLimiter(1)
        self._kinds: dict[tuple[str | None, str, Outcome], tuple[str, Counter]] = {}
        """Label and counter of each kind of request. They are few: one is only told of when its path is one of ours."""

        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            return _children(Counter(f"router_{name}_total", text, labels, registry=registry))

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Callable[..., Histogram]:
            family = Histogram(f"router_{name}_seconds", text, labels, registry=registry, buckets=buckets)
            return _children(family)

        self._requests = counter(
            "requests", "Inference requests that ended, by how.", "model", "endpoint", "status", "outcome"
        )
        self._duration = histogram(
            "request_duration",
            "Arrival to last byte, of requests that were answered, timed out or lost their backend.",
            DURATION_BUCKETS,
            "model",
        )
        self._first_token = histogram(
            "time_to_first_token",
            "Arrival to first token: the first byte of a stream, else the wait and the prompt's processing.",
            FIRST_TOKEN_BUCKETS,
            "model",
        )
        self._per_token = histogram(
            "time_per_output_token", "Generation time for each token of an answer.", TOKEN_BUCKETS, "model"
        )
        self._wait = histogram("queue_wait", "Arrival to slot, loading included.", WAIT_BUCKETS, "model", "priority")
        self._tokens = counter("tokens", "Tokens by kind; cached ones are part of the input.", "model", "kind")
        self._loads = counter("model_loads", "Attempts to load a model, by how they ended.", "model", "result")
        self._load = histogram("model_load", "Spawn to ready, of loads that succeeded.", LOAD_BUCKETS, "model")
        self._unloads = counter("model_unloads", "Models that left memory, by why.", "model", "reason")
        self._exits = counter("backend_exits", "Ends of llama-server processes, by how.", "model", "kind")
        self._restarts = counter("backend_restarts", "Starts after a predecessor's death.", "model")
        self._begin(aliases)
        Info("router_build", "What runs here.", registry=registry).info(
            {"version": version, "python_version": platform.python_version(), "trio_version": trio.__version__}
        )
        registry.register(self._state)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

    def _begin(self, aliases: Collection[str]) -> None:
        """Have the counters of rare events stand at 0."""
        for alias in aliases:
            self._restarts(alias)
            for result in LoadResult:
                self._loads(alias, result.value)
            for reason in UnloadReason:
                self._unloads(alias, reason.value)
            for kind in ExitKind:
                self._exits(alias, kind.value)
            for kind_of_token in ("input", "output", "cached"):
                self._tokens(alias, kind_of_token)

    # --- events -----------------------------------------------------------------------------------

    def __call__(self, event: Event) -> None:
        """Count it."""
        match event:
            case LoadFinished():
                model = self._model(event.alias)
                self._loads(model, event.result.value).inc()
                if event.result is LoadResult.OK:
                    self._load(model).observe(event.seconds)
            case Unloaded():
                self._unloads(self._model(event.alias), event.reason.value).inc()
            case BackendExited():
                self._exits(self._model(event.alias), event.kind.value).inc()
            case BackendRestarted():
                self._restarts(self._model(event.alias)).inc()
            case Reloaded(aliases=aliases):
                self._aliases = frozenset(aliases)
                self._kinds.clear()  # what was unknown may be known now
                self._begin(aliases)
            case _:  # a change of state: gauges show it
                pass

    def requests(self, ended: Sequence[RequestFinished]) -> None:
        """Count requests that ended; those of a kind together, because each step of a counter takes a lock."""
        kinds: dict[tuple[str | None, str, Outcome], list[RequestFinished]] = {}
        for event in ended:
            kinds.setdefault((event.alias, event.endpoint, event.outcome), []).append(event)
        for kind, events in kinds.items():
            self._finished(kind, events)

    def _model(self, alias: str | None) -> str:
        model = "" if alias is None else alias.partition("#")[0]  # a replica counts as what it serves
        return model if model in self._aliases else UNKNOWN

    def _endpoint(self, path: str) -> str:
        bare = path.rstrip("/")
        return bare if bare in self._endpoints else OTHER

    def _finished(self, kind: tuple[str | None, str, Outcome], ended: Sequence[RequestFinished]) -> None:
        """Count requests of one kind."""
        alias, endpoint, outcome = kind
        known = self._kinds.get(kind)
        if known is None:
            model = self._model(alias)
            status = "success" if outcome is Outcome.OK else "error"
            requests = self._requests(model, self._endpoint(endpoint), status, outcome.value)
            known = self._kinds[kind] = (model, requests)
        model, requests = known
        requests.inc(len(ended))
        read = written = cached = 0
        for event in ended:
            if event.waited_seconds is not None and event.priority is not None:
                self._wait(model, event.priority).observe(event.waited_seconds)
            if outcome.timed:
                self._duration(model).observe(event.duration_seconds)
            if event.first_token_seconds is not None:
                self._first_token(model).observe(event.first_token_seconds)
            if event.seconds_per_output_token is not None:
                self._per_token(model).observe(event.seconds_per_output_token)
            read += event.input_tokens or 0
            written += event.output_tokens or 0
            cached += event.cached_tokens or 0
        for name, tokens in (("input", read), ("output", written), ("cached", cached)):
            if tokens:
                self._tokens(model, name).inc(tokens)

    # --- scrapes ----------------------------------------------------------------------------------

    async def render(self, accept: str | None, fleet: FleetFacts, devices: DevicesFacts) -> tuple[bytes, str]:
        """Everything as text, and its content type: OpenMetrics for an `Accept` that asks for it.

        In a thread, one at a time. *Cancellation*: at once; the thread is left to finish.
        """

        def work() -> tuple[bytes, str]:
            self._state.show(fleet, devices)
            return encode(self.registry, accept)

        return await trio.to_thread.run_sync(work, limiter=self._thread, abandon_on_cancel=True)
