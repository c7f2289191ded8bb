"""The nursery tree: what starts, in which order, and stops in reverse.

    root nursery
    |- signals                      SIGTERM, SIGINT: drain; a second one: cancel. SIGHUP: another configuration
    |- events.run                   tells sinks of requests that ended
    |- devices.run                  NVML samples
    |- footprints.run               learns what models need; footprints.fill reads their files, also after a reload
    |- registry.run                 the only task that starts and stops models
    |  |- supervisor[qwen-7b]       child nursery: llama-server, its log, its health
    |  `- supervisor[...]
    |- notifier.run                 systemd's watchdog, if it is there
    |- streams.run                  heartbeats and numbers for those who watch
    |- waiting_streams.run          comments for streams that wait
    `- listener                     last to start
       `- connection ...            holds a lease while it streams

Stopping is cancelling. Draining comes before it: what waits is refused, what comes is refused, what runs may finish
within `system.drain_timeout_sec`; the listener stays until then, so that clients are told and not left hanging.
Then the root is cancelled, connections are closed, and the supervisors end their llama-servers side by side.
"""

import gc
import linecache
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from functools import partial
from typing import TextIO, cast

import attrs
import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper

from trio_router import __version__
from trio_router.backend.address import private_folder
from trio_router.backend.binding import Binding
from trio_router.backend.launch import Launcher
from trio_router.backend.pump import Pump
from trio_router.backend.reaper import reaping
from trio_router.config import LlamaServer
from trio_router.config.schema import RouterConfig
from trio_router.errors import ShuttingDown
from trio_router.fleet.footprints import Footprints
from trio_router.fleet.registry import Registry
from trio_router.fleet.reload import Changes
from trio_router.memory.devices import DeviceMonitor
from trio_router.memory.learned import Learned, default_folder
from trio_router.notify import Notifier
from trio_router.telemetry.events import Events, RequestSink
from trio_router.telemetry.keys import KeyMetrics
from trio_router.telemetry.logs import configure_logs, request_log
from trio_router.telemetry.metrics import Metrics
from trio_router.telemetry.output import Output
from trio_router.telemetry.snapshot import metrics_snapshot
from trio_router.telemetry.summary import Summary
from trio_router.web.admission import INFERENCE_PATHS, Admission
from trio_router.web.app import create_app
from trio_router.web.dataplane import DataPlane
from trio_router.web.in_flight import InFlight
from trio_router.web.inference import Exchange
from trio_router.web.listener import Connections, bound_port, open_sockets, serve_connections
from trio_router.web.reload import Reloader
from trio_router.web.streams import Streams
from trio_router.web.waiting_streams import WaitingStreams

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAST_WORDS_SECONDS = 0.5
LOOK_SECONDS = 0.05
"""How long the end waits for refusals to be written, and for streams that their clients do not read."""

log = structlog.get_logger("trio_router")


def main(
    config: RouterConfig,
    server: LlamaServer,
    read: Callable[[], RouterConfig],
    *,
    log_format: str = "text",
    log_level: str = "info",
) -> int:
    """Serve until told to stop; returns the exit status. Must be called in the main thread.

    `read` reads the configuration once more, and raises ConfigError if it is wrong.
    """
    reserve_standard_files()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to be reloaded
    raise_file_limit()
    out = cast("TextIO", Output.of(sys.stderr))
    configure_logs(log_format, log_level, out)
    try:
        with private_folder() as folder, reaping() as reaper:
            transport = config.system.backend_transport
            launcher = Launcher(server=server, folder=folder.ensured, transport=transport, reaper=reaper)
            return trio.run(serve, config, launcher, read, request_log(log_format, log_level, out))
    except OSError as error:
        print(f"trio-router: {error}", file=sys.stderr)  # noqa: T201  (the last word of a program)
        return 1


