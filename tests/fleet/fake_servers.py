"""llama-servers that live in virtual time: no process and no socket, but the real supervisor around them."""

import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import attrs
import pytest
import trio

from trio_router.backend import supervisor
from trio_router.backend.address import Address
from trio_router.backend.client import NoAnswer
from trio_router.backend.health import Health
from trio_router.backend.launch import LaunchFailed
from trio_router.backend.logtail import LogTail
from trio_router.config.schema import ModelConfig
from trio_router.memory.room import Spot

NEVER = math.inf
"""Seconds."""


@attrs.define(eq=False, kw_only=True)
class Plan:
    """How the servers of a model behave that are launched from now on."""

    load_seconds: float = 1.0
    """Spawn to ready; infinite for a server that hangs."""
    refused: str | None = None
    """Why none can be launched."""
    dies_with: int | None = None
    """The exit status with which it ends instead of becoming ready."""
    stop_seconds: float = 0.0
    """From being told to stop to its exit."""
    words: str = ""
    """What it writes to its log."""
    context: int | None = None


@attrs.define(eq=False, repr=False)
class FakeServer:
    """One llama-server. Stands for `ServerProcess`, for the client that asks it, and for what that is told."""

    alias: str
    incarnation: int
    pid: int
    plan: Plan
    fleet: "FakeServers"
    tail: LogTail = attrs.field(factory=LogTail)
    code: int | None = None
    illness: str = ""
    hear: Any = None
    name: str = ""
    """Tells the replicas of a model apart."""
    _exit: trio.Event = attrs.field(factory=trio.Event)
    _ill: trio.Event = attrs.field(factory=trio.Event)
    _reaped: trio.Event = attrs.field(factory=trio.Event)

    # --- what a test does to it

    def die(self, code: int = -9) -> None:
        """End by itself."""
        if self.code is None:
            self.code = code
            self._exit.set()

    def fall_ill(self, why: str) -> None:
        """Fail its health checks."""
        self.illness = why
        self._ill.set()

    # --- ServerProcess

    async def read_log_until_stopped(self, name: str) -> None:
        assert name == self.alias
        if self.plan.words:
            for line in self.tail.feed(self.plan.words.encode() + b"\n"):
                if self.hear is not None:
                    self.hear(line)
        await self._reaped.wait()

    async def wait(self) -> None:
        await self._exit.wait()

    def has_exited(self) -> bool:
        return self.code is not None

    async def stop_within(self, term_seconds: float | None = None) -> int | None:
        with trio.CancelScope(shield=True):
            if self.code is None:
                await trio.sleep(self.plan.stop_seconds if term_seconds is None else term_seconds)
                self.die(-15)
        self._reaped.set()
        self.fleet.gone(self)
        return self.code

    # --- BackendClient, and `until_ready` and `watch`, which use it

    async def props(self) -> dict[str, Any]:  # at once: virtual times are those of loads alone
        if self.plan.context is None:
            raise NoAnswer("/props answered 501")
        return {"default_generation_settings": {"n_ctx": self.plan.context}}

    async def meta(self) -> dict[str, Any] | None:
        await trio.lowlevel.checkpoint()
        return {"n_params": 1}

    async def metrics(self) -> str:
        await trio.lowlevel.checkpoint()
        return "llamacpp:n_decode_total 1\n"

    async def until_ready(self) -> float:
        await trio.sleep(self.plan.load_seconds)
        if self.plan.dies_with is not None:
            self.die(self.plan.dies_with)
            await trio.sleep_forever()
        return PROBE_SECONDS

    async def watch(self) -> str:
        await self._ill.wait()
        return self.illness


PROBE_SECONDS = 0.002
"""What the answer took that said that it is ready."""


@attrs.define(eq=False, repr=False)
class FakeServers:
    """All of them. Stands for the `Launcher`."""

    plans: dict[str, Plan] = attrs.field(factory=dict)
    alive: dict[str, FakeServer] = attrs.field(factory=dict)
    most_alive: int = 0
    launches: Counter[str] = attrs.field(factory=Counter)
    spots: dict[str, Spot] = attrs.field(factory=dict)
    """Where each was launched last."""
    jitters: list[tuple[float, float]] = attrs.field(factory=list)
    jitter: float = 1.0
    """What `random.uniform` returns."""

    def plan(self, alias: str) -> Plan:
        """That of a model, to be changed."""
        return self.plans.setdefault(alias, Plan())

    def launch(self, model: ModelConfig, number: int, incarnation: int, spot: Spot) -> tuple[FakeServer, Address]:
        self.spots[model.alias] = spot
        self.launches[model.alias] += 1
        plan = attrs.evolve(self.plan(model.alias))
        if plan.refused is not None:
            raise LaunchFailed(plan.refused)
        name = model.alias if model.replicas == 1 else f"{model.alias}#{number}"
        assert name not in self.alive, "a model, and each replica, has one llama-server at a time"
        server = FakeServer(model.alias, incarnation, pid=self.launches.total(), plan=plan, fleet=self, name=name)
        self.alive[name] = server
        self.most_alive = max(self.most_alive, len(self.alive))
        return server, Address(port=server.pid)

    def gone(self, server: FakeServer) -> None:
        assert self.alive.pop(server.name) is server

    def uniform(self, low: float, high: float) -> float:
        self.jitters.append((low, high))
        return self.jitter

    @contextmanager
    def installed(self) -> Iterator["FakeServers"]:
        """In the place of processes, of httpx, and of chance."""

        @asynccontextmanager
        async def backend_client(address: Address) -> AsyncIterator[FakeServer]:
            yield next(server for server in self.alive.values() if server.pid == address.port)

        async def until_ready(client: FakeServer, address: Address) -> float:
            return await client.until_ready()

        async def watch(client: FakeServer, health: Health, interval_seconds: float) -> str:
            return await client.watch()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(supervisor, "backend_client", backend_client)
            patch.setattr(supervisor, "until_ready", until_ready)
            patch.setattr(supervisor, "watch", watch)
            patch.setattr(supervisor, "random", self)
            yield self
