"""A router without processes: the real listener, app, registry and relay in this loop, over socket pairs.

Its llama-server is a script (`tests.backend.peer`) that is ready from the start, or never. Every end of a site says
that nothing was left behind.
"""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper

from tests.backend.peer import Script, listening, until
from trio_router.backend.backend import Backend
from trio_router.backend.client import BackendClient
from trio_router.backend.health import expire_silent
from trio_router.backend.lifecycle import Move
from trio_router.backend.logtail import LogTail
from trio_router.config.policies import ModelPolicy
from trio_router.config.schema import ApiConfig, KeyConfig, ModelConfig, RouterConfig, SystemConfig
from trio_router.fleet.model import Model
from trio_router.fleet.registry import Registry
from trio_router.memory.devices import DeviceMonitor
from trio_router.telemetry.events import Event, Events, RequestFinished
from trio_router.telemetry.keys import KeyMetrics
from trio_router.telemetry.metrics import Metrics
from trio_router.telemetry.snapshot import metrics_snapshot
from trio_router.telemetry.summary import Summary
from trio_router.web.admission import INFERENCE_PATHS, Admission
from trio_router.web.app import create_app
from trio_router.web.dataplane import DataPlane
from trio_router.web.inference import Exchange
from trio_router.web.listener import Connections
from trio_router.web.reload import Reloader
from trio_router.web.streams import Streams
from trio_router.web.waiting_streams import WaitingStreams

CHAT = "/v1/chat/completions"
BODY = b'{"model":"qwen","messages":[]}'
Headers = list[tuple[str, str]]


@attrs.frozen(kw_only=True)
class Reply:
    """An answer as a client saw it."""

    status: int
    headers: dict[str, str]
    """Lower-case names; the last of several."""
    body: bytes
    whole: bool
    """Whether it came to its proper end."""

    @property
    def error(self) -> dict[str, Any]:
        """The error object; everything that all of them share is checked."""
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"]
        # a 504 has one where it is known when there will be a slot
        assert self.status == 504 or ("retry-after" in self.headers) == (self.status in {429, 503})
        found = json.loads(self.body)
        assert list(found) in (["error"], ["type", "error", "request_id"])  # the second is Anthropic's
        error: dict[str, Any] = found["error"]
        assert list(error)[:4] == ["message", "type", "param", "code"]
        assert len(error["message"]) < 600
        return error

    @property
    def code(self) -> tuple[int, str]:
        return self.status, self.error["code"]


WAYS: dict[str, Headers] = {"lean": [], "quart": [("TE", "trailers")]}


@attrs.define(eq=False)
class Client:
    """One client connection; says bytes, understands answers."""

    stream: trio.SocketStream
    _left: bytes = b""

    async def say(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def hear(self, method: str = "GET") -> Reply:
        """The next answer, to a request of that method."""
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1_000_000)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        parser.send(h11.EndOfMessage())
        if self._left:
            parser.receive_data(self._left)
        head, body, whole = None, b"", False
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError:
                break
            if event is h11.NEED_DATA:
                try:
                    parser.receive_data(await self.stream.receive_some(65536))
                except trio.BrokenResourceError:
                    break
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                whole = True
                break
            elif isinstance(event, h11.ConnectionClosed):
                break
        self._left = parser.trailing_data[0]
        assert head is not None, "no answer at all"
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        return Reply(status=head.status_code, headers=headers, body=body, whole=whole)

    async def ask(self, method: str, target: str, headers: Headers | None = None, body: bytes = b"") -> Reply:
        """Send a request, wait for its answer."""
        await self.say(request(method, target, headers, body))
        with trio.fail_after(10):
            return await self.hear(method)

    async def ended(self) -> bytes:
        """What comes until the other side closes."""
        data = self._left
        while True:
            try:
                piece = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:
                return data
            if not piece:
                return data
            data += piece


def request(method: str, target: str, headers: Headers | None = None, body: bytes = b"") -> bytes:
    """A request's bytes."""
    given = headers or []
    names = {name.lower() for name, _ in given}
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [] if "host" in names else ["Host: localhost:8000"]
    lines += [f"{name}: {value}" for name, value in given]
    if not names & {"content-length", "transfer-encoding"} and (body or method == "POST"):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@attrs.define(eq=False)
