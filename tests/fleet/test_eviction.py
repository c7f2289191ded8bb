"""The numbers are those of the cases in `eviction`'s docstring."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from trio_router.fleet.eviction import EXACT, Candidate, busy_missed, fewest, idle_missed

NOW = 1000.0


def one(alias: str, idle: float, size: int, load: float = 0) -> Candidate:
    return Candidate(alias=alias, missed=idle_missed(load, idle), last_used=NOW - idle, frees={0: size})


def busy(alias: str, first_key: float | None, size: int) -> Candidate:
    return Candidate(alias=alias, missed=busy_missed(first_key), last_used=NOW, frees={0: size})


def leaving(candidates: list[Candidate], wanted: int, *, at_least: int = 0) -> str | None:
    found = fewest(candidates, lambda freed: freed.get(0, 0) >= wanted, at_least=at_least)
    return None if found is None else "".join(sorted(candidate.alias for candidate in found))


def test_one_that_is_large_enough_rather_than_two_that_are_old() -> None:
    assert leaving([one("a", 900, 2), one("b", 800, 2), one("c", 10, 4)], 4) == "c"


def test_the_least_recently_used_of_those_that_are_large_enough() -> None:
    assert leaving([one("a", 900, 2), one("b", 10, 4), one("c", 20, 4), one("d", 15, 9)], 4) == "c"


def test_of_pairs_the_one_that_is_least_missed() -> None:
    assert leaving([one("a", 100, 2), one("b", 10, 2), one("c", 50, 2)], 4) == "ac"


def test_one_that_takes_long_to_load_stays() -> None:
    assert leaving([one("a", 60, 4, load=60.0), one("b", 30, 4, load=2.0)], 4) == "b"
    assert leaving([one("a", 6000, 4, load=60.0), one("b", 30, 4, load=2.0)], 4) == "a"


def test_busy_ones_are_missed_most() -> None:
    assert leaving([busy("a", 5.0, 4), one("b", 0, 4, load=300.0)], 4) == "b"
    assert leaving([busy("a", 5.0, 4), busy("b", 9.0, 4)], 4) == "b", "those who wait for it came later"
    assert leaving([busy("a", 5.0, 4), busy("b", None, 4)], 4) == "b", "nobody waits for it"


def test_places_are_room_too() -> None:
    assert leaving([one("a", 60, 1), one("b", 30, 1)], 0, at_least=1) == "a"
    assert leaving([one("a", 60, 1), one("b", 30, 5)], 5, at_least=1) == "b"
    assert leaving([], 0, at_least=1) is None


def test_nobody_leaves_in_vain() -> None:
    assert leaving([one("a", 60, 1), one("b", 30, 1)], 3) is None
    assert leaving([one("a", 60, 1)], 0) == ""


def test_2_many_models() -> None:
    many = [one(chr(ord("a") + number), 900 - number, 1) for number in range(EXACT + 1)]
    assert leaving(many, 3) == "abc"
    assert leaving([*many, one("z", 1, 50)], 40) == "z", "those not needed after all are kept"


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 999), st.integers(0, 9)), max_size=7), st.integers(0, 30), st.integers(0, 3))
def test_as_few_as_can_be(models: list[tuple[int, int]], wanted: int, at_least: int) -> None:
    candidates = [one(chr(ord("a") + number), idle, size) for number, (idle, size) in enumerate(models)]
    sufficient = [
        len(some)
        for count in range(at_least, len(candidates) + 1)
        for some in itertools.combinations(candidates, count)
        if sum(candidate.frees[0] for candidate in some) >= wanted
    ]
    found = leaving(candidates, wanted, at_least=at_least)
    assert (math.inf if found is None else len(found)) == min(sufficient, default=math.inf)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 999), st.integers(0, 9)), min_size=EXACT + 1, max_size=20), st.integers(0, 120)
)
def test_2_nobody_of_many_leaves_in_vain(models: list[tuple[int, int]], wanted: int) -> None:
    candidates = [one(chr(ord("a") + number), idle, size) for number, (idle, size) in enumerate(models)]
    found = fewest(candidates, lambda freed: freed.get(0, 0) >= wanted, at_least=0)
    total = sum(candidate.frees[0] for candidate in candidates)
    assert (found is None) == (total < wanted)
    for candidate in found or ():
        assert sum(other.frees[0] for other in found or () if other is not candidate) < wanted
