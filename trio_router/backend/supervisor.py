"""The task that owns one model's llama-server and its restarts.

`run` lives for as long as the model is to be in memory; cancelling it is how the model leaves. In it each
incarnation is a nursery of its own: the child process, the reader of its log, the wait for its exit, the health
loop. Whichever of them ends, the nursery ends as a unit, the process group is gone and its socket removed, and
only then is there a successor.

    supervisor.run
    `- incarnation n                 ends with an `Ending`
       |- read_log                   until the pipe closes
       |- exit                       the pidfd
       `- life                       until_ready, then watch

*Resource handling.* A process is ended (`stop_within`) on every way out, shielded and bounded.

*Error handling.* A death is not an exception: it is counted, and answered with a pause that doubles and then
another incarnation. `max_load_attempts` loads in a row that never became ready, or `MAX_CRASHES` deaths in a row
without one request answered between them, and the model is `failed`: those who wait are told, with the last lines
of the server's log, and `run` returns. The counts outlive `run`; `reset` clears them. After `failed_retry_sec` the
next request has it tried once more (`try_again`): one failure, and it is `failed` again.

*Cancellation.* May come at any await.
"""

import math
import random
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import attrs
import structlog
import trio

from trio_router.backend.address import Address
from trio_router.backend.backend import ENDING, Backend
from trio_router.backend.client import NoAnswer, NoFiles, backend_client
from trio_router.backend.ending import Ending, describe_exit
from trio_router.backend.health import Health, expire_silent, until_ready, watch
from trio_router.backend.launch import Launcher, LaunchFailed
from trio_router.backend.lifecycle import Move, State, after
from trio_router.backend.logtail import LogTail
from trio_router.backend.process import ServerProcess
from trio_router.backend.settings import SupervisorSettings
from trio_router.backend.shortage import short_of_memory
from trio_router.backend.stall import until_stalled
from trio_router.backend.weighing import Weighing
from trio_router.config.flags import longest_in
from trio_router.config.schema import ModelConfig
from trio_router.errors import LoadTimeout, ModelFailed, RouterError
from trio_router.memory.room import Spot
from trio_router.telemetry.events import (
    BackendExited,
    BackendRestarted,
    Events,
    ExitKind,
    LoadFinished,
    LoadResult,
    ModelChanged,
)
from trio_router.telemetry.ring import Ring

MAX_CRASHES = 5
"""Deaths after readiness, with no request answered between them, that make a model `failed`."""
BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 30.0
PROPERTIES_SECONDS = 0.25
"""How long a llama-server may take to say what it is, before requests are let in: 2 ms are usual."""
BUILD = re.compile(r"b[0-9]+")
"""How llama.cpp names its builds, in /props."""
LAST_WORDS_LINES = 12
MAX_RETRY_AFTER_SECONDS = 3600
JOURNAL_LINES = 1000
JOURNAL_BYTES = 256 * 1024

log = structlog.get_logger("trio_router.backend")


def new_journal() -> Ring[str]:
    """An empty one."""
    return Ring(max_items=JOURNAL_LINES, max_bytes=JOURNAL_BYTES)


class Gate(Protocol):
    """Where a supervisor tells its model's queue what it has for it."""

    def opened(self, backend: Backend) -> None:
        """`backend` is ready: its slots can be leased."""

    def closed(self, backend: Backend) -> None:
        """`backend` is gone, or about to be; no new lease on it."""

    def refused(self, error: RouterError) -> None:
        """Nobody who waits now will be served: tell them `error`."""

    async def out_of_memory(self) -> bool:
        """A load failed because memory is short: whether it is tried again, once there is room for it."""


