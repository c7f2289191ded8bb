import math
from collections import Counter
from random import Random

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, assert_no_checkpoints, wait_all_tasks_blocked

from tests.fleet.chance import seed_trio
from tests.fleet.fake_backend import backend_of
from trio_router.backend.backend import Backend, Slot
from trio_router.errors import LoadTimeout, ModelFailed, QueueFull, QueueTimeout, RouterError
from trio_router.fleet.scheduler import IDLE, Lease, Priority, Scheduler, Ticket
from trio_router.fleet.turns import Head

HIGH, NORMAL, LOW = Priority
AGING = 30.0


def ticket(
    priority: Priority = NORMAL,
    *,
    patience: float = math.inf,
    requeued: bool = False,
    client: str = "",
    weight: float = 1.0,
    alone: bool = False,
) -> Ticket:
    """One that arrives now."""
    now = trio.current_time()
    return Ticket(
        alias="a",
        priority=priority,
        arrived_at=now,
        deadline=now + patience,
        key=now + (priority.value - 1) * AGING,
        requeued=requeued,
        client=client,
        weight=weight,
        alone=alone,
    )


def scheduler_of(slots: int = 1, *, max_waiting: int = 500, opened: bool = True) -> Scheduler:
    scheduler = Scheduler(alias="a", slots=slots, max_waiting=max_waiting)
    if opened:
        scheduler.open(backend_of(slots))
    return scheduler


def with_a_replica() -> tuple[Scheduler, Scheduler]:
    """Of one slot, and of two that serve its queue."""
    leader, follower = scheduler_of(1), scheduler_of(2)
    follower.leader = leader
    leader.followers.append(follower)
    return leader, follower


def left_idle(scheduler: Scheduler) -> bool:
    """Whether nothing is left of all that was, once the backend is gone too."""
    scheduler.close()
    return scheduler.statistics() == IDLE and scheduler.idle and scheduler.head() is None


@attrs.define(eq=False, repr=False)
class Clients:
    """Requests in the background, and what became of them."""

    scheduler: Scheduler
    nursery: trio.Nursery
    record: list[str] = attrs.field(factory=list)
    leases: dict[str, Lease] = attrs.field(factory=dict)
    """Of those that hold one, or held one."""
    errors: dict[str, RouterError] = attrs.field(factory=dict)
    scopes: dict[str, trio.CancelScope] = attrs.field(factory=dict)

    async def come(self, name: str, priority: Priority = NORMAL, seconds: float = math.inf, **more) -> None:
        """A request arrives, and holds its slot for so long; returns when it is queued, or served."""
        mine = more.pop("ticket", None) or ticket(priority, **more)
        self.scopes[name] = trio.CancelScope()
        self.nursery.start_soon(self._run, name, mine, seconds)
        await wait_all_tasks_blocked()

    async def _run(self, name: str, mine: Ticket, seconds: float) -> None:
        with self.scopes[name] as scope:
            try:
                lease = self.leases[name] = await self.scheduler.acquire(mine)
            except RouterError as error:
                self.errors[name] = error
                self.record.append(f"{trio.current_time():g} {name} {error.code}")
                return
            try:
                self.record.append(f"{trio.current_time():g} {name}")
                await trio.sleep(seconds)
            finally:
                lease.release()
        if scope.cancelled_caught:
            self.record.append(f"{trio.current_time():g} {name} cancelled")


# --- slots ------------------------------------------------------------------------------------------


