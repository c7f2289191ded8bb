import itertools
from collections.abc import MutableMapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_router.backend.lifecycle import TABLE, Move, State, after

LEGAL = {
    ("off", "spawn"): "starting",
    ("starting", "alive"): "loading",
    ("starting", "die"): "crashed",
    ("starting", "stop"): "stopping",
    ("loading", "answer"): "ready",
    ("loading", "die"): "crashed",
    ("loading", "stop"): "stopping",
    ("ready", "die"): "crashed",
    ("ready", "stop"): "stopping",
    ("crashed", "spawn"): "starting",
    ("crashed", "give up"): "failed",
    ("crashed", "stop"): "stopping",
    ("stopping", "gone"): "off",
    ("failed", "reset"): "off",
}
"""The contract's `off -> starting -> loading -> ready -> stopping -> off`, and what may go wrong."""


@pytest.mark.parametrize(("state", "move"), list(itertools.product(State, Move)), ids=lambda word: word.value)
def test_every_move_from_every_state(state, move):
    there = LEGAL.get((state.value, move.value))
    if there is None:
        with pytest.raises(ValueError, match=f"a model that is '{state.value}' cannot '{move.value}'"):
            after(state, move)
    else:
        assert after(state, move) is State(there)


def test_the_table_cannot_be_changed():
    assert not isinstance(TABLE, MutableMapping)


def test_every_state_has_a_way_to_off_and_is_reached_from_it():
    reached = {State.OFF}
    for _ in State:
        reached |= {there for state in reached for there in TABLE[state].values()}
    assert reached == set(State)
    for state in State:
        seen = {state}
        for _ in State:
            seen |= {there for one in seen for there in TABLE[one].values()}
        assert State.OFF in seen


def test_resident_is_everything_that_holds_memory():
    assert {state for state in State if not state.resident} == {State.OFF, State.FAILED}


@given(st.lists(st.sampled_from(Move), max_size=60))
def test_a_walk_that_skips_illegal_moves_stays_in_the_table(moves):
    state = State.OFF
    for move in moves:
        try:
            there = after(state, move)
        except ValueError:
            continue
        assert LEGAL[state.value, move.value] == there.value
        # memory is only given back by having stopped, or by having failed
        assert not (state.resident and not there.resident) or move in {Move.GONE, Move.GIVE_UP}
        state = there