def reserve_standard_files() -> None:
    """Where one of them is closed, no other file shall have its number: programs write there without asking."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def raise_file_limit() -> None:
    """As many open files as we may have: the soft limit of 1,024 is for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # macOS says unlimited, and takes less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve(
    config: RouterConfig,
    launcher: Launcher,
    read: Callable[[], RouterConfig],
    requests: RequestSink | None = None,
) -> int:
    """The root; `requests` is told of those that ended. Returns the exit status."""
    events = Events()
    devices = DeviceMonitor(gpu_devices=config.system.gpu_devices)
    launcher = attrs.evolve(launcher, gpu=lambda: bool(devices.snapshot.devices), binding=Binding(devices))
    registry = Registry.of(config, launcher, events, devices)
    learned = Learned(config.system.state_dir or default_folder(os.environ))
    footprints = Footprints(registry=registry, launcher=launcher, devices=devices, learned=learned)
    summary = Summary(config.models)
    metrics = Metrics(config.models, INFERENCE_PATHS, version=__version__)
    notifier = Notifier.of(os.environ)
    events.sinks += [summary, metrics, notifier, footprints.hear]
    events.request_sinks += [registry.learn, summary.requests, metrics.requests, KeyMetrics(metrics.registry)]
    events.request_sinks += [] if requests is None else [requests]
    streams = Streams.of(registry, events, partial(metrics_snapshot, registry, devices, summary))
    admission = Admission(config.api, config.keys)
    reloader = Reloader(read=read, registry=registry, admission=admission)
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
    try:
        sockets = await open_sockets(config.api.host, config.api.port)
    except OSError as error:
        # no traceback: the sentence says all
        log.error("cannot listen", host=config.api.host, port=config.api.port, error=str(error))  # noqa: TRY400
        return 1
    ignore_signals()
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as root:
            await root.start(events.run)
            await root.start(devices.run)
            await launcher.prepare()
            await root.start(footprints.fill)
            await root.start(footprints.run)
            await root.start(registry.run)  # after what it decides by
            await root.start(streams.run)
            await root.start(waiting_streams.run)
            await root.start(notifier.run, registry.facts)
            Pump.here()  # now: later there may be no file left for it
            plane = DataPlane(
                registry=registry,
                events=events,
                admission=admission,
                max_body_bytes=config.api.max_body_bytes,
                waiting_streams=waiting_streams,
                under_way=under_way,
            )

            def reloaded(changes: Changes) -> None:
                plane.max_body_bytes = changes.config.api.max_body_bytes
                root.start_soon(root.start, footprints.fill)

            reloader.told.append(reloaded)
            await root.start(serve_connections, Connections(app=ASGIWrapper(app), plane=plane), sockets)
            spare_the_collector()
            registry.enter("ready")
            announce(config, bound_port(sockets))
            root.start_soon(heed_signals, signals, root.cancel_scope, reloader)
            await reloader.stop.wait()  # a command may be repeated, and be followed by a signal
            await drain_and_stop(root.cancel_scope, registry, plane.in_flight, under_way)
    events.settle()
    log.info("stopped")
    return 0


def ignore_signals() -> None:
    """What comes when nobody heeds them any more is not to cut the end short."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def spare_the_collector() -> None:
    """Have the garbage collector leave alone what stays until the end, and come in small steps.

    A full collection of everything that was imported stops every stream for 50 ms, one of 50,000 new objects for 10;
    what a request leaves behind is freed by its reference counts.
    """
    linecache.clearcache()  # attrs keeps the source of every method that it made: 0.8 MB
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 500, 50)


def announce(config: RouterConfig, port: int) -> None:
    """The one line on standard output: where we are."""
    host = f"[{config.api.host}]" if ":" in config.api.host else config.api.host
    if config.api.host not in {"127.0.0.1", "::1", "localhost"} and config.api.key is None and not config.keys:
        log.warning(
            "anyone who reaches this address can use it: there is no API_KEY and no [[keys]]", host=config.api.host
        )
    Output.of(sys.stdout).write(f"trio-router listens on http://{host}:{port}\n")


async def heed_signals(signals: AsyncIterator[int], root: trio.CancelScope, reloader: Reloader) -> None:
    """SIGHUP reads the configuration again. The first of the others drains and then stops; another stops at once."""
    heeded = False
    async with trio.open_nursery() as nursery:
        async for number in signals:
            if number == signal.SIGHUP:
                nursery.start_soon(reloader.reload_by_signal)
            elif heeded:
                log.warning("stopping at once", signal=signal.Signals(number).name)
                root.cancel()
                return
            else:
                heeded = True
                log.info("draining", signal=signal.Signals(number).name)
                reloader.stop.set()


async def drain_and_stop(
    root: trio.CancelScope, registry: Registry, in_flight: InFlight, under_way: Collection[Exchange]
) -> None:
    """Let what runs finish, for as long as it may, then stop."""
    give_up = trio.current_time() + registry.config.system.drain_timeout_sec
    await registry.drain(registry.config.system.drain_timeout_sec)
    while under_way and trio.current_time() < give_up:  # noqa: ASYNC110  (some clients take their time; nobody tells of the last)
        await trio.sleep(LOOK_SECONDS)
    for exchange in list(under_way):
        exchange.cancel(ShuttingDown("the router is shutting down"))
    with trio.move_on_after(LAST_WORDS_SECONDS):
        await in_flight.until_none()  # they were told that we drain; some may not have written or read it yet
    root.cancel()