async def test_a_free_slot_is_taken_without_a_checkpoint(autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(2)
    with assert_no_checkpoints():
        first, second = await scheduler.acquire(ticket()), await scheduler.acquire(ticket(LOW))
    assert {first.slot.index, second.slot.index} == {0, 1}
    assert (scheduler.active, scheduler.waiting, scheduler.statistics().free) == (2, 0, 0)
    first.release()
    second.release()
    assert scheduler.statistics() == attrs.evolve(IDLE, free=2)
    assert left_idle(scheduler)


async def test_all_slots_are_used_at_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(4)
    clients = Clients(scheduler, nursery)
    for number in range(10):
        await clients.come(str(number), seconds=1)
    assert len({lease.slot for lease in clients.leases.values()}) == 4
    assert scheduler.waiting == 6
    await trio.sleep(10)
    assert [line.split()[0] for line in clients.record] == ["0"] * 4 + ["1"] * 4 + ["2"] * 2
    assert left_idle(scheduler)


async def test_a_lease_is_released_once(autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    lease = await scheduler.acquire(ticket())
    for _ in range(3):
        lease.release()
    assert scheduler.statistics() == attrs.evolve(IDLE, free=1)
    other = await scheduler.acquire(ticket())
    lease.release()  # that of somebody else is not touched
    assert (scheduler.active, scheduler.statistics().free) == (1, 0)
    other.release()
    assert left_idle(scheduler)


async def test_granted_at_is_when_the_slot_was_free(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    clients = Clients(scheduler_of(1), nursery)
    first, second = ticket(), ticket()
    await clients.come("first", ticket=first, seconds=2.5)
    await clients.come("second", ticket=second, seconds=1)
    await trio.sleep(10)
    assert (first.granted_at, second.granted_at) == (0, 2.5)


# --- order ------------------------------------------------------------------------------------------


async def test_high_before_normal_before_low(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    clients = Clients(scheduler, nursery)
    await clients.come("first", seconds=1)
    for name, priority in [("l1", LOW), ("n1", NORMAL), ("h1", HIGH), ("l2", LOW), ("h2", HIGH), ("n2", NORMAL)]:
        await clients.come(name, priority, seconds=1)
    assert scheduler.statistics().waiting_by_priority == (2, 2, 2)
    await trio.sleep(20)
    assert clients.record == ["0 first", "1 h1", "2 h2", "3 n1", "4 n2", "5 l1", "6 l2"]
    assert left_idle(scheduler)


@pytest.mark.parametrize(
    ("early", "late", "after_seconds", "first"),
    [
        (LOW, HIGH, 59.75, "late"),
        (LOW, HIGH, 60, "early"),  # as long as two steps of aging: a draw, and who came first wins it
        (LOW, HIGH, 60.25, "early"),
        (LOW, NORMAL, 29.75, "late"),
        (LOW, NORMAL, 30, "early"),
        (NORMAL, HIGH, 29.75, "late"),
        (NORMAL, HIGH, 30.25, "early"),
        (HIGH, LOW, 0, "early"),
        (NORMAL, NORMAL, 0, "early"),
    ],
)
async def test_waiting_makes_up_for_priority(
    early: Priority,
    late: Priority,
    after_seconds: float,
    first: str,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
) -> None:
    clients = Clients(scheduler_of(1), nursery)
    await clients.come("running", seconds=100)
    await clients.come("early", early, seconds=1)
    await trio.sleep(after_seconds)
    await clients.come("late", late, seconds=1)
    await trio.sleep(200)
    assert clients.record[1] == f"100 {first}"


async def test_low_is_never_starved(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    # Twice as many high requests as there is room for. Low overtakes those that come 60 s after it, no sooner.
    clients = Clients(scheduler_of(1), nursery)
    for number in range(400):
        await clients.come(f"high-{number}", HIGH, seconds=1)
        if number == 0:
            await clients.come("low", LOW, seconds=1)
        await trio.sleep(0.5)
    assert "120 low" in clients.record
    nursery.cancel_scope.cancel()


async def test_who_sends_much_does_not_stand_before_who_sends_little(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    clients = Clients(scheduler_of(), nursery)
    await clients.come("running", seconds=10)
    for number in range(5):
        await clients.come(f"many-{number}", seconds=1, client="many")
    await clients.come("few-0", seconds=1, client="few")
    await clients.come("few-1", seconds=1, client="few")
    await trio.sleep(20)
    assert [line.split()[1] for line in clients.record] == [
        "running", "many-0", "few-0", "many-1", "few-1", "many-2", "many-3", "many-4",
    ]  # fmt: skip


async def test_a_share_goes_by_its_weight(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    clients = Clients(scheduler_of(), nursery)
    await clients.come("running", seconds=10)
    for number in range(8):
        await clients.come(f"a-{number}", seconds=1, client="a", weight=3.0)
        await clients.come(f"b-{number}", seconds=1, client="b", weight=1.0)
    await trio.sleep(10 + 7.5)
    assert Counter(line.split()[1][0] for line in clients.record) == {"r": 1, "a": 6, "b": 2}
    await trio.sleep(20)


async def test_a_client_that_asks_again_and_again_does_not_keep_others_out(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    clients = Clients(scheduler_of(), nursery)
    await clients.come("running", seconds=1)
    for number in range(10):
        await clients.come(f"many-{number}", seconds=1, client="many")
    for number in range(5):  # its next one comes as soon as it has its answer
        await clients.come(f"again-{number}", seconds=1, client="again")
        while f"again-{number}" not in clients.leases:  # noqa: ASYNC110  (virtual time: it costs nothing)
            await trio.sleep(0.5)
    assert [line.split()[1][0] for line in clients.record if "again" in line or "many" in line][:8] == list("mamamama")
    await trio.sleep(20)


@pytest.mark.parametrize("priority", Priority)
async def test_a_clients_own_are_served_as_they_came(
    priority: Priority, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    clients = Clients(scheduler_of(), nursery)
    for number in range(12):
        await clients.come(f"{number:02}", priority, seconds=1, client="one")
        if number in {4, 6}:
            await trio.sleep(1.5)
        if number == 8:
            clients.scopes["07"].cancel()
    await trio.sleep(20)
    names = [line.split()[1] for line in clients.record if "07" not in line]
    assert names == sorted(names)
    assert len(names) == 11


async def test_a_requeued_ticket_keeps_its_place(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1, max_waiting=2)
    old = ticket()
    await trio.sleep(5)
    clients = Clients(scheduler, nursery)
    await clients.come("running", seconds=1)
    await clients.come("second")
    await clients.come("third")
    await clients.come("refused")
    await clients.come("back", ticket=attrs.evolve(old, requeued=True), seconds=1)
    assert scheduler.waiting == 3
    await trio.sleep(1.5)
    assert clients.record == ["5 running", "5 refused queue_full", "6 back"]
    nursery.cancel_scope.cancel()


async def test_the_head_says_who_is_first_who_waits_longest_and_what_the_best_priority_is(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    scheduler = scheduler_of(1, opened=False)
    clients = Clients(scheduler, nursery)
    assert scheduler.head() is None
    await clients.come("low", LOW)
    assert scheduler.head() == Head(key=60, arrived_at=0, steps=2)
    await trio.sleep(1)
    await clients.come("high", HIGH)
    await clients.come("normal")
    assert scheduler.head() == Head(key=1, arrived_at=0, steps=0)
    clients.scopes["high"].cancel()
    clients.scopes["low"].cancel()
    await wait_all_tasks_blocked()
    assert scheduler.head() == Head(key=31, arrived_at=1, steps=1)
    clients.scopes["normal"].cancel()
    await wait_all_tasks_blocked()
    assert scheduler.head() is None
    assert left_idle(scheduler)


# --- bounds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_waiting", [0, 1, 5])
async def test_a_full_queue_refuses(max_waiting: int, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(2, max_waiting=max_waiting)
    clients = Clients(scheduler, nursery)
    for number in range(2 + max_waiting):
        await clients.come(str(number))
    assert (scheduler.active, scheduler.waiting) == (2, max_waiting)
    with pytest.raises(QueueFull, match=f"^{max_waiting} requests wait for model 'a', as many as may$") as caught:
        await scheduler.acquire(ticket(HIGH))
    assert (caught.value.status, caught.value.param) == (503, "model")
    assert caught.value.details == {
        "model": "a", "queued": max_waiting, "queue_position": 1, "estimated_wait_ms": None
    }  # fmt: skip
    assert dict(caught.value.headers) == {"Retry-After": "1", "X-Queue-Position": "1"}
    assert scheduler.waiting == max_waiting
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("max_waiting", [0, 3])
async def test_without_a_backend_its_slots_to_be_count_as_room(
    max_waiting: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    scheduler = scheduler_of(2, max_waiting=max_waiting, opened=False)
    clients = Clients(scheduler, nursery)
    for number in range(2 + max_waiting):
        await clients.come(str(number))
    assert scheduler.waiting == 2 + max_waiting
    await clients.come("refused")
    assert clients.record == ["0 refused queue_full"]
    scheduler.open(backend_of(2))
    await wait_all_tasks_blocked()
    assert (scheduler.active, scheduler.waiting) == (2, max_waiting)
    await clients.come("refused too")
    assert clients.record[-1] == "0 refused too queue_full"
    nursery.cancel_scope.cancel()


async def test_whoever_leaves_makes_room_in_the_queue(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    clients = Clients(scheduler_of(1, max_waiting=2), nursery)
    for name in ["running", "second", "third", "refused"]:
        await clients.come(name)
    clients.scopes["second"].cancel()
    await wait_all_tasks_blocked()
    await clients.come("fourth")
    assert clients.record == ["0 running", "0 refused queue_full", "0 second cancelled"]
    clients.scopes["running"].cancel()
    await wait_all_tasks_blocked()
    assert set(clients.record[-2:]) == {"0 running cancelled", "0 third"}
    assert clients.leases["third"].released is False
    nursery.cancel_scope.cancel()


async def test_waiting_ends_at_the_deadline(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    clients = Clients(scheduler, nursery)
    await clients.come("running", seconds=100)
    await clients.come("patient", patience=200, seconds=1)
    await clients.come("hasty", HIGH, patience=7.5)
    await trio.sleep(50)
    assert clients.record == ["0 running", "7.5 hasty queue_timeout"]
    error = clients.errors["hasty"]
    assert isinstance(error, QueueTimeout)
    assert error.message == "no slot of model 'a' became free within 7.5 s"
    assert (error.status, error.param, error.details["queued"]) == (504, "model", 1)
    await trio.sleep(100)
    assert clients.record[2:] == ["100 patient"]
    assert left_idle(scheduler)


async def test_a_late_request_takes_a_free_slot_but_does_not_wait(autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    late = ticket(patience=5)
    await trio.sleep(10)
    lease = await scheduler.acquire(late)
    with pytest.raises(QueueTimeout, match=r"within 10\.0 s"):
        await scheduler.acquire(attrs.evolve(late, requeued=True))
    assert (scheduler.active, scheduler.waiting) == (1, 0)
    lease.release()
    assert left_idle(scheduler)


@pytest.mark.parametrize("seed", range(20))
def test_a_slot_that_is_free_at_the_deadline_is_not_lost(seed: int) -> None:
    async def main() -> None:
        scheduler = scheduler_of(1)
        ends: Counter[str] = Counter()

        async def request(patience: float) -> None:
            try:
                lease = await scheduler.acquire(ticket(patience=patience))
            except QueueTimeout:
                ends["late"] += 1
                return
            await trio.sleep(1)  # all end, and give up, at whole seconds
            lease.release()
            ends["served"] += 1

        async with trio.open_nursery() as nursery:
            for patience in [1, 1, 2, 2, 2, 3, 3, 4, 5]:
                nursery.start_soon(request, patience)
        assert ends.total() == 9
        assert ends["served"] >= 3
        assert left_idle(scheduler)

    seed_trio(seed)
    trio.run(main, clock=MockClock(autojump_threshold=0))


# --- refusing ---------------------------------------------------------------------------------------


async def test_refuse_tells_everyone_who_waits_now(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(2)
    clients = Clients(scheduler, nursery)
    await clients.come("running")
    await clients.come("running too")
    for name in ["first", "second", "gone"]:
        await clients.come(name)
    clients.scopes["gone"].cancel()
    error = ModelFailed("it failed", param="model", details={"attempts": 3}, retry_after_seconds=60)
    scheduler.refuse(error)
    await clients.come("next")
    assert Counter(clients.record) == Counter(
        ["0 running", "0 running too", "0 first model_failed", "0 second model_failed", "0 gone cancelled"]
    )
    assert (scheduler.active, scheduler.waiting) == (2, 1)
    first, second = clients.errors["first"], clients.errors["second"]
    assert len({id(one) for one in (first, second, error)}) == 3, "each has a traceback of its own"
    assert first.body() == second.body() == error.body()
    assert first.headers == error.headers
    assert error.__traceback__ is None
    nursery.cancel_scope.cancel()


async def test_refused_and_cancelled_at_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1, opened=False)
    clients = Clients(scheduler, nursery)
    await clients.come("refused first")
    await clients.come("cancelled first")
    clients.scopes["cancelled first"].cancel()
    scheduler.refuse(LoadTimeout("too slow"))
    clients.scopes["refused first"].cancel()
    await wait_all_tasks_blocked()
    assert set(clients.record) == {"0 refused first load_timeout", "0 cancelled first cancelled"}
    assert left_idle(scheduler)


async def test_refusing_nobody_is_no_error(autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    scheduler.refuse(LoadTimeout("too slow"))
    assert scheduler.statistics() == attrs.evolve(IDLE, free=1)


# --- cancellation, by the stage at which it lands -----------------------------------------------------


async def test_cancelled_before_it_waits(autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    lease = await scheduler.acquire(ticket())
    with trio.CancelScope() as scope:
        scope.cancel()
        await scheduler.acquire(ticket())
    assert scope.cancelled_caught
    assert (scheduler.active, scheduler.waiting) == (1, 0)
    lease.release()
    assert left_idle(scheduler)


async def test_cancelled_while_it_waits(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    clients = Clients(scheduler, nursery)
    await clients.come("running", seconds=5)
    await clients.come("leaves", HIGH)
    await clients.come("stays", seconds=1)
    clients.scopes["leaves"].cancel()
    await wait_all_tasks_blocked()
    assert scheduler.statistics().waiting_by_priority == (0, 1, 0)
    await trio.sleep(10)
    assert clients.record == ["0 running", "0 leaves cancelled", "5 stays"]
    assert left_idle(scheduler)


async def test_cancelled_just_before_a_slot_is_free(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    clients = Clients(scheduler, nursery)
    await clients.come("running")
    await clients.come("leaves")
    await clients.come("next", seconds=1)
    clients.scopes["leaves"].cancel()  # it has not had the time to say so, and yet nothing is offered to it
    clients.leases["running"].release()
    assert (scheduler.active, scheduler.waiting) == (1, 0)
    await wait_all_tasks_blocked()
    assert set(clients.record) == {"0 running", "0 leaves cancelled", "0 next"}
    assert "leaves" not in clients.leases
    assert scheduler.active == 1
    await trio.sleep(1.5)
    assert left_idle(scheduler)
    nursery.cancel_scope.cancel()


async def test_cancelled_when_granted_and_on_its_way(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    clients = Clients(scheduler, nursery)
    await clients.come("running")
    await clients.come("leaves")
    clients.leases["running"].release()
    clients.scopes["leaves"].cancel()  # too late: it has the lease, and releases it like anyone
    await wait_all_tasks_blocked()
    assert clients.record == ["0 running", "0 leaves", "0 leaves cancelled"]
    assert left_idle(scheduler)
    nursery.cancel_scope.cancel()


async def test_cancelled_while_it_holds(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    clients = Clients(scheduler, nursery)
    await clients.come("running")
    await clients.come("next", seconds=1)
    await trio.sleep(3)
    clients.scopes["running"].cancel()
    await trio.sleep(3)
    assert set(clients.record) == {"0 running", "3 running cancelled", "3 next"}
    assert left_idle(scheduler)


async def test_the_heap_does_not_grow_with_those_who_left(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1)
    clients = Clients(scheduler, nursery)
    await clients.come("running")
    await clients.come("patient")
    for _ in range(300):
        with trio.move_on_after(1):
            await scheduler.acquire(ticket(HIGH))
        for rank in scheduler._ranks.values():
            assert len(rank._by_age) == len(rank._by_turn) <= 2 * rank.waiting
    assert scheduler.waiting == 1
    nursery.cancel_scope.cancel()


# --- backends ---------------------------------------------------------------------------------------


async def test_the_queue_outlives_backends(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1, opened=False)
    clients = Clients(scheduler, nursery)
    await clients.come("low", LOW, seconds=1)
    await clients.come("high", HIGH)
    first, second = backend_of(1), backend_of(1, incarnation=2)
    await trio.sleep(1)
    scheduler.open(first)
    await trio.sleep(1)
    scheduler.close()
    await trio.sleep(1)
    assert clients.record == ["1 high"]
    scheduler.open(second)
    await wait_all_tasks_blocked()
    # the lease on the first is still out: it takes nothing from the second
    assert clients.record == ["1 high", "3 low"]
    assert clients.leases["low"].slot.backend is second
    assert (scheduler.active, scheduler.statistics().free) == (2, 0)
    clients.leases["high"].release()
    assert (scheduler.active, scheduler.statistics().free) == (1, 0), "released into nothing"
    await trio.sleep(1.5)
    assert scheduler.statistics() == attrs.evolve(IDLE, free=1)
    assert left_idle(scheduler)
    nursery.cancel_scope.cancel()


async def test_a_lease_that_is_out_when_the_backend_closes_stays_active(autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(2)
    lease = await scheduler.acquire(ticket())
    scheduler.close()
    assert scheduler.statistics() == attrs.evolve(IDLE, active=1)
    lease.release()
    assert scheduler.statistics() == IDLE


@pytest.mark.parametrize("leases", [0, 1, 2])
async def test_until_no_lease(leases: int, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(2)
    clients = Clients(scheduler, nursery)
    for number in range(leases):
        await clients.come(str(number), seconds=number + 1)
    with trio.fail_after(100):
        async with trio.open_nursery() as both:
            both.start_soon(scheduler.until_no_lease)
            both.start_soon(scheduler.until_no_lease)
    assert trio.current_time() == leases


async def test_demand_and_rest(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(1, opened=False)
    calls: list[str] = []
    scheduler.demand = lambda: calls.append(f"demand {scheduler.waiting}")
    scheduler.rest = lambda: calls.append("rest")
    clients = Clients(scheduler, nursery)
    await clients.come("first", seconds=1)
    await clients.come("second", seconds=1)
    await clients.come("leaves")
    clients.scopes["leaves"].cancel()
    await wait_all_tasks_blocked()
    assert calls == ["demand 1", "demand 2", "demand 3", "demand 2"]
    scheduler.open(backend_of(1))
    calls.clear()
    await clients.come("leaves too")
    clients.scopes["leaves too"].cancel()
    await trio.sleep(1.5)
    assert calls == [], "with a backend nobody has to be told of who comes and goes"
    await trio.sleep(1)
    assert calls == ["rest"]
    lease = await scheduler.acquire(ticket())
    scheduler.close()
    await clients.come("third")
    lease.release()
    assert calls == ["rest", "demand 1"], "who waits is no rest"
    clients.scopes["third"].cancel()
    await wait_all_tasks_blocked()
    assert calls == ["rest", "demand 1", "demand 0"]


async def test_one_that_is_queued_again_is_first_also_when_the_queue_was_empty_meanwhile(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    scheduler = scheduler_of(1)
    clients = Clients(scheduler, nursery)
    mine = [ticket(client="a") for _ in range(5)]
    for number, each in enumerate(mine):
        await clients.come(f"a{number}", ticket=each, seconds=1)
    await trio.sleep(4.5)
    scheduler.close()  # the last of them ran, with a late turn
    mine[4].requeued = True
    await clients.come("b", client="b", seconds=1)
    await clients.come("again", ticket=mine[4], seconds=1)
    scheduler.open(backend_of(1, incarnation=2))
    await trio.sleep(5)
    assert clients.record[-2:] == ["4.5 again", "5.5 b"]
    assert left_idle(scheduler)


# --- alone ------------------------------------------------------------------------------------------


async def test_who_is_to_be_alone_is_alone(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(3)
    clients = Clients(scheduler, nursery)
    await clients.come("one", seconds=1)
    await clients.come("two", seconds=2)
    await clients.come("alone", alone=True, seconds=5)
    for name in ("three", "four", "five", "six"):
        await clients.come(name, seconds=1)
    assert clients.record == ["0 one", "0 two"], "a slot is free, and nobody gets it"
    assert scheduler.statistics().free == 1
    await trio.sleep(10)
    assert clients.record[2] == "2 alone"
    assert sorted(clients.record[3:]) == ["7 five", "7 four", "7 three", "8 six"]
    assert left_idle(scheduler)


async def test_whoever_comes_while_one_waits_to_be_alone_waits_too(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    scheduler = scheduler_of(3)
    clients = Clients(scheduler, nursery)
    await clients.come("running", seconds=5)
    await clients.come("running too", seconds=2)
    await clients.come("alone", alone=True, seconds=1)
    await clients.come("urgent", HIGH, seconds=9)
    await trio.sleep(4)
    assert clients.record == ["0 running", "0 running too", "2 urgent"], "in the order that always holds"
    await trio.sleep(10)
    assert clients.record[3:] == ["11 alone"]


@pytest.mark.parametrize("leaves", [False, True])
async def test_replicas_serve_the_rest_beside_who_is_alone(
    nursery: trio.Nursery, autojump_clock: MockClock, *, leaves: bool
) -> None:
    leader, follower = with_a_replica()
    clients = Clients(leader, nursery)
    for name, seconds in (("one", 1), ("two", 3), ("three", 1)):
        await clients.come(name, seconds=seconds)
    assert (leader.active, follower.active) == (1, 2)
    await clients.come("alone", alone=True, seconds=50, patience=2 if leaves else math.inf)
    for name in ("four", "five"):
        await clients.come(name, seconds=1)
    await trio.sleep(10)
    served = sorted(line for line in clients.record if "four" in line or "five" in line)
    when = 2 if leaves else max(int(line.split()[0]) for line in clients.record if "alone" in line)
    assert served == [f"{when} five", f"{when} four"], clients.record
    await trio.sleep(100)
    follower.close()
    assert left_idle(leader)


async def test_a_high_one_has_a_replicas_slot_before_who_is_to_be_alone(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    leader, follower = with_a_replica()
    clients = Clients(leader, nursery)
    for name, seconds in (("one", 1), ("two", 50), ("three", 1)):
        await clients.come(name, seconds=seconds)
    assert clients.leases["two"].slot.backend is leader.backend
    await clients.come("alone", alone=True, seconds=1)
    await trio.sleep(5)
    await clients.come("high", HIGH, seconds=1)
    await clients.come("normal", seconds=1)
    assert clients.record[3:] == ["5 high"]
    await trio.sleep(100)
    assert len(clients.record) == 6
    follower.close()
    assert left_idle(leader)


async def test_alone_at_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(3)
    clients = Clients(scheduler, nursery)
    await clients.come("alone", alone=True, seconds=1)
    await clients.come("alone too", alone=True, seconds=1)
    await clients.come("other", seconds=1)
    await trio.sleep(5)
    assert clients.record == ["0 alone", "1 alone too", "2 other"]
    assert scheduler.statistics() == attrs.evolve(IDLE, free=3)
    assert left_idle(scheduler)


async def test_who_was_to_be_alone_leaves(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(2)
    clients = Clients(scheduler, nursery)
    await clients.come("running", seconds=5)
    await clients.come("alone", alone=True, patience=2)
    await clients.come("alone too", alone=True)
    await clients.come("other", seconds=5)
    await trio.sleep(3)
    assert clients.record == ["0 running", "2 alone queue_timeout"]
    clients.scopes["alone too"].cancel()
    await wait_all_tasks_blocked()
    assert sorted(clients.record[2:]) == ["3 alone too cancelled", "3 other"]
    await trio.sleep(10)
    await clients.come("third", seconds=5)
    await clients.come("alone again", alone=True)
    scheduler.refuse(LoadTimeout("too slow"))
    await clients.come("fourth", seconds=1)
    assert sorted(clients.record[-2:]) == ["13 alone again load_timeout", "13 fourth"]
    await trio.sleep(10)
    assert left_idle(scheduler)


async def test_alone_on_the_next_backend(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    scheduler = scheduler_of(2)
    clients = Clients(scheduler, nursery)
    await clients.come("alone", alone=True, seconds=5)
    await clients.come("other", seconds=1)
    scheduler.close()
    await clients.come("alone too", alone=True, seconds=5)
    scheduler.open(backend_of(2, incarnation=2))
    await wait_all_tasks_blocked()
    assert clients.record == ["0 alone", "0 other"], "a lease on the old one is in nobody's way"
    await trio.sleep(20)
    assert clients.record[2:] == ["1 alone too"]
    assert left_idle(scheduler)


# --- many -------------------------------------------------------------------------------------------


def test_thousands_of_requests_that_may_be_cancelled_at_any_time() -> None:
    random = Random(1)
    requests, slots = 20_000, 3
    ends: Counter[str] = Counter()
    held: Counter[Slot] = Counter()
    most: Counter[int] = Counter()
    """Most leases at one time, by incarnation."""

    alone: set[Backend] = set()

    async def main() -> None:
        scheduler = scheduler_of(slots, max_waiting=15)
        asked = 0

        def demand() -> None:
            nonlocal asked
            asked += 1

        scheduler.demand = demand

        async def request(patience: float, cancelled_after: float, seconds: float, priority: Priority) -> None:
            with trio.move_on_after(cancelled_after) as scope:
                try:
                    lease = await scheduler.acquire(
                        ticket(
                            priority, patience=patience, requeued=random.random() < 0.1, alone=random.random() < 0.05
                        )
                    )
                except RouterError as error:
                    ends[error.code] += 1
                    return
                slot = lease.slot
                held[slot] += 1
                most[slot.backend.incarnation] = max(
                    most[slot.backend.incarnation], sum(held[other] for other in slot.backend.slots)
                )
                assert held[slot] == 1
                if scheduler._alone is lease:
                    assert sum(held[other] for other in slot.backend.slots) == 1
                    alone.add(slot.backend)
                try:
                    await trio.sleep(seconds)
                    ends["served"] += 1
                finally:
                    held[slot] -= 1
                    for _ in range(random.choice([1, 1, 2])):
                        lease.release()
            if scope.cancelled_caught:
                ends["cancelled"] += 1

        async def backends(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            task_status.started()
            for incarnation in range(2, 1_000_000):
                await trio.sleep(random.randrange(1, 60))
                scheduler.close()
                await trio.sleep(random.randrange(0, 8))
                if random.random() < 0.3:
                    scheduler.refuse(LoadTimeout("too slow"))
                scheduler.open(backend_of(slots, incarnation=incarnation))

        async with trio.open_nursery() as churn:
            await churn.start(backends)
            async with trio.open_nursery() as nursery:
                for _ in range(requests):
                    if random.random() < 0.3:
                        # quarters of a second: cancels, ends, arrivals and crashes fall on the same moment
                        await trio.sleep(random.randrange(1, 12) / 4)
                    nursery.start_soon(
                        request,
                        random.choice([math.inf, 5.0, 10.0]),
                        random.choice([math.inf, math.inf, random.randrange(0, 40) / 4]),
                        random.randrange(0, 16) / 4,
                        random.choice(list(Priority)),
                    )
            churn.cancel_scope.cancel()
        assert asked
        assert left_idle(scheduler)
        assert not any(rank._next or rank._by_age or rank._by_turn for rank in scheduler._ranks.values())

    seed_trio(1)
    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert ends.total() == requests
    assert set(ends) == {"served", "cancelled", "queue_full", "queue_timeout", "load_timeout"}
    assert min(ends.values()) > 100, ends
    assert max(most.values()) == slots
    assert held.total() == 0
    assert len(alone) > 50


@attrs.define
class _Expected:
    """What a scheduler should do, in a few slow lines."""

    slots: int
    max_waiting: int
    waiting: list[tuple[float, int]] = attrs.field(factory=list)
    """(key, number of the request)"""
    running: dict[int, Backend] = attrs.field(factory=dict)
    alone: set[int] = attrs.field(factory=set)
    blocked: bool = False
    """Slots are free, but who is next is to be alone."""
    refused: set[int] = attrs.field(factory=set)
    backend: Backend | None = None

    def here(self) -> set[int]:
        """Those that run on the backend at hand."""
        return {number for number, backend in self.running.items() if backend is self.backend}

    def settle(self) -> None:
        while self.waiting and self.backend is not None and not self.blocked:
            here = self.here()
            if len(here) == self.slots or here & self.alone:
                return
            if here and min(self.waiting)[1] in self.alone:
                self.blocked = True
                return
            self.running[self.waiting.pop(self.waiting.index(min(self.waiting)))[1]] = self.backend

    def come(self, number: int, key: float, *, alone: bool) -> None:
        if alone:
            self.alone.add(number)
        room = self.max_waiting + (self.slots if self.backend is None else 0)
        here = self.here()
        served = (
            self.backend is not None
            and not self.waiting
            and not here & self.alone
            and (not here if alone else len(here) < self.slots)
        )
        if not served and len(self.waiting) >= room:
            self.refused.add(number)
        else:
            self.waiting.append((key, number))

    def go(self, number: int) -> None:
        if self.running.pop(number, None) is self.backend or number in [entry[1] for entry in self.waiting]:
            self.blocked = False
        self.waiting = [entry for entry in self.waiting if entry[1] != number]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.tuples(st.sampled_from(Priority), st.just(value=False))),
        st.tuples(st.just("come"), st.tuples(st.sampled_from(Priority), st.just(value=False))),
        st.tuples(st.just("come"), st.tuples(st.sampled_from(Priority), st.booleans())),
        st.tuples(st.just("come"), st.tuples(st.sampled_from(Priority), st.just(value=True))),
        st.tuples(st.just("go"), st.integers(0, 30)),
        st.tuples(st.just("sleep"), st.integers(1, 200)),
        st.tuples(st.just("open"), st.none()),
        st.tuples(st.just("close"), st.none()),
        st.tuples(st.just("refuse"), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=400)
@given(slots=st.integers(1, 3), max_waiting=st.integers(0, 6), steps=STEPS)
def test_does_what_a_slower_one_would_do(slots: int, max_waiting: int, steps: list[tuple]) -> None:
    async def main() -> None:
        scheduler = scheduler_of(slots, max_waiting=max_waiting, opened=False)
        expected = _Expected(slots, max_waiting)
        async with trio.open_nursery() as nursery:
            clients = Clients(scheduler, nursery)
            number = incarnation = 0
            for what, argument in steps:
                match what:
                    case "come":
                        priority, alone = argument
                        expected.come(number, ticket(priority).key, alone=alone)
                        await clients.come(str(number), priority, alone=alone)
                        number += 1
                    case "go" if number:
                        expected.go(argument % number)
                        clients.scopes[str(argument % number)].cancel()
                    case "sleep":
                        await trio.sleep(argument / 4)
                    case "open" if expected.backend is None:
                        incarnation += 1
                        expected.backend = backend_of(slots, incarnation=incarnation)
                        scheduler.open(expected.backend)
                    case "close":
                        expected.backend, expected.blocked = None, False
                        scheduler.close()
                    case "refuse":
                        expected.refused.update(entry[1] for entry in expected.waiting)
                        expected.waiting.clear()
                        expected.blocked = False
                        scheduler.refuse(LoadTimeout("too slow"))
                expected.settle()
                await wait_all_tasks_blocked()
                running = {name: lease.slot.backend for name, lease in clients.leases.items() if not lease.released}
                assert running == {str(name): backend for name, backend in expected.running.items()}
                assert {int(name) for name in clients.errors} == expected.refused
                assert len(scheduler._free) + len(scheduler._aside) == (
                    slots - len(expected.here()) if expected.backend is not None else 0
                )
                assert scheduler.waiting == len(expected.waiting)
                assert scheduler.active == len(expected.running)
                head = scheduler.head()
                assert (head and head.key) == (min(expected.waiting)[0] if expected.waiting else None)
                assert scheduler.idle == (not expected.waiting and not expected.running)
            nursery.cancel_scope.cancel()
        assert left_idle(scheduler)

    trio.run(main, clock=MockClock(autojump_threshold=0))
