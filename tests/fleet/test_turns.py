"""The rule by itself, case by case; what the registry makes of it stands in `test_registry_turns`."""

import math

import attrs
import pytest

from trio_router.fleet.turns import MIN_TURN_SECONDS, Head, TurnRules, due, turn_seconds

RULES = TurnRules(min_turn=10.0, max_swap_wait=30.0)
HIGH, NORMAL, LOW = 0, 1, 2


@attrs.frozen(kw_only=True)
class Place:
    """A model in memory, ready since 100, and used at 101."""

    head: Head | None = None
    active: int = 0
    asked: bool = False
    preload: bool = False
    was_ready: bool = True
    ready_at: float = 100.0
    last_used: float = 101.0
    load_seconds: float = 2.0


def wait(at: float, steps: int = NORMAL) -> Head:
    return Head(key=at + 30 * steps, arrived_at=at, steps=steps)


@pytest.mark.parametrize("wish", [{"asked": True}, {"preload": True}])
@pytest.mark.parametrize("steps", [HIGH, LOW])
def test_1_what_was_asked_for_by_name_comes_to_be_ready(wish: dict, steps: int) -> None:
    assert due(Place(was_ready=False, **wish), wait(0, steps), RULES) == math.inf


@pytest.mark.parametrize(
    ("own", "claim", "ends"),
    [
        (None, wait(120, HIGH), True),
        (None, wait(120, NORMAL), False),
        (wait(90, NORMAL), wait(119, HIGH), True),
        (wait(90, NORMAL), wait(120, HIGH), False),  # aged: 90 + 30
        (wait(90, LOW), wait(91, NORMAL), False),
        (wait(110, HIGH), wait(105, NORMAL), False),
        (wait(90, LOW), wait(149, HIGH), True),
        (wait(90, LOW), wait(150, HIGH), False),
        (wait(110, HIGH), wait(105, HIGH), False),
        (wait(110, LOW), wait(105, LOW), False),
    ],
)
@pytest.mark.parametrize("was_ready", [True, False])
def test_2_high_priority_ends_a_turn_and_a_load(own: Head | None, claim: Head, ends: bool, was_ready: bool) -> None:
    place = Place(head=own, active=1, was_ready=was_ready)
    assert (due(place, claim, RULES) == -math.inf) == ends


def test_3_a_load_is_waited_for() -> None:
    assert due(Place(was_ready=False, head=wait(50)), wait(10), RULES) == math.inf


@pytest.mark.parametrize(
    ("facts", "when"),
    [
        ({"last_used": 101}, 101.5),  # half a second is more than a quarter of 2 s
        ({"last_used": 101, "load_seconds": 20}, 106),
        ({"last_used": 109, "load_seconds": 20}, 110),  # its turn is over
        ({"last_used": 100}, 100),  # nobody used it
    ],
)
def test_4_an_idle_one_is_kept_for_a_moment(facts: dict, when: float) -> None:
    assert due(Place(**facts), wait(99), RULES) == when
    assert due(Place(**facts), None, RULES) == when, "asked for by name"


@pytest.mark.parametrize(
    ("own", "claim", "when"),
    [
        (None, wait(105), 110),
        (wait(106), wait(105), 110),
        (wait(105), wait(106), 136),  # the bound
        (wait(105), wait(95), 110),
        (wait(90), wait(95), 130),  # the bound, from when it became ready
        (None, None, math.inf),
    ],
)
def test_5_and_6_a_busy_one_has_its_turn_and_serves_those_who_came_before(
    own: Head | None, claim: Head | None, when: float
) -> None:
    assert due(Place(head=own, active=1), claim, RULES) == when


def test_6_the_bound_is_also_that_of_a_long_turn() -> None:
    rules = TurnRules(min_turn=100.0, max_swap_wait=5.0)
    assert due(Place(active=1), wait(120), rules) == 125
    assert due(Place(last_used=119.9, load_seconds=50), wait(101), rules) == 106


def test_a_turn_is_four_loads_long_if_nothing_is_said() -> None:
    assert turn_seconds(Place(load_seconds=7), TurnRules()) == 28
    assert turn_seconds(Place(load_seconds=0.1), TurnRules()) == MIN_TURN_SECONDS
    assert turn_seconds(Place(load_seconds=7), TurnRules(min_turn=0.0)) == 0
