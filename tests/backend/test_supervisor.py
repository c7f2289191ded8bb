"""The supervisor on real processes: tiny scripts, and the fake llama-server. Its timing is tested in `tests/fleet`."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import httpx
import pytest
import trio

from tests.backend.peer import descriptors, until
from tests.harness.processes import is_alive
from trio_router.backend import supervisor as module
from trio_router.backend.backend import Backend
from trio_router.backend.ending import describe_exit
from trio_router.backend.launch import Launcher
from trio_router.backend.lifecycle import Move, State
from trio_router.backend.settings import SupervisorSettings
from trio_router.backend.supervisor import Supervisor
from trio_router.config import LlamaServer
from trio_router.config.schema import BackendTransport, ModelConfig
from trio_router.errors import LoadTimeout, ModelFailed, RouterError
from trio_router.telemetry.events import (
    BackendExited,
    BackendRestarted,
    Event,
    Events,
    LoadFinished,
    ModelChanged,
)

pytestmark = pytest.mark.process


@attrs.define(eq=False)
class Gate:
    """What the supervisor told its model's queue."""

    tries: int = 0
    """How often a load that failed for memory is tried again."""
    record: list[str] = attrs.field(factory=list)
    refusals: list[RouterError] = attrs.field(factory=list)
    backends: list[Backend] = attrs.field(factory=list)
    changed: trio.Event = attrs.field(factory=trio.Event)

    def _note(self, what: str) -> None:
        self.record.append(what)
        self.changed.set()
        self.changed = trio.Event()

    def opened(self, backend: Backend) -> None:
        self.backends.append(backend)
        self._note("opened")

    def closed(self, backend: Backend) -> None:
        assert backend is self.backends[-1]
        self._note("closed")

    def refused(self, error: RouterError) -> None:
        self.refusals.append(error)
        self._note("refused")

    async def out_of_memory(self) -> bool:
        self._note("out of memory")
        return self.record.count("out of memory") <= self.tries

    async def until(self, what: str, count: int = 1) -> None:
        with trio.fail_after(10):
            while self.record.count(what) < count:
                await self.changed.wait()


