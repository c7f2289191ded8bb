"""Plays a trace: what would have happened with this configuration.

Every request arrives when it did, waits in the real queue of the real registry, holds its slot for as long as it did
(or as requests of its model did, if it got none), and leaves. The clock jumps to whatever comes next.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs
import trio
from trio.testing import MockClock

from trio_router.backend.launch import Launcher
from trio_router.backend.lifecycle import State
from trio_router.config.places import LlamaServer
from trio_router.config.schema import RouterConfig
from trio_router.errors import RouterError
from trio_router.fleet.registry import Registry
from trio_router.fleet.ticket import Priority
from trio_router.memory.footprint import Footprint
from trio_router.simulation.supervisor import LoadTimes, modelled
from trio_router.telemetry.events import Event, Events, LoadFinished, LoadResult, ModelChanged
from trio_router.telemetry.trace import TracedLoad, TracedRequest


@attrs.frozen(kw_only=True)
class Stay:
    """A model's time in memory, in seconds from the first arrival."""

    model: str
    began: float
    ended: float


@attrs.define(eq=False, kw_only=True)
class Outcome:
    """What happened."""

    requests: int = 0
    seconds: float = 0.0
    """From the first arrival to the last answer."""
    waits: dict[str, list[float]] = attrs.field(factory=lambda: {priority.label: [] for priority in Priority})
    errors: Counter[str] = attrs.field(factory=Counter)
    loads: Counter[str] = attrs.field(factory=Counter)
    unfinished_loads: int = 0
    busy_seconds: defaultdict[str, float] = attrs.field(factory=lambda: defaultdict(float))
    """Of slots, by model."""
    slots: dict[str, int] = attrs.field(factory=dict)
    stays: list[Stay] = attrs.field(factory=list)
    waiting: list[tuple[float, float]] = attrs.field(factory=list)
    """When those came who got a slot, and how long they waited."""
    memory: dict[str, int] = attrs.field(factory=dict)
    """Bytes, by model, as projected."""


@attrs.define(eq=False)
class _Recorder:
    """Listens to a registry."""

    registry: Registry
    outcome: Outcome
    began: float
    _since: dict[str, float] = attrs.field(factory=dict)

    def __call__(self, event: Event) -> None:
        now = trio.current_time() - self.began
        match event:
            case LoadFinished(alias=alias, result=LoadResult.OK):
                self.outcome.loads[alias] += 1
            case ModelChanged(alias=alias):
                resident = self.registry.models[alias].state.resident
                if resident and alias not in self._since:
                    self._since[alias] = now
                elif not resident and alias in self._since:
                    self._stayed(alias, now)
            case _:
                pass

    def _stayed(self, alias: str, now: float) -> None:
        self.outcome.stays.append(Stay(model=alias, began=self._since.pop(alias), ended=now))

    def close(self, now: float) -> None:
        """Those still in memory."""
        for alias in list(self._since):
            self._stayed(alias, now)


def load_times(loads: Iterable[TracedLoad]) -> LoadTimes:
    """The means: of each model's loads, of all models', of all stops."""
    seconds: dict[str, list[float]] = {}
    stops = []
    for load in loads:
        if load.kind == "unload":
            stops.append(load.seconds)
        else:
            seconds.setdefault(load.model, []).append(load.seconds)
    times = LoadTimes({alias: statistics.fmean(each) for alias, each in seconds.items()})
    if times.by_model:
        times.usual = statistics.fmean(times.by_model.values())
    if stops:
        times.stop = statistics.fmean(stops)
    return times


def simulate(
    config: RouterConfig,
    requests: Sequence[TracedRequest],
    times: LoadTimes,
    footprints: dict[str, Footprint] | None = None,
) -> Outcome:
    """Play `requests`, whatever their order, in virtual time."""
    return trio.run(_play, config, requests, times, footprints or {}, clock=MockClock(autojump_threshold=0))


async def _play(
    config: RouterConfig, requests: Sequence[TracedRequest], times: LoadTimes, footprints: dict[str, Footprint]
) -> Outcome:
    launcher = Launcher(
        server=LlamaServer(path=Path("llama-server")), folder=Path, transport=config.system.backend_transport
    )
    registry = Registry.of(config, launcher, Events(), supervising=modelled(times))
    for alias, footprint in footprints.items():
        registry.models[alias].footprint = footprint
    registry.enter("ready")
    outcome = Outcome(requests=len(requests), slots={alias: each.slots for alias, each in config.models.items()})
    outcome.memory = {alias: model.footprint_bytes or 0 for alias, model in registry.models.items()}
    usual = _usual_service(requests)
    async with trio.open_nursery() as run:
        await run.start(registry.run)
        began = trio.current_time()
        recorder = _Recorder(registry, outcome, began)
        registry.events.sinks.append(recorder)
        ordered = sorted(requests, key=lambda request: request.at)
        async with trio.open_nursery() as clients:
            for request in ordered:
                await trio.sleep_until(began + request.at - ordered[0].at)
                clients.start_soon(_request, registry, request, usual, outcome, began)
        outcome.seconds = trio.current_time() - began
        recorder.close(outcome.seconds)
        outcome.unfinished_loads = sum(
            model.state in {State.STARTING, State.LOADING} for model in registry.models.values()
        )
        run.cancel_scope.cancel()
    return outcome


def _usual_service(requests: Iterable[TracedRequest]) -> dict[str, float]:
    """The mean of each model's, for those that got no slot."""
    seconds: dict[str, list[float]] = {}
    for request in requests:
        if request.service_seconds is not None:
            seconds.setdefault(request.model, []).append(request.service_seconds)
    return {alias: statistics.fmean(each) for alias, each in seconds.items()}


async def _request(
    registry: Registry, request: TracedRequest, usual: dict[str, float], outcome: Outcome, began: float
) -> None:
    seconds = request.service_seconds
    if seconds is None:
        seconds = usual.get(request.model, 0.0)
    priority = Priority[request.priority.upper()]
    try:
        ticket = registry.ticket(request.model, priority, request.client)
        lease = await registry.lease(ticket)
    except RouterError as error:
        outcome.errors[error.code] += 1
        return
    try:
        waited = trio.current_time() - ticket.arrived_at
        outcome.waits[request.priority].append(waited)
        outcome.waiting.append((ticket.arrived_at - began, waited))
        await trio.sleep(seconds)
    finally:
        lease.release()
    registry.models[request.model].scheduler.pace.add(seconds, priority.steps, trio.current_time())
    outcome.busy_seconds[request.model] += seconds
