"""Estimates against what then happens, in virtual time."""

import math
from random import Random
from statistics import median

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.fleet.chance import seed_trio
from tests.fleet.fake_backend import backend_of
from tests.fleet.fleet import running
from tests.fleet.test_scheduler import HIGH, LOW, NORMAL, scheduler_of, ticket
from trio_router.fleet.estimate import LoadPace, Pace, expected_wait, overtaken, overtakers, retry_after
from trio_router.fleet.ticket import Priority


def pace_of(*seconds: float) -> Pace:
    pace = Pace()
    for each in seconds:
        pace.add(each, 1, 0.0)
    return pace


def test_a_pace_is_a_mean_and_a_spread():
    pace = pace_of(1.0, 3.0)
    assert (pace.measured, pace.mean, pace.variance, pace.spread) == (2, 2.0, 1.0, 0.25)
    for _ in range(200):
        pace.add(10.0, 1, 0.0)
    assert pace.mean == pytest.approx(10.0, rel=0.01)
    assert pace.spread < 0.01
    assert Pace().spread == 0.0
    assert pace_of(0.001, 0.001, 0.001, 100.0).spread == 1.0


def test_one_slot_with_requests_that_are_all_alike():
    pace = pace_of(4.0, 4.0)
    waits = [expected_wait(pace, ahead=ahead, slots=1, elapsed=[1.0], opens_in=0.0) for ahead in range(3)]
    assert waits == [3.0, 7.0, 11.0]
    assert expected_wait(pace, ahead=0, slots=1, elapsed=[9.0], opens_in=0.0) == pytest.approx(0.9)  # overdue


def test_more_slots_with_requests_that_are_all_alike():
    waits = [expected_wait(pace_of(4.0), ahead=ahead, slots=2, elapsed=[3.0, 1.0], opens_in=0.0) for ahead in range(4)]
    assert waits == [1.0, 3.0, 5.0, 7.0]


@pytest.mark.parametrize(
    ("elapsed", "slots", "waits"),
    [
        ([1000.0, 1.0], 2, [3.0, 7.0, 7.0]),
        ([1000.0], 2, [0.0, 4.0]),
        ([3600.0, 1.0, 2.0, 3.0], 4, [1.0, 2.0, 3.0, 5.0]),
    ],
)
def test_who_is_long_overdue_is_passed_in_the_other_slots(elapsed, slots, waits):
    pace = pace_of(4.0, 4.0)
    found = [
        expected_wait(pace, ahead=ahead, slots=slots, elapsed=elapsed, opens_in=0.0) for ahead in range(len(waits))
    ]
    assert found == waits


def test_slots_that_are_still_to_come():
    wait = [expected_wait(pace_of(4.0), ahead=ahead, slots=2, elapsed=(), opens_in=10.0) for ahead in range(4)]
    assert wait == [10.0, 10.0, 14.0, 14.0]


def test_what_was_never_measured_is_not_known():
    assert expected_wait(Pace(), ahead=0, slots=1, elapsed=[1.0], opens_in=0.0) is None
    assert expected_wait(Pace(), ahead=0, slots=1, elapsed=(), opens_in=3.0) == 3.0
    assert expected_wait(pace_of(1.0), ahead=0, slots=1, elapsed=(), opens_in=None) is None


def test_the_share_of_a_priority():
    pace = Pace()
    assert pace.share(0, 1, 5.0) == 0.0
    for second in range(1, 601):  # two slots, half of one of them for high
        pace.add(1.0, 1, float(second))
        pace.add(0.5, 0, float(second))
    assert pace.share(0, 2, 600.0) == pytest.approx(0.25, rel=0.05)
    assert pace.share(1, 2, 600.0) == pytest.approx(0.5, rel=0.05)
    assert pace.share(2, 2, 600.0) == 0.0
    assert pace.share(1, 2, 660.0) == pytest.approx(0.5 / math.e, rel=0.05)
    assert pace.share(1, 1, 600.0) == 0.9


