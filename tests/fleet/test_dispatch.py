"""The numbers are those of the cases in `dispatch`'s docstring."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.fleet.fake_backend import FakeConnection, connect
from tests.fleet.fake_servers import FakeServer, FakeServers
from tests.fleet.fleet import HIGH, LOW, NORMAL, Fleet, running
from trio_router.backend.backend import Slot
from trio_router.backend.connection import BackendLost
from trio_router.backend.lifecycle import State
from trio_router.errors import (
    BackendBroken,
    BackendCrashed,
    BackendTimeout,
    BackendUnavailable,
    ModelFailed,
    QueueTimeout,
    ShuttingDown,
)
from trio_router.fleet.dispatch import DEATH_SECONDS, dispatch
from trio_router.fleet.scheduler import Lease

BROKE = "the connection broke"
STALE = BackendLost("the connection was closed without an answer", stale=True)

Act = Callable[[Slot], Awaitable[str]]


@attrs.define(eq=False, repr=False)
class Request:
    """One that does something else at each try."""

    fleet: Fleet
    acts: list[Act]
    tries: list[Slot] = attrs.field(factory=list)
    connections: list[FakeConnection] = attrs.field(factory=list)
    began_at: list[float] = attrs.field(factory=list)

    async def attempt(self, slot: Slot) -> str:
        if slot.connection is None:  # as `Slot.connect` does
            self.connections.append(connect(slot))
        self.tries.append(slot)
        self.began_at.append(trio.current_time())
        return await self.acts[len(self.tries) - 1](slot)

    async def run(self) -> tuple[Lease, str]:
        return await dispatch(self.fleet.registry, self.fleet.registry.ticket("a", NORMAL), self.attempt)

    @property
    def incarnations(self) -> list[int]:
        return [slot.backend.incarnation for slot in self.tries]


async def answers(slot: Slot) -> str:
    await trio.sleep(1)
    return "answer"


def breaks(error: BackendLost | None = None) -> Act:
    """The connection breaks, and llama-server lives on."""

    async def act(slot: Slot) -> str:
        await trio.sleep(1)
        raise error or BackendLost(BROKE)

    return act


def dies(fleet: Fleet, *, after: float = 0.0) -> Act:
    """The connection breaks; the process is gone so long after that."""

    async def die(server: FakeServer) -> None:
        await trio.sleep(after)
        server.die()

    async def act(slot: Slot) -> str:
        await trio.sleep(1)
        fleet.nursery.start_soon(die, fleet.servers.alive["a"])
        raise BackendLost(BROKE)

    return act


async def hangs(slot: Slot) -> str:
    await slot.backend.gone.wait()
    raise BackendLost(BROKE)


@asynccontextmanager
async def ready(servers: FakeServers, slots: int = 1, **system) -> AsyncIterator[Fleet]:
    """A fleet whose model `a` is ready; afterwards no lease of it is out."""
    async with running(servers, {"a": slots}, **system) as fleet:
        await fleet.registry.load("a")
        yield fleet
        await wait_all_tasks_blocked()
        assert (fleet["a"].scheduler.active, fleet["a"].scheduler.waiting) == (0, 0)


async def test_0_a_slot_that_is_yielded(servers: FakeServers, autojump_clock: MockClock) -> None:
    """Whatever the broken connection looks like: queued again, behind the one it is for."""
    async with ready(servers) as fleet:

        async def yields(slot: Slot) -> str:
            await trio.sleep(1)
            ticket.yielded = True
            fleet.soon("a", 5, name="high", priority=HIGH)
            await wait_all_tasks_blocked()
            raise STALE

        ticket = fleet.registry.ticket("a", LOW)
        request = Request(fleet, [yields, answers])
        lease, answer = await dispatch(fleet.registry, ticket, request.attempt)
        began = request.began_at[0]
        assert answer == "answer"
        assert request.began_at == [began, began + 6]
        assert fleet.of("runs") == [f"{began + 1:g} high runs"]
        assert (ticket.yielded, ticket.requeued) == (False, True)
        lease.release()


async def test_the_lease_of_an_answer_is_the_callers(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        request = Request(fleet, [answers])
        lease, answer = await request.run()
        assert (answer, lease.slot, lease.released) == ("answer", request.tries[0], False)
        assert fleet["a"].scheduler.active == 1
        assert not request.connections[0].closed
        lease.release()


# --- the cases ---------------------------------------------------------------------------------------


async def test_1_a_stale_connection_is_replaced_on_the_same_slot(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with ready(servers) as fleet:
        request = Request(fleet, [breaks(STALE), answers])
        lease, answer = await request.run()
        assert answer == "answer"
        assert request.tries == [lease.slot, lease.slot]
        assert request.began_at == [1, 2], "at once"
        assert [connection.closed for connection in request.connections] == [True, False]
        lease.release()


async def test_1_but_once_only(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        request = Request(fleet, [breaks(STALE), breaks(STALE), answers])
        with pytest.raises(BackendBroken):
            await request.run()
        assert len(request.tries) == 2
        assert [connection.closed for connection in request.connections] == [True, True]


async def test_1_then_the_other_cases_hold(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        request = Request(fleet, [breaks(STALE), dies(fleet), answers])
        lease, _ = await request.run()
        assert request.incarnations == [1, 1, 2]
        lease.release()


async def test_2_a_backend_that_lives_on_is_not_asked_again(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        request = Request(fleet, [breaks(BackendLost("it answered with something that is not HTTP (x)"))])
        with pytest.raises(BackendBroken) as caught:
            await request.run()
        error = caught.value
        assert error.message == "the llama-server of model 'a': it answered with something that is not HTTP (x)"
        assert (error.status, error.code, error.details) == (502, "bad_backend_response", {"model": "a"})
        assert isinstance(error.__cause__, BackendLost)
        assert trio.current_time() == 2 + DEATH_SECONDS, "it was given the time to die"
        assert request.connections[0].closed
        assert fleet.states == "ready"


async def test_2_one_that_cannot_be_reached_is_not_blamed(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        request = Request(fleet, [breaks(BackendLost("cannot connect to x: Too many open files", unsent=True))])
        with pytest.raises(BackendUnavailable, match=r"^model 'a': cannot connect to x: Too many open files$"):
            await request.run()


@pytest.mark.parametrize("force", [False, True])
async def test_3_ejected(force: bool, servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers, drain_timeout_sec=5) as fleet:
        request = Request(fleet, [hangs, answers])
        fleet.nursery.start_soon(lambda: fleet.eject("a", force=force))
        with pytest.raises(BackendUnavailable, match=r"^model 'a' was unloaded while the request ran$") as caught:
            await request.run()
        assert (caught.value.status, caught.value.code) == (503, "backend_unavailable")
        assert len(request.tries) == 1


async def test_3_shutting_down(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        request = Request(fleet, [hangs])

        async def shut_down() -> None:
            await fleet.registry.drain(5)
            await fleet.eject("a", force=True)

        fleet.nursery.start_soon(shut_down)
        with pytest.raises(ShuttingDown):
            await request.run()


async def test_3_a_backend_that_dies_while_it_drains_was_not_ended_by_us(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with ready(servers, drain_timeout_sec=30) as fleet:
        request = Request(fleet, [dies(fleet), answers])
        fleet.nursery.start_soon(fleet.eject, "a")
        lease, _ = await request.run()
        assert request.incarnations == [1, 2]
        lease.release()


async def test_4_who_saw_two_die_gets_no_third(servers: FakeServers, autojump_clock: MockClock) -> None:
    servers.plan("a").words = "ggml_abort: out of memory"
    async with ready(servers, max_retries=5) as fleet:
        request = Request(fleet, [dies(fleet), dies(fleet), answers])
        with pytest.raises(BackendCrashed) as caught:
            await request.run()
        error = caught.value
        assert error.message == (
            "the llama-server of model 'a' died 2 times under this request: its llama-server ended; "
            "its last words:\nggml_abort: out of memory"
        )
        assert (error.status, error.code, error.details) == (502, "backend_crashed", {"model": "a"})
        assert request.incarnations == [1, 2]


async def test_4_in_company_it_may_have_been_another(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers, slots=3, max_retries=2) as fleet:
        ends: dict[str, str] = {}

        async def run(name: str, request: Request) -> None:
            try:
                lease, _ = await request.run()
            except BackendCrashed as error:
                ends[name] = error.message
            else:
                ends[name] = "answer"
                await trio.sleep(1)
                fleet["a"].supervisor.proved()
                lease.release()

        innocent = [Request(fleet, [hangs, hangs, answers]) for _ in range(2)]
        poison = Request(fleet, [dies(fleet)] * 3)
        for name, request in (("first", innocent[0]), ("poison", poison), ("last", innocent[1])):
            fleet.nursery.start_soon(run, name, request)
            await trio.sleep(0.125)
        fleet.soon("a", name="young")
        await trio.sleep(30)
        assert ends.pop("poison").startswith("the llama-server of model 'a' died 3 times under this request")
        assert ends == {"first": "answer", "last": "answer"}
        assert [request.incarnations for request in (innocent[0], poison, innocent[1])] == [
            [1, 2, 3], [1, 2, 3], [1, 2, 4],
        ]  # fmt: skip
        # twice all of them; then one after the other, each for itself, and only then who came later
        assert innocent[0].began_at == [1, 3.125, 5.375]
        assert poison.began_at == [1.125, 3.125, 7.375]
        assert innocent[1].began_at == [1.25, 3.125, 9.375]
        assert fleet.of("young") == ["11.375 young runs"]


async def test_5_no_retries_left(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers, max_retries=0) as fleet:
        request = Request(fleet, [dies(fleet), answers])
        with pytest.raises(BackendUnavailable, match=r"^the llama-server of model 'a' died: its llama-server ended$"):
            await request.run()
        assert len(request.tries) == 1


@pytest.mark.parametrize("after", [0, 0.125])
async def test_6_queued_again(after: float, servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        request = Request(fleet, [dies(fleet, after=after), answers])
        lease, answer = await request.run()
        assert (answer, request.incarnations) == ("answer", [1, 2])
        assert request.began_at == [1, 3 + after]
        assert [connection.closed for connection in request.connections] == [True, False]
        lease.release()


async def test_6_at_the_old_place(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers, max_queue_size_per_model=2) as fleet:
        request = Request(fleet, [dies(fleet), answers])
        done: list[str] = []

        async def first() -> None:
            lease, _ = await request.run()
            done.append("first")
            lease.release()

        fleet.nursery.start_soon(first)
        await trio.sleep(0.5)
        fleet.soon("a", name="second")
        fleet.soon("a", name="third")  # the queue is full now, which does not concern who was in it before
        await trio.sleep(10)
        assert done == ["first"]
        assert request.began_at == [1, 3]
        assert [float(line.split()[0]) for line in fleet.of("runs")] == [4, 5]


async def test_6_with_what_is_left_of_its_time_to_wait(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers, queue_timeout_sec=10) as fleet:
        servers.plan("a").load_seconds = 100
        request = Request(fleet, [dies(fleet), answers])
        with pytest.raises(QueueTimeout):
            await request.run()
        assert trio.current_time() == 11 + 1, "it was not waiting while it ran"


async def test_6_and_told_if_the_model_is_failed_by_then(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers, max_load_attempts=1) as fleet:
        servers.plan("a").refused = "out of files"
        request = Request(fleet, [dies(fleet), answers])
        with pytest.raises(ModelFailed, match="out of files"):
            await request.run()
        assert fleet["a"].state is State.FAILED


async def test_6_and_told_if_the_router_drains_by_then(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        request = Request(fleet, [dies(fleet), answers])
        fleet.nursery.start_soon(fleet.registry.drain, 60)
        with pytest.raises(ShuttingDown):
            await request.run()
        await wait_all_tasks_blocked()


async def test_deaths_count_under_one_request_only(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        for incarnation in (1, 2, 3):
            request = Request(fleet, [dies(fleet), answers])
            lease, _ = await request.run()
            assert request.incarnations == [incarnation, incarnation + 1]
            fleet["a"].supervisor.proved()
            lease.release()


# --- errors and cancellation, by the stage at which they land --------------------------------------------


async def test_other_errors_release_and_disconnect(servers: FakeServers, autojump_clock: MockClock) -> None:
    async def is_silent(slot: Slot) -> str:
        raise BackendTimeout("llama-server was silent for 120 s")

    async with ready(servers) as fleet:
        for acts in ([is_silent], [breaks(STALE), is_silent]):
            request = Request(fleet, acts)
            with pytest.raises(BackendTimeout):
                await request.run()
            assert all(connection.closed for connection in request.connections)
            assert fleet["a"].scheduler.active == 0


async def cancelled_after(seconds: float, request: Request) -> None:
    with trio.move_on_after(seconds) as scope:
        await request.run()
    assert scope.cancelled_caught
    await wait_all_tasks_blocked()
    assert request.fleet["a"].scheduler.active == 0
    assert request.fleet["a"].scheduler.waiting == 0
    assert all(connection.closed for connection in request.connections)


async def test_cancelled_in_the_queue(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with running(servers, {"a": 1}) as fleet:
        await cancelled_after(0.5, Request(fleet, []))
        assert servers.alive == {}


async def test_cancelled_while_it_is_tried(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        await cancelled_after(0.5, Request(fleet, [answers]))


async def test_cancelled_on_a_fresh_connection(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        await cancelled_after(1.5, Request(fleet, [breaks(STALE), answers]))


async def test_cancelled_while_it_is_not_known_whether_the_backend_lives(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with ready(servers) as fleet:
        await cancelled_after(1 + DEATH_SECONDS / 2, Request(fleet, [breaks()]))
        assert fleet["a"].scheduler.statistics().free == 1
        await fleet.ask("a")


async def test_refused_while_it_is_not_known_whether_the_backend_lives(
    servers: FakeServers, autojump_clock: MockClock
) -> None:
    async with ready(servers) as fleet:
        ticket = fleet.registry.ticket("a", NORMAL)

        async def is_refused(slot: Slot) -> str:
            servers.alive[slot.backend.alias].die()
            fleet["a"].scheduler.withdraw(ticket, ShuttingDown("no more"))
            raise BackendLost(BROKE)

        with pytest.raises(ShuttingDown, match="no more"):
            await dispatch(fleet.registry, ticket, Request(fleet, [is_refused]).attempt)


async def test_cancelled_when_it_is_queued_again(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        await cancelled_after(1.5, Request(fleet, [dies(fleet)]))


async def test_cancelled_in_its_second_try(servers: FakeServers, autojump_clock: MockClock) -> None:
    async with ready(servers) as fleet:
        request = Request(fleet, [dies(fleet), answers])
        await cancelled_after(2.5, request)
        assert request.incarnations == [1, 2]
