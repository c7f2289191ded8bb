"""A fleet in which everything goes wrong at once, for a long time, and then is quiet.

A hundred thousand requests by default, 40 s of one core. For longer: `TRIO_ROUTER_STORM=1000000`, and another seed:
`TRIO_ROUTER_SEED=8`.
"""

import math
import os
from collections import Counter
from random import Random

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.fleet.chance import seed_trio
from tests.fleet.fake_servers import NEVER, FakeServers, Plan
from tests.fleet.fleet import Fleet, running
from trio_router.backend.backend import Slot
from trio_router.backend.connection import BackendLost
from trio_router.backend.lifecycle import State
from trio_router.config.schema import RouterConfig
from trio_router.errors import RouterError
from trio_router.fleet.dispatch import dispatch
from trio_router.fleet.reload import compare
from trio_router.fleet.scheduler import IDLE, Priority
from trio_router.telemetry.events import Event, ModelChanged

MODELS = {"a": 1, "b": 2, "c": 3, "d": 1, "e": 2}
PLACES = 2
REQUESTS = int(os.environ.get("TRIO_ROUTER_STORM", "100000"))
SEED = int(os.environ.get("TRIO_ROUTER_SEED", "7"))
PRIORITIES = list(Priority)


@attrs.define(eq=False, repr=False)
class Storm:
    """What happens to the fleet, and what must hold meanwhile."""

    fleet: Fleet
    random: Random
    ends: Counter[str] = attrs.field(factory=Counter)
    original: RouterConfig = attrs.field(init=False)
    held: Counter[Slot] = attrs.field(factory=Counter)
    looks: int = 0

    def __attrs_post_init__(self) -> None:
        self.original = self.fleet.registry.config

    def watch(self, event: Event) -> None:
        if isinstance(event, ModelChanged):
            assert sum(model.state.resident for model in self.fleet.registry.everyone()) <= PLACES

    # --- what clients do

    async def request(self, alias: str, priority: Priority, seconds: float, patience: float) -> None:
        registry = self.fleet.registry
        deadly = self.random.random() < 0.002

        async def attempt(slot: Slot) -> None:
            assert slot.backend.alias == alias
            if slot.backend.lost is not None:
                raise BackendLost("cannot connect")
            if deadly:
                self.fleet.servers.alive[alias].die()
            with trio.move_on_after(seconds * 0.25):
                await slot.backend.gone.wait()
                raise BackendLost("the connection broke")
            if self.random.random() < 0.01:
                raise BackendLost("answered nonsense", stale=self.random.random() < 0.5)

        with trio.move_on_after(patience) as scope:
            try:
                client = self.random.choice(["", "x", "y"])
                ticket = registry.ticket(alias, priority, client, weight=1.0 + len(client))
                lease, _ = await dispatch(registry, ticket, attempt)
            except RouterError as error:
                self.ends[error.code] += 1
                return
            slot = lease.slot
            self.held[slot] += 1
            assert self.held[slot] == 1, "a slot is one request's at a time"
            try:
                with trio.move_on_after(seconds * 0.75):
                    await slot.backend.gone.wait()
                    await trio.sleep(self.random.choice([0, 0, 0.25, 5]))  # a slow client does not notice at once
                self.ends["broken off" if slot.backend.lost else "served"] += 1
            finally:
                self.held[slot] -= 1
                lease.release()
        if scope.cancelled_caught:
            self.ends["cancelled"] += 1

    async def requests(self) -> None:
        random = self.random
        async with trio.open_nursery() as nursery:
            for number in range(REQUESTS):
                if random.random() < 0.15:
                    await trio.sleep(random.randrange(1, 12) / 4)
                favourite = "abcde"[number // 500 % 5]  # times of one model, and times of all
                nursery.start_soon(
                    self.request,
                    favourite if random.random() < 0.6 else random.choice("abcde"),
                    random.choice(PRIORITIES),
                    random.choice([0, 0.25, 0.5, 1, 1, 2, 4]),
                    random.choice([math.inf, math.inf, math.inf, 0, 0.25, 1, 3, 10]),
                )

    # --- what operators do

    async def operate(self) -> None:
        random, registry = self.random, self.fleet.registry
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(random.randrange(0, 16) / 4)
                alias = random.choice("abcde")
                if alias not in registry.models:
                    self.reload()
                    continue
                match random.randrange(6):
                    case 0:
                        nursery.start_soon(self.command, registry.eject, alias, random.choice([math.inf, 0.25, 4]))
                    case 1:
                        nursery.start_soon(self.force, alias)
                    case 2:
                        nursery.start_soon(self.command, registry.load, alias, random.choice([math.inf, 0, 0.25, 4]))
                    case 3:
                        if registry.models[alias].state is not State.FAILED:
                            registry.load_soon(alias)
                    case 4:
                        for failed in registry.models:
                            registry.reset(failed)
                    case 5:
                        self.reload()

    async def command(self, does, alias: str, patience: float) -> None:
        with trio.move_on_after(patience):
            try:
                await does(alias)
                self.ends[f"{does.__name__} done"] += 1
            except RouterError as error:
                self.ends[f"{does.__name__} {error.code}"] += 1

    def reload(self, *, wanted: dict[str, int] | None = None) -> None:
        """Go by another configuration: models with other slots, fewer models, or all of them as they were."""
        registry = self.fleet.registry
        if wanted is None:
            wanted = {
                alias: slots if self.random.random() < 0.7 else self.random.randrange(1, 4)
                for alias, slots in MODELS.items()
                if self.random.random() < 0.9
            }
        models = {
            alias: attrs.evolve(self.original.models[alias], slots=slots, flags=("--parallel", str(slots)))
            for alias, slots in wanted.items()
        }
        preload = tuple(alias for alias in self.original.system.preload_models if alias in models)
        system = attrs.evolve(self.original.system, preload_models=preload)
        registry.apply(compare(registry.config, attrs.evolve(self.original, models=models, system=system)))
        self.ends["reload"] += 1

    async def force(self, alias: str) -> None:
        if alias in self.fleet.registry.models:  # else it was taken out since
            await self.fleet.registry.eject(alias, force=True)
            self.ends["force done"] += 1

    # --- what llama-servers do

    async def break_servers(self) -> None:
        random, servers = self.random, self.fleet.servers
        while True:
            await trio.sleep(random.randrange(0, 60) / 4)
            for alias in MODELS:
                servers.plans[alias] = Plan(
                    load_seconds=random.choice([0, 0.25, 0.25, 0.25, 1, 1, 3, NEVER]),
                    stop_seconds=random.choice([0, 0, 0.25, 2]),
                    refused="out of files" if random.random() < 0.03 else None,
                    dies_with=1 if random.random() < 0.05 else None,
                )
            if servers.alive and random.random() < 0.7:
                server = random.choice(list(servers.alive.values()))
                if random.random() < 0.7:
                    server.die(random.choice([0, 1, -6, -9]))
                else:
                    server.fall_ill("failed 3 health checks in a row")
            for model in self.fleet.registry.everyone():
                if random.random() < 0.5:
                    model.supervisor.proved()

    # --- what must hold whenever nothing moves

    async def check(self) -> None:
        registry = self.fleet.registry
        while True:
            await trio.sleep(0.25 * self.random.randrange(1, 24))
            await wait_all_tasks_blocked()
            decision = registry._decide()
            assert decision.actions == (), "the registry was not woken for what it should do now"
            assert registry.someone_waits or not decision.someone_waits
            assert registry._inbox.statistics().current_buffer_used == 0
            for model in registry.everyone():
                scheduler = model.scheduler
                assert not (scheduler._free and scheduler.waiting), "a free slot, and somebody waits"
                assert scheduler.paused == (model.alias in decision.yielding)
                assert not (scheduler.paused and scheduler._free)
                assert (scheduler.backend is None) or model.state is State.READY
                assert (model.retiring is not None) == (model.state is State.STOPPING)
                assert (model.scope is not None) == model.state.resident
                if model.state is State.FAILED:
                    assert not scheduler.waiting
                    assert not model.asked
                    assert not model.kept
            self.looks += 1


@pytest.mark.once
@pytest.mark.timeout(900)  # 100 s of computing where nobody else computes
def test_a_long_storm() -> None:
    servers = FakeServers()

    async def main() -> None:
        async with running(
            servers,
            MODELS,
            max_concurrent_models=PLACES,
            preload_models=("a", "b", "c"),
            queue_timeout_sec=20,
            load_timeout_sec=8,
            drain_timeout_sec=3,
            idle_timeout_sec=15,
            aging_sec=5,
            max_queue_size_per_model=12,
        ) as fleet:
            fleet.registry.events.sinks[:] = []
            storm = Storm(fleet, Random(SEED))
            fleet.registry.events.sinks.append(storm.watch)
            async with trio.open_nursery() as weather:
                weather.start_soon(storm.break_servers)
                weather.start_soon(storm.check)
                weather.start_soon(storm.operate)
                await storm.requests()
                weather.cancel_scope.cancel()
            requests = Counter(
                {
                    end: count
                    for end, count in storm.ends.items()
                    if end.split()[0] not in {"eject", "load", "force", "reload"}
                }
            )
            assert requests.total() == REQUESTS
            assert requests["served"] > REQUESTS / 5  # many wait for models that make room for each other
            assert storm.ends["reload"] > REQUESTS / 100
            assert set(requests) == {
                "served", "broken off", "backend_crashed", "cancelled", "queue_full", "queue_timeout", "load_timeout",
                "model_failed", "backend_unavailable", "bad_backend_response", "model_not_found",
            }  # fmt: skip
            assert storm.looks > REQUESTS / 200
            assert storm.held.total() == 0
            assert servers.most_alive == PLACES

            # the weather clears up: each model can be used, and then all are let go
            servers.plans.clear()
            storm.reload(wanted=MODELS)
            await trio.sleep(10)
            for model in fleet.registry.models.values():
                assert (model.scheduler.active, model.scheduler.waiting) == (0, 0)
                fleet.registry.reset(model.alias)
            async with trio.open_nursery() as clients:
                for alias in MODELS:
                    clients.start_soon(fleet.ask, alias)
            assert len(fleet.of("runs")) == len(MODELS)
            await trio.sleep(60)
            for model in fleet.registry.models.values():
                assert model.state is State.OFF
                assert model.scheduler.statistics() == IDLE
                assert not any(rank._next or rank._by_age or rank._by_turn for rank in model.scheduler._ranks.values())
                assert (model.asked, model.kept, model.preload, model.retiring) == (0, False, False, None)

    print(f"seed {SEED}")
    seed_trio(SEED)
    trio.run(main, clock=MockClock(autojump_threshold=0))