class Site:
    """A router and its surroundings."""

    registry: Registry
    connections: Connections
    nursery: trio.Nursery
    backend: Backend | None = None
    events: list[Event] = attrs.field(factory=list)
    finished: list[RequestFinished] = attrs.field(factory=list)
    """What became of the inference requests so far."""

    @property
    def model(self) -> Model:
        return self.registry.models["qwen"]

    async def told(self, count: int = 1, seconds: float = 5.0) -> list[RequestFinished]:
        """What became of so many requests; a client may have its last byte before that is told."""
        await until(lambda: not self.registry.events.settle() and len(self.finished) >= count, seconds)
        return self.finished

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A client that is connected."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.nursery.start_soon(self.connections.serve, ours)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as stream:
            yield Client(stream)

    async def ask(self, method: str, target: str, headers: Headers | None = None, body: bytes = b"") -> Reply:
        """One request on a connection of its own."""
        async with self.client() as client:
            return await client.ask(method, target, headers, body)

    async def until_idle(self, seconds: float = 2.0) -> None:
        """Return when nobody waits and nobody holds a lease."""
        await until(lambda: self.model.scheduler.idle, seconds)


def wiring(config: RouterConfig, events: Events) -> tuple[Registry, Connections]:
    """As `tree.serve` does it."""
    devices = DeviceMonitor(gpu_devices=())
    registry = Registry.of(config, None, events, devices)
    summary = Summary(config.models)
    metrics = Metrics(config.models, INFERENCE_PATHS, version="0")
    keys = KeyMetrics(metrics.registry)
    events.sinks += [summary, metrics]
    events.request_sinks += [registry.learn, summary.requests, metrics.requests, keys]
    streams = Streams.of(registry, events, partial(metrics_snapshot, registry, devices, summary))
    admission = Admission(config.api, config.keys)
    reloader = Reloader(read=lambda: config, registry=registry, admission=admission)
    waiting_streams = WaitingStreams()
    under_way: set[Exchange] = set()
    app = create_app(
        registry,
        devices,
        events,
        admission=admission,
        waiting_streams=waiting_streams,
        reloader=reloader,
        streams=streams,
        metrics=metrics,
        summary=summary,
        under_way=under_way,
    )
    plane = DataPlane(
        registry=registry,
        events=events,
        admission=admission,
        max_body_bytes=config.api.max_body_mb * 1024 * 1024,
        waiting_streams=waiting_streams,
        under_way=under_way,
    )
    return registry, Connections(app=ASGIWrapper(app), plane=plane)


@asynccontextmanager
async def open_site(
    folder: Path,
    script: Script | None = None,
    *,
    slots: int = 1,
    api: dict[str, Any] | None = None,
    keys: tuple[KeyConfig, ...] = (),
    keepalive: bool = True,
    policy: ModelPolicy | None = None,
    **system: Any,
) -> AsyncIterator[Site]:
    """A site with one model, `qwen`; without a script its llama-server never comes.

    Requests are sent as they came, unless `stop_at_once` is asked for.
    """
    config = RouterConfig(
        path=Path("router.toml"),
        api=ApiConfig(**(api or {})),
        system=SystemConfig(base_models_path=folder, gpu_devices=(), **{"stop_at_once": False, **system}),
        models={
            "qwen": ModelConfig(
                alias="qwen",
                model_path="q.gguf",
                file=folder / "q.gguf",
                slots=slots,
                keepalive=keepalive,
                policy=policy or ModelPolicy(),
            )
        },
        keys=keys,
    )
    events = Events()
    registry, connections = wiring(config, events)
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        await nursery.start(connections.watch)
        await nursery.start(connections.plane.waiting_streams.run)
        site = Site(registry, connections, nursery)
        events.sinks.append(site.events.append)
        events.request_sinks.append(site.finished.extend)
        if script is not None:
            address = await stack.enter_async_context(listening(folder / "b.sock", script))
            site.backend = Backend(
                alias="qwen",
                incarnation=1,
                address=address,
                pid=1,
                tail=LogTail(),
                client=BackendClient(None),
                model_file=folder / "q.gguf",
                genuine=True,
                pins=True,
            )
            site.backend.patience_seconds = config.system.request_timeout_sec
            site.backend.open_slots(slots)
            nursery.start_soon(expire_silent, site.backend)
            nursery.start_soon(site.backend.attend_forsaken)
            for move in (Move.SPAWN, Move.ALIVE, Move.ANSWER):
                site.model.supervisor.move(move)
            site.model.opened(site.backend)
        try:
            yield site
            await site.until_idle()
            await until(lambda: site.model.scheduler.statistics().free == (slots if script else 0), 2.0)
            left = site.model.scheduler.statistics()
            assert (left.waiting, left.active) == (0, 0)
        finally:
            for slot in site.backend.slots if site.backend else ():
                slot.disconnect()
            nursery.cancel_scope.cancel()
    assert connections.open == set()