def test_who_is_overtaken_waits_longer_but_not_for_ever():
    assert overtaken(10.0, 0.5, until=30.0) == 20.0
    assert overtaken(20.0, 0.5, until=30.0) == 35.0
    assert overtaken(20.0, 0.0, until=30.0) == 20.0


def test_who_overtakes_comes_whole_or_not():
    pace = pace_of(2.0, 2.0)
    assert [overtakers(seconds, pace, 1) for seconds in (0.0, 1.3, 1.4, 3.3, 3.4, 20.0)] == [0, 0, 1, 1, 2, 10]
    assert overtakers(1.0, pace, 4) == 2
    assert overtakers(1.0, Pace(), 4) == 0


def test_retry_after_is_whole_seconds_up_to_two_minutes():
    assert [retry_after(seconds) for seconds in (None, 0.0, 1.01, 119.5, 1e9)] == [None, 1, 2, 120, 120]


def test_a_load_that_was_never_measured_is_expected_by_its_size():
    loads = LoadPace()
    assert loads.projected(100) is None
    loads.add(2.0, 1000)
    loads.add(4.0, 2000)
    loads.add(9.0, None)  # of an unknown size: says nothing of others
    assert loads.projected(500) == 1.0
    assert loads.projected(None) is None


@attrs.frozen
class _Outcome:
    errors: list[float]
    """Of the estimates, relative to the waits."""
    ratios: list[float]


async def _what_happens(chance: Random, slots: int, priorities: list[Priority], seconds_of) -> _Outcome:
    scheduler = scheduler_of(slots, max_waiting=10_000)
    outcome = _Outcome([], [])

    async def ask(client: str) -> None:
        mine = ticket(chance.choice(priorities), client=client, patience=1e6)
        mine.due = mine.deadline
        began = trio.current_time()
        lease = await scheduler.acquire(mine)
        waited = trio.current_time() - began
        if mine.expected_seconds is not None and waited > 0.5 and scheduler.pace.measured > 20:
            outcome.errors.append(abs(mine.expected_seconds - waited) / waited)
            outcome.ratios.append(mine.expected_seconds / waited)
        held = seconds_of()
        await trio.sleep(held)
        scheduler.pace.add(held, mine.priority.steps, trio.current_time())
        lease.release()

    async with trio.open_nursery() as nursery:
        for number in range(1500):
            nursery.start_soon(ask, f"client-{number % 5}")
            await trio.sleep(chance.expovariate(0.95 * slots))
    return outcome


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("times", ["all alike", "within half", "exponential"])
@pytest.mark.parametrize("priorities", [[NORMAL], [HIGH, NORMAL, NORMAL, LOW]], ids=["one priority", "three"])
def test_estimates_come_true(slots: int, times: str, priorities: list[Priority]):
    """Five clients, and more than can be served at times. Of who comes later and goes first only the mean is known."""
    chance = Random(7)
    seconds_of = {
        "all alike": lambda: 1.0,
        "within half": lambda: chance.uniform(0.5, 1.5),
        "exponential": lambda: chance.expovariate(1.0),
    }[times]
    seed_trio(7)
    outcome = trio.run(_what_happens, chance, slots, priorities, seconds_of, clock=MockClock(autojump_threshold=0))
    assert len(outcome.errors) > 300
    if len(priorities) == 1:
        assert median(outcome.errors) < (0.001 if times == "all alike" else 0.26)
    else:
        assert median(outcome.errors) < {"all alike": 0.33, "within half": 0.4, "exponential": 0.46}[times]
    assert 0.8 < median(outcome.ratios) < 1.25