@attrs.define(eq=False)
class Stage:
    """A supervisor, and everything that it said."""

    supervisor: Supervisor
    gate: Gate
    folder: Path
    events: list[Event] = attrs.field(factory=list)
    states: list[str] = attrs.field(factory=list)

    def hear(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, ModelChanged):
            state = self.supervisor.state.value
            if not self.states or self.states[-1] != state:
                self.states.append(state)

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    async def run(self) -> None:
        self.supervisor.move(Move.SPAWN)
        await self.supervisor.run()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """In the background; leaving is cancelling it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.run)
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture
def stage(sockets, header_gguf):
    """Makes stages on a server that is a script, or any program."""

    def make(
        server: str | Path, *flags: str, load_timeout: float = 10, attempts: int = 1, interval: float = 30, **options
    ):
        if isinstance(server, str):
            path = sockets / "llama-server"
            path.write_text("#!/bin/sh\n" + server)
            path.chmod(0o755)
        else:
            path = server
        gate, events = Gate(), Events()
        supervisor = Supervisor(
            model=ModelConfig(alias="qwen", model_path=str(header_gguf), file=header_gguf, flags=flags, slots=2),
            number=0,
            launcher=Launcher(
                server=LlamaServer(path=path),
                folder=lambda: sockets,
                transport=options.get("transport", BackendTransport.UNIX),
            ),
            settings=SupervisorSettings(
                load_timeout_seconds=load_timeout,
                request_timeout_seconds=30,
                health_interval_seconds=interval,
                max_load_attempts=attempts,
            ),
            gate=gate,
            events=events,
        )
        made = Stage(supervisor, gate, sockets)
        events.sinks.append(made.hear)
        return made

    return make


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.01)


@pytest.mark.parametrize("transport", BackendTransport)
async def test_ready_and_stopped(stage, fake_llama, transport):
    on = stage(fake_llama, transport=transport)
    before = descriptors()
    async with on.running():
        await on.gate.until("opened")
        supervisor = on.supervisor
        (backend,) = on.gate.backends
        assert (supervisor.state, supervisor.incarnation, supervisor.backend) == (State.READY, 1, backend)
        assert len(backend.slots) == 2
        assert backend.pid == supervisor.pid
        assert is_alive(backend.pid)
        connection = await backend.slots[0].connect()
        await connection.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b"")
        assert (await connection.receive_head()).status in {200, 401}
        await until(lambda: supervisor.context is not None)
        assert supervisor.load_seconds is not None
        assert 0 < supervisor.load_seconds < 5
    assert on.gate.record == ["opened", "closed"]
    assert on.states == ["starting", "loading", "ready", "stopping", "off"]
    assert not is_alive(backend.pid)
    assert (supervisor.backend, supervisor.pid, supervisor.error) == (None, None, None)
    assert backend.gone.is_set()
    assert connection.closed
    assert [event.result.value for event in on.of(LoadFinished)] == ["ok"]
    assert [(event.kind.value, event.incarnation) for event in on.of(BackendExited)] == [("stopped", 1)]
    assert [path.name for path in on.folder.iterdir() if path.suffix == ".sock"] == []
    assert descriptors() == before


async def test_readiness_is_noticed_within_30_ms(stage, fake_llama):
    on = stage(fake_llama, "--fake-load-seconds", "0.3")
    async with on.running():
        await on.gate.until("opened")
        assert 0.3 <= on.supervisor.load_seconds < 0.3 + 0.5  # the interpreter's start is in it


async def test_its_last_words_are_the_clients(stage):
    on = stage("echo loading; echo 'error: unknown argument: --wrong' >&2; exit 1")
    await on.run()
    assert on.states == ["starting", "loading", "crashed", "failed"]
    (error,) = on.gate.refusals
    assert isinstance(error, ModelFailed)
    assert "ended before it was ready with exit status 1" in error.message
    assert "error: unknown argument: --wrong" in error.message
    assert "/v1/models/qwen/reset" in error.message
    assert error.details == {"model": "qwen", "attempts": 1}
    assert error.retry_after_seconds
    assert [event.result.value for event in on.of(LoadFinished)] == ["failed"]
    assert [(event.kind.value, event.code) for event in on.of(BackendExited)] == [("exited", 1)]


async def test_one_without_words(stage):
    on = stage("exit 0")
    await on.run()
    assert on.supervisor.error == "llama-server ended before it was ready with exit status 0"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ILL", "by SIGILL: it was compiled for instructions that this CPU does not have"),
        ("KILL", "by SIGKILL: somebody killed it, or the system ran out of memory"),
        ("SEGV", "by SIGSEGV"),
    ],
)
async def test_a_death_by_signal_is_explained(stage, name, hint):
    on = stage(f"ulimit -c 0; kill -{name} $$")
    await on.run()
    assert on.supervisor.error is not None
    assert on.supervisor.error.startswith(f"llama-server ended before it was ready {hint}")
    assert [event.kind.value for event in on.of(BackendExited)] == ["killed"]


@pytest.mark.parametrize("number", [0, 1, 255, -9, -4, -64, -200, None])
@pytest.mark.parametrize("was_ready", [False, True])
def test_every_end_has_a_sentence(number, was_ready):
    said = describe_exit(number, was_ready=was_ready)
    assert said.startswith("llama-server ended")
    assert ("before it was ready" in said) != was_ready


async def test_a_server_that_is_no_program(stage, sockets):
    text = sockets / "text"
    text.write_text("I am not a program")
    for path, why in ((text, "Permission denied"), (sockets / "none", "No such file or directory")):
        on = stage(path)
        await on.run()
        assert on.supervisor.state is State.FAILED
        assert f"cannot execute {path}: {why}" in (on.supervisor.error or "")


async def test_a_model_that_is_gone(stage, fake_llama, sockets):
    on = stage(fake_llama, attempts=2)
    on.supervisor.model = attrs.evolve(on.supervisor.model, file=sockets / "gone.gguf")
    await on.run()
    assert on.states == ["starting", "crashed", "starting", "crashed", "failed"]
    assert "no such file" in (on.supervisor.error or "")
    assert on.of(BackendExited) == []
    assert on.supervisor.pid is None


async def test_never_ready_is_a_load_timeout(stage, fake_llama):
    on = stage(fake_llama, "--fake-never-ready", load_timeout=0.3, attempts=2)
    await on.run()
    assert [type(error) for error in on.gate.refusals] == [LoadTimeout, LoadTimeout]
    assert "was not ready 0.3 s after its start" in on.gate.refusals[0].message
    assert [event.result.value for event in on.of(LoadFinished)] == ["timeout", "timeout"]
    assert on.supervisor.state is State.FAILED
    assert on.supervisor.failure().code == "model_failed"


async def test_never_listening_is_one_too(stage):
    on = stage("echo thinking; sleep 100", load_timeout=0.3)
    await on.run()
    assert isinstance(on.gate.refusals[0], LoadTimeout)
    assert "thinking" in on.gate.refusals[0].message


async def test_it_is_tried_again_after_a_bad_start(stage, fake_llama, tmp_path):
    on = stage(fake_llama, "--fake-fail-first", "2", "--fake-state", str(tmp_path / "state"), attempts=3)
    async with on.running():
        await on.gate.until("opened")
        assert on.supervisor.incarnation == 3
        assert on.supervisor.attempts == 0
        assert len(on.of(BackendRestarted)) == 2
    assert on.gate.refusals == []


async def test_a_crash_is_healed_and_those_who_use_it_are_told(stage, fake_llama):
    on = stage(fake_llama)
    async with on.running():
        await on.gate.until("opened")
        first = on.gate.backends[0]
        os.kill(first.pid, signal.SIGKILL)
        await on.gate.until("opened", 2)
        second = on.gate.backends[1]
        assert on.gate.record == ["opened", "closed", "opened"]
        assert first.gone.is_set()
        assert not first.unloaded
        assert (first.incarnation, second.incarnation) == (1, 2)
        assert first.address != second.address
        assert first.address.path is not None
        assert first.address.path not in map(str, on.folder.iterdir())
        assert on.supervisor.crashes == 1
        on.supervisor.proved()
        assert on.supervisor.crashes == 0
    assert [event.kind.value for event in on.of(BackendExited)] == ["killed", "stopped"]


async def test_crash_after_crash_is_a_failure_that_a_reset_forgives(stage, fake_llama):
    on = stage(fake_llama, "--fake-exit-after-ready", "0.5", attempts=100)
    await on.run()
    assert on.gate.record.count("opened") == module.MAX_CRASHES
    assert on.supervisor.state is State.FAILED
    assert "llama-server ended with exit status 1" in (on.supervisor.error or "")
    assert on.supervisor.reset() is not None
    assert (on.supervisor.state, on.supervisor.crashes, on.supervisor.error) == (State.OFF, 0, None)


async def test_one_that_hangs_is_replaced(stage, fake_llama, monkeypatch):
    monkeypatch.setattr("trio_router.backend.client.TIMEOUT", httpx.Timeout(0.1))
    on = stage(fake_llama, "--fake-health-hang-after-ready", interval=0.05)
    async with on.running():
        await on.gate.until("closed")
        assert "failed 3 health checks in a row" in (on.gate.backends[0].lost or "")
    assert on.of(BackendExited)[0].kind.value == "unhealthy"


@pytest.mark.parametrize("script", ["sleep 100", "trap '' TERM; while :; do sleep 0.01; done", "exit 1"])
async def test_cancelled_at_any_moment_nothing_is_left(stage, monkeypatch, script):
    monkeypatch.setattr(module.ServerProcess.stop_within, "__defaults__", (0.1,))
    for pause in (0, 0.001, 0.01, 0.05, 0.2):
        on = stage(script, attempts=1000)
        pids = set()
        async with on.running():
            await trio.sleep(pause)
            if on.supervisor.pid is not None:
                pids.add(on.supervisor.pid)
        assert on.supervisor.state is State.OFF
        assert on.supervisor.pid is None
        assert not [pid for pid in pids if is_alive(pid)]
        assert list(on.folder.glob("*.sock")) == []


async def test_a_cancelled_load_is_counted_as_one(stage):
    on = stage("sleep 100")
    async with on.running():
        await until(lambda: on.supervisor.state is State.LOADING)
    assert [event.result.value for event in on.of(LoadFinished)] == ["cancelled"]
    assert [event.kind.value for event in on.of(BackendExited)] == ["stopped"]
    assert on.gate.record == []


async def test_props_that_are_nonsense_hurt_nobody(stage, fake_llama, monkeypatch):
    async def props(self) -> dict:
        return {"default_generation_settings": [1, 2], "n_ctx": "many"}

    monkeypatch.setattr("trio_router.backend.client.BackendClient.props", props)
    on = stage(fake_llama)
    async with on.running():
        await on.gate.until("opened")
        await trio.sleep(0.02)
        assert on.supervisor.context is None
        assert on.supervisor.state is State.READY


async def test_out_of_memory_is_a_case_of_its_own(stage, fake_llama):
    """It leaves memory to be placed anew as often as the gate says so; then it has failed, however many tries are left."""
    on = stage(fake_llama, "--fake-oom", attempts=5)
    on.gate.tries = 2
    for _ in range(2):
        await on.run()
        assert on.supervisor.state is State.OFF
        assert "out of memory" in on.supervisor.error
    assert on.gate.refusals == []
    await on.run()
    assert on.supervisor.state is State.FAILED
    assert on.gate.record == ["out of memory", "out of memory", "out of memory", "refused"]
    assert "out of memory" in on.gate.refusals[0].message


async def test_another_failure_is_not(stage, fake_llama):
    on = stage(fake_llama, "--fake-exit-at-start", "1", "--fake-words", "error: unknown model architecture", attempts=2)
    await on.run()
    assert on.gate.record == ["refused"]
