"""`/v1/models/status/stream` and `/metrics/stream`: what an operator watches.

A change of a model's or the router's state is published as it happens, in the words of that moment. The numbers of
waiting and running requests change with each request: those are published at most once in `COUNTS_SECONDS` for a
model, and only while somebody reads; the first who comes, or comes back, is told what was left out.

*Resource handling.* A reader belongs to its request and ends with it. While there is no reader `run` sleeps.

*Error handling.* An exception here is a bug and ends the tree.

*Cancellation.* When the router drains, streams end by themselves once they have said so.
"""

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import attrs
import trio
from quart import Response, request
from quart_trio import QuartTrio

from trio_router.fleet.registry import Registry
from trio_router.fleet.status import fleet_status, server_status, status
from trio_router.telemetry.events import Event, Events, ModelChanged, Reloaded, ServerChanged
from trio_router.web.sse import Hub, stream_response

COUNTS_SECONDS = 0.5
METRICS_SECONDS = 2.0
PROGRESS_SECONDS = 1.0
"""How often a load that goes on is looked at."""
MEMORY_SECONDS = 5.0
"""How soon after its last request a model's memory is looked at again."""


@attrs.define(eq=False, kw_only=True)
class Streams:
    """Both streams, and what feeds them."""

    registry: Registry
    measure: Callable[[], Mapping[str, Any]]
    """The data of a `metrics` event."""
    status: Hub = attrs.field(init=False)
    metrics: Hub = attrs.field(init=False)
    _shown: dict[str, Mapping[str, Any]] = attrs.field(init=False)
    """What the last `model_update` of a model said, or would have."""
    _stale: dict[str, None] = attrs.field(factory=dict)
    """Models whose counts changed since, in that order."""
    _counted: trio.Event = attrs.field(factory=trio.Event)
    _loading: trio.Event = attrs.field(factory=trio.Event)
    """Set when a load has begun."""

    def __attrs_post_init__(self) -> None:
        self.status = Hub(opening=lambda: ("full_status", fleet_status(self.registry)), joining=self._show_counts)
        self.metrics = Hub(opening=lambda: ("metrics", self.measure()), opening_seconds=METRICS_SECONDS)
        self._shown = {alias: status(model) for alias, model in self.registry.models.items()}

    @classmethod
    def of(cls, registry: Registry, events: Events, measure: Callable[[], Mapping[str, Any]]) -> "Streams":
        """Streams that hear of what happens from now on."""
        streams = cls(registry=registry, measure=measure)
        events.sinks.append(streams.hear)
        streams._count_all()
        return streams

    def _count_all(self) -> None:
        for alias, model in self.registry.models.items():
            model.scheduler.changed = partial(self.counts_changed, alias)

    def hear(self, event: Event) -> None:
        """A sink: publish what concerns operators."""
        match event:
            case ModelChanged(alias=alias):
                self._show(alias)
                if self._loads(alias):
                    self._loading.set()
            case Reloaded():
                self._count_all()
                self._shown = {alias: status(model) for alias, model in self.registry.models.items()}
                self.status.publish("full_status", fleet_status(self.registry))
            case ServerChanged():
                self.status.publish("server_update", server_status(self.registry))
                if self.registry.draining:
                    self._close()
            case _:
                pass

    def counts_changed(self, alias: str) -> None:
        """More or fewer requests wait for, or run on, a model. Called for every request: does next to nothing."""
        self._stale[alias] = None
        self._counted.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Publish what is not an event by itself, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.status.beat)
            nursery.start_soon(self.metrics.beat)
            nursery.start_soon(self._count)
            nursery.start_soon(self._measure)
            nursery.start_soon(self._progress)
            task_status.started()

    async def _count(self) -> None:
        while True:
            await self.status.until_read()
            with trio.move_on_after(MEMORY_SECONDS) as quiet:
                await self._counted.wait()
            if quiet.cancelled_caught:  # what a model holds changes without an event
                self._stale = dict.fromkeys(self.registry.models)
            self._show_counts()
            await trio.sleep(COUNTS_SECONDS)

    async def _progress(self) -> None:
        """A load gets on without an event of its own: whoever tells of models' changes is to tell of that."""
        while True:
            await self._loading.wait()
            self._loading = trio.Event()
            await trio.sleep(PROGRESS_SECONDS)
            for alias in list(self.registry.models):
                if self._loads(alias):
                    self.registry.events.emit(ModelChanged(alias=alias))

    def _loads(self, alias: str) -> bool:
        model = self.registry.models.get(alias)
        return model is not None and model.supervisor.loading_since is not None

    async def _measure(self) -> None:
        while True:
            await self.metrics.until_read()
            await trio.sleep(METRICS_SECONDS)
            if self.metrics.readers:
                self.metrics.publish("metrics", self.measure(), opens=True)

    def _show_counts(self) -> None:
        stale, self._stale = self._stale, {}
        if self._counted.is_set():  # one that is not set may be waited for
            self._counted = trio.Event()
        for alias in stale:
            self._show(alias)

    def _show(self, alias: str) -> None:
        self._stale.pop(alias, None)
        model = self.registry.models.get(alias)
        if model is None:  # taken out of the configuration, and still leaving
            return
        shown = status(model)
        if shown != self._shown.get(alias):
            self._shown[alias] = shown
            self.status.publish("model_update", shown)

    def _close(self) -> None:
        """End every stream, those of logs too: nothing that only watches holds up a drain."""
        self.status.close()
        self.metrics.close()
        for model in self.registry.models.values():
            model.supervisor.journal.close()


def add_routes(app: QuartTrio, streams: Streams) -> None:
    """Add them to `app`."""

    async def events_of(hub: Hub) -> Response:
        borrowed: AsyncExitStack = request.borrowed  # type: ignore[attr-defined]
        reader = borrowed.enter_context(hub.reader(request.headers.get("Last-Event-ID")))
        return stream_response(reader)

    @app.get("/v1/models/status/stream")
    async def status_stream() -> Response:
        return await events_of(streams.status)

    @app.get("/metrics/stream")
    async def metrics_stream() -> Response:
        return await events_of(streams.metrics)