async def test_places_among_clients(autojump_clock: MockClock, nursery: trio.Nursery):
    """Who comes for the first time stands behind one of each other client."""
    scheduler = scheduler_of(1, opened=False)
    for client in ["a"] * 5 + ["b"]:
        nursery.start_soon(scheduler.acquire, ticket(client=client))
        await trio.testing.wait_all_tasks_blocked()
    places = {client: scheduler.ahead(ticket(client=client)) for client in "abc"}
    assert places == {"a": 6, "b": 3, "c": 2}
    assert scheduler.ahead(ticket(HIGH)) == 0
    assert scheduler.ahead(ticket(LOW)) == 6
    await trio.sleep(45)  # low is 30 s below normal: it is older than a normal one that comes now
    nursery.start_soon(scheduler.acquire, ticket(LOW))
    await trio.sleep(40)
    assert scheduler.ahead(ticket(NORMAL, client="c")) == 3
    nursery.cancel_scope.cancel()


async def test_how_long_until_a_model_is_there(servers, autojump_clock: MockClock):
    async with running(servers, {"a": 1, "b": 1}, max_concurrent_models=1) as fleet:
        a, b = fleet["a"], fleet["b"]
        assert (a.opens_in(), b.opens_in()) == (None, None)
        servers.plan("a").load_seconds = 8.0
        servers.plan("b").load_seconds = 5.0
        fleet.soon("a", seconds=20)
        await trio.sleep(2)
        assert a.opens_in() is None  # never loaded, and nothing else either
        await trio.sleep(10)
        assert a.opens_in() == 0.0
        a.scheduler.pace.add(20.0, 1, trio.current_time())
        a.scheduler.pace.add(20.0, 1, trio.current_time())
        b.supervisor.load_seconds = 5.0
        left = a.idle_in()
        assert left == pytest.approx(20 - (12 - 8), abs=0.5)
        assert b.opens_in() == pytest.approx(left + 8 / 4 + 5.0)  # it stays for a quarter of its load
        fleet.soon("b")
        await trio.sleep(left + 3)
        assert b.state.value == "loading"
        assert b.opens_in() == pytest.approx(5.0, abs=2.5)
        assert math.isfinite(b.idle_in() or 0.0)


async def test_turns_count_in_how_long_it_takes_until_there_is_room(servers, autojump_clock: MockClock):
    """One place, and `a` has more to do than fits into its turn: `b` has it then, and `c` once more after that."""
    async with running(servers, {"a": 1, "b": 1, "c": 1}, max_concurrent_models=1, min_turn_sec=30) as fleet:
        for _ in range(8):
            fleet.soon("a", seconds=10)
        for alias in "abc":
            fleet[alias].supervisor.load_seconds = 5.0
            for _ in range(9):
                fleet[alias].scheduler.pace.add(10.0, 1, trio.current_time())
        await trio.sleep(6)  # it is ready after 1 s
        said = fleet["b"].opens_in()
        assert said == pytest.approx(30 - 5 + 5 + 5, abs=5.1)  # the turn, what runs then, the load
        began = trio.current_time()
        fleet.soon("b", seconds=1)
        await trio.sleep(1)
        later = fleet["c"].opens_in()
        assert later == pytest.approx(said - 1 + 5 + 30, abs=5.1)  # b's load and turn before it
        while fleet["b"].scheduler.backend is None:  # noqa: ASYNC110  (nothing tells a test)
            await trio.sleep(0.5)
        assert trio.current_time() - began == pytest.approx(said, abs=5.1)
        fleet.nursery.cancel_scope.cancel()


async def test_a_backend_that_is_gone_has_no_one_running(autojump_clock: MockClock):
    scheduler = scheduler_of(1)
    scheduler.pace.add(5.0, 1, trio.current_time())
    lease = await scheduler.acquire(ticket())
    await trio.sleep(2)
    assert scheduler.expected_wait(0) == 3.0
    scheduler.close()
    scheduler.opens_in = lambda _: 7.0
    assert scheduler.expected_wait(0) == 7.0
    assert scheduler.expected_wait(1) == 12.0
    scheduler.open(backend_of(2))
    lease.release()
    assert scheduler.expected_wait(0) == 0.0