@attrs.define(eq=False, kw_only=True)
class Supervisor:
    """One model's llama-server: what it is now, and the task that keeps it so."""

    model: ModelConfig
    number: int
    """Place in the configuration; names the socket."""
    launcher: Launcher
    settings: SupervisorSettings
    gate: Gate
    events: Events

    weighing: Weighing = attrs.field(init=False)
    spot: Spot = attrs.field(factory=Spot)
    """Where it is loaded: on which GPUs, and how much was reserved there."""
    state: State = State.OFF
    incarnation: int = 0
    backend: Backend | None = None
    """The incarnation that is ready, else None."""
    pid: int | None = None
    tail: LogTail = attrs.field(factory=LogTail)
    """The log of the incarnation at hand, or of the last one."""
    journal: Ring[str] = attrs.field(factory=new_journal)
    """The logs of all incarnations, one after the other: what `/logs` shows and follows."""
    health: Health = attrs.field(factory=Health)
    error: str | None = None
    """Why the last incarnation died, or the model is failed."""
    attempts: int = 0
    """Loads in a row that never became ready."""
    crashes: int = 0
    """Deaths in a row after readiness, without a request answered between them."""
    context: int | None = None
    """Tokens of one slot, from the last incarnation that was ready."""
    meta: dict[str, Any] | None = None
    """What llama-server says of the model's file, from the last incarnation that was ready."""
    exit_code: int | None = None
    """Of the last incarnation that ended by itself."""
    started_at: float | None = None
    """Unix time of the spawn of the incarnation at hand."""
    ready_at: float | None = None
    updated_at: float = attrs.field(factory=time.time)
    load_seconds: float | None = None
    """Spawn to ready, of the last load that succeeded."""
    loading_since: float | None = None
    """Trio time of the spawn of an incarnation that is not ready yet."""
    _not_before: float = -float("inf")
    """Trio time before which no incarnation is started."""
    _failed_until: float = math.inf
    """Trio time from which a failed model is tried once more."""
    _looks: set[trio.CancelScope] = attrs.field(factory=set)
    """Of those that look whether something is wrong with the backend."""

    def __attrs_post_init__(self) -> None:
        self.weighing = Weighing(self.model.alias)

    @property
    def address(self) -> Address | None:
        """Where the ready incarnation listens."""
        return None if self.backend is None else self.backend.address

    def take(self, settings: SupervisorSettings) -> None:
        """Go by these from now on, with the llama-server that runs, too; a load under way has the time it had."""
        if settings == self.settings:
            return
        self.settings = settings
        if self.backend is not None:
            self.backend.allow_silence(settings.request_timeout_seconds)
        for scope in self._looks:
            scope.cancel()

    def told_to_stop(self) -> bool:
        """Whether somebody told it to stop."""
        return self.state is State.STOPPING

    def move(self, move: Move) -> None:
        """Change state by the table, and tell."""
        before, self.state = self.state, after(self.state, move)
        self.updated_at = time.time()
        if move is Move.SPAWN:
            self.started_at = self.updated_at
        log.debug("model", model=self.model.alias, before=before.value, state=self.state.value)
        self.events.emit(ModelChanged(alias=self.model.alias))

    def reset(self) -> str | None:
        """Forget the failures; a failed model is off again. Returns what the error was."""
        previous, self.error = self.error, None
        self.attempts = self.crashes = 0
        self._not_before = -float("inf")
        if self.state is State.FAILED:
            self.move(Move.RESET)
        return previous

    @property
    def to_be_tried(self) -> bool:
        """Of a model that failed: whether that is long enough ago."""
        return trio.current_time() >= self._failed_until

    def try_again(self) -> bool:
        """Have a model that failed long enough ago be off again, for one more try; whether it was that long ago."""
        if not self.to_be_tried:
            return False
        self.attempts = self.settings.max_load_attempts - 1
        self.crashes = min(self.crashes, MAX_CRASHES - 1)
        self._not_before = -math.inf
        self.move(Move.RESET)
        return True

    def proved(self) -> None:
        """A request was answered: the backend works, earlier deaths no longer count."""
        self.crashes = 0

    async def run(self) -> None:
        """Keep one llama-server of the model running; returns when the model is failed, or was told to stop.

        The model is `starting` when this is called: whoever decided to start it reserved its place with that.
        """
        try:
            while True:
                await trio.sleep_until(self._not_before)
                await self.weighing.prepare()
                if self.told_to_stop():
                    return
                ending = await self._live()
                if self.told_to_stop() or await self._is_over(ending):
                    return
                await trio.sleep_until(self._not_before)
                if self.told_to_stop():
                    return
                self.events.emit(BackendRestarted(alias=self.model.alias))
                self.move(Move.SPAWN)
        finally:
            self.weighing.stopped()
            if self.state.resident:
                if self.state is not State.STOPPING:
                    self.move(Move.STOP)
                self.move(Move.GONE)

    async def _is_over(self, ending: Ending) -> bool:
        """Whether there is to be no successor: it has failed, or leaves memory to be loaded again where there is room."""
        if ending.short_of_memory:
            again = await self.gate.out_of_memory()
            if again or self.told_to_stop():
                self.error = ending.message
                log.warning("out of memory", model=self.model.alias, again=again, error=ending.message)
                return True
            self.attempts = max(self.attempts, self.settings.max_load_attempts - 1)  # the same again is no use
        self._count(ending)
        return self.state is State.FAILED

    def _count(self, ending: Ending) -> None:
        """Decide what a death means: another try after a pause, or the end."""
        self.error = ending.message
        if ending.was_ready:
            self.crashes += 1
            tries, limit = self.crashes, MAX_CRASHES
        else:
            self.attempts += 1
            tries, limit = self.attempts, self.settings.max_load_attempts
        self.move(Move.DIE)
        alias = self.model.alias
        if tries >= limit:
            self.move(Move.GIVE_UP)
            self._failed_until = trio.current_time() + self.settings.failed_retry_seconds
            log.error("model failed", model=alias, attempts=tries, error=ending.message)
            if ending.timed_out:
                self.gate.refused(LoadTimeout(f"model {alias!r}: {ending.message}", param="model"))
            else:
                self.gate.refused(self.failure())
            return
        if ending.timed_out:
            self.gate.refused(LoadTimeout(f"model {alias!r}: {ending.message}", param="model"))
        # the first crash of a server that was ready is answered at once
        doublings = tries - 1 if not ending.was_ready else tries - 2
        pause = 0.0 if doublings < 0 else min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2**doublings)
        pause *= random.uniform(0.8, 1.2)  # noqa: S311  (jitter, so that models that died together do not return so)
        self._not_before = trio.current_time() + pause
        log.warning("backend died", model=alias, tries=tries, again_in_seconds=round(pause, 2), error=ending.message)

    def failure(self) -> ModelFailed:
        """What a request for this model is told once it is failed."""
        alias = self.model.alias
        left = max(1, math.ceil(min(self._failed_until - trio.current_time(), MAX_RETRY_AFTER_SECONDS)))
        return ModelFailed(
            f"model {alias!r} failed and is tried again in {left} s, or when it is reset "
            f"(POST /v1/models/{alias}/reset): {self.error}",
            param="model",
            details={"model": alias, "attempts": max(self.attempts, self.crashes)},
            retry_after_seconds=left,
        )

    async def _live(self) -> Ending:
        """One incarnation, from its spawn to its end; state is `starting` before and not changed by the end."""
        self.incarnation += 1
        self.tail = LogTail()
        self.health = Health()
        self.started_at, self.ready_at = time.time(), None
        try:
            process, address = self.launcher.launch(self.model, self.number, self.incarnation, self.spot)
        except LaunchFailed as error:
            self.weighing.stopped()
            self.journal.append(f"--- {error} ---")
            self.events.emit(LoadFinished(alias=self.model.alias, result=LoadResult.FAILED, seconds=0.0))
            return Ending(kind=None, code=0, message=str(error), was_ready=False)
        self.tail, self.pid = process.tail, process.pid
        self.tail.journal = self.journal
        self.journal.append(f"--- incarnation {self.incarnation}: llama-server {self.pid} ---")
        return await self._tend(process, address)

    async def _tend(self, process: ServerProcess, address: Address) -> Ending:
        spawned = self.loading_since = trio.current_time()
        self.weighing.spawned(process)
        why: str | None = None
        timed_out = ending = False
        try:
            async with trio.open_nursery() as logs:
                logs.start_soon(process.read_log_until_stopped, self.model.alias)
                try:
                    self.move(Move.ALIVE)
                    log.info("loading", model=self.model.alias, incarnation=self.incarnation, pid=process.pid)
                    async with trio.open_nursery() as life:

                        async def exit_ends_life() -> None:
                            await process.wait()
                            life.cancel_scope.cancel()

                        life.start_soon(exit_ends_life)
                        try:
                            why = await self._serve(life, process, address, spawned)
                        except NoFiles as error:
                            why = str(error)
                        timed_out = self.backend is None
                        life.cancel_scope.cancel()
                finally:
                    ending = why == ENDING  # by itself; what with, is known when it has
                    exited = ending or process.has_exited()
                    if self.backend is not None:
                        self.backend.lose(why or ENDING)
                        self.gate.closed(self.backend)
                    # one that is condemned is not asked: it does not answer
                    condemned = why is not None and self.backend is not None
                    self.weighing.stopping()
                    code = await (process.stop_within(0) if condemned else process.stop_within())
                    self.weighing.stopped()
                    address.remove()
        finally:
            why = None if ending else why
            was_ready, self.backend = self.ready_at is not None, None
            self.pid = self.loading_since = None
            kind = self._tell_exit(exited=exited, unhealthy=why is not None, code=code)
            self.journal.append(f"--- incarnation {self.incarnation}: {kind.value}, exit status {code} ---")
            if not was_ready:
                result = LoadResult.TIMEOUT if timed_out else LoadResult.FAILED if exited else LoadResult.CANCELLED
                seconds = trio.current_time() - spawned
                self.events.emit(LoadFinished(alias=self.model.alias, result=result, seconds=seconds))
        message = why if why is not None else describe_exit(code, was_ready=was_ready)
        words = process.tail.last(LAST_WORDS_LINES)
        return Ending(
            kind=kind,
            code=code or 0,
            message=f"{message}; its last words:\n{words}" if words else message,
            was_ready=was_ready,
            timed_out=timed_out,
            short_of_memory=not was_ready and exited and short_of_memory(process.tail.lines),
        )

    async def _serve(self, life: trio.Nursery, process: ServerProcess, address: Address, spawned: float) -> str:
        """Wait for readiness, open the gate, watch; returns what was wrong. The process's exit cancels this."""
        async with backend_client(address) as client:
            with trio.move_on_after(self.settings.load_timeout_seconds) as loading:
                self.health.record(await until_ready(client, address), None)
            if loading.cancelled_caught:
                return f"llama-server was not ready {self.settings.load_timeout_seconds:g} s after its start"
            self.weighing.ready(life, process)
            self.backend = Backend(
                alias=self.model.alias,
                incarnation=self.incarnation,
                address=address,
                pid=process.pid,
                tail=process.tail,
                client=client,
                model_file=self.model.file,
                patience_seconds=self.settings.request_timeout_seconds,
                longest=longest_in(self.model.flags),
            )
            self.backend.open_slots(self.model.slots)
            await self._learn(self.backend)
            self.load_seconds = trio.current_time() - spawned
            self.loading_since = None
            self.ready_at = time.time()
            self.attempts = 0
            if self.state is State.LOADING:  # else it is stopping already, and nobody is let in
                self.move(Move.ANSWER)
                self.events.emit(LoadFinished(alias=self.model.alias, result=LoadResult.OK, seconds=self.load_seconds))
                log.info("ready", model=self.model.alias, seconds=round(self.load_seconds, 3), slots=self.model.slots)
                self.gate.opened(self.backend)
            backend = self.backend

            async def until_ill() -> str:
                return await watch(client, self.health, self.settings.health_interval_seconds)

            async def until_stuck() -> str:
                return await until_stalled(backend, self.settings.stall_timeout_seconds)

            for task in (
                partial(self._look, backend, until_ill),
                partial(self._look, backend, until_stuck),
                partial(expire_silent, backend),
                backend.attend_forsaken,
                partial(self._learn_more, backend),
            ):
                life.start_soon(task)
            return await backend.until_condemned()

    async def _look(self, backend: Backend, until_wrong: Callable[[], Awaitable[str]]) -> None:
        """Condemn `backend` for what is found; other settings have it begin anew."""
        why = None
        while why is None:
            with trio.CancelScope() as scope:
                self._looks.add(scope)
                try:
                    why = await until_wrong()
                finally:
                    self._looks.discard(scope)
        backend.condemn(why)

    async def _learn(self, backend: Backend) -> None:
        """Ask what was loaded; a server that does not say, or not soon, is no worse a server."""
        try:
            with trio.move_on_after(PROPERTIES_SECONDS) as patience:
                props = await backend.client.props()
        except NoAnswer as error:
            log.warning("no properties", model=self.model.alias, error=str(error))
            return
        if patience.cancelled_caught:
            log.warning("no properties", model=self.model.alias, error=f"none within {PROPERTIES_SECONDS:g} s")
            return
        build = props.get("build_info")
        backend.genuine = isinstance(build, str) and BUILD.match(build) is not None
        backend.pins = backend.genuine and props.get("total_slots") == len(backend.slots)
        settings = props.get("default_generation_settings")
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
        if isinstance(context, int):
            backend.context = self.context = context

    async def _learn_more(self, backend: Backend) -> None:
        """What nobody waits for."""
        try:
            self.meta = await backend.client.meta()
        except NoAnswer as error:
            log.warning("no description", model=self.model.alias, error=str(error))

    def _tell_exit(self, *, exited: bool, unhealthy: bool, code: int | None) -> ExitKind:
        kind = (
            ExitKind.STOPPED if not exited and not unhealthy
            else ExitKind.UNHEALTHY if unhealthy
            else ExitKind.KILLED if code is not None and code < 0
            else ExitKind.EXITED
        )  # fmt: skip
        self.exit_code = code
        self.events.emit(BackendExited(alias=self.model.alias, incarnation=self.incarnation, kind=kind, code=code or 0))
        return kind
