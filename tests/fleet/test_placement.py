"""The numbers are those of the cases in `placement`'s docstring."""

import math
from itertools import permutations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_router.backend.lifecycle import State
from trio_router.fleet.placement import (
    Decision,
    ModelSnapshot,
    Retire,
    Snapshot,
    Start,
    _claim,
    _urgency,
    decide,
)
from trio_router.fleet.turns import Head, TurnRules, due
from trio_router.telemetry.events import UnloadReason

NOW = 1000.0
OFF, STARTING, LOADING, READY, STOPPING, CRASHED, FAILED = State
ABANDONED, EVICTED, IDLE = UnloadReason.ABANDONED, UnloadReason.EVICTED, UnloadReason.IDLE


def head(key: float, steps: int = 1) -> Head:
    """One who came at `key`."""
    return Head(key=key, arrived_at=key, steps=steps)


def model(alias: str, state: State, **facts) -> ModelSnapshot:
    """A model; one that is ready was so before."""
    return ModelSnapshot(
        alias=alias,
        state=state,
        **{"was_ready": state is READY, "serving": state is READY, "last_used": NOW - 10, **facts},
    )


USUAL = TurnRules()


def decided(
    *models: ModelSnapshot, places: int = 1, idle_timeout: float | None = 300, turns: TurnRules = USUAL
) -> Decision:
    return decide(Snapshot(now=NOW, models=models, max_resident=places, idle_timeout=idle_timeout, turns=turns))


# --- 1: a load nobody waits for -------------------------------------------------------------------


@pytest.mark.parametrize("state", [STARTING, LOADING, CRASHED])
def test_1_an_abandoned_load_is_given_up(state: State) -> None:
    assert decided(model("a", state)).actions == (Retire("a", ABANDONED),)


@pytest.mark.parametrize("wish", [{"head": head(1.0)}, {"asked": True}, {"preload": True}])
@pytest.mark.parametrize("state", [STARTING, LOADING, CRASHED])
def test_1_a_load_that_somebody_wants_goes_on(state: State, wish: dict) -> None:
    assert decided(model("a", state, **wish)).actions == ()


@pytest.mark.parametrize("state", [STARTING, LOADING, CRASHED])
def test_1_healing_a_model_needs_nobodys_wish(state: State) -> None:
    assert decided(model("a", state, was_ready=True)) == Decision(look_again_at=NOW + 290)


@pytest.mark.parametrize("facts", [{"retiring": True}, {"active": 1}])
def test_1_nor_is_one_given_up_that_leaves_already_or_is_held(facts: dict) -> None:
    assert decided(model("a", LOADING, **facts)).actions == ()


# --- 2: the idle timeout ----------------------------------------------------------------------------


@pytest.mark.parametrize("state", [READY, CRASHED, STARTING, LOADING])
@pytest.mark.parametrize(
    ("idle_seconds", "actions", "again"),
    [
        (299.5, (), NOW + 0.5),
        (300, (Retire("a", IDLE),), math.inf),
        (5000, (Retire("a", IDLE),), math.inf),
    ],
)
def test_2_idle_for_the_timeout(state: State, idle_seconds: float, actions: tuple, again: float) -> None:
    decision = decided(model("a", state, was_ready=True, last_used=NOW - idle_seconds))
    assert decision == Decision(actions=actions, look_again_at=again)


@pytest.mark.parametrize("facts", [{"active": 1}, {"head": head(1.0)}, {"asked": True}])
def test_2_a_busy_one_stays_and_is_looked_at_again(facts: dict) -> None:
    assert decided(model("a", READY, last_used=0, **facts)) == Decision(look_again_at=NOW + 300)


def test_2_not_without_a_timeout() -> None:
    assert decided(model("a", READY, last_used=0), model("b", READY, active=1), idle_timeout=None) == Decision()


def test_2_the_next_look_is_for_the_first_to_leave() -> None:
    models = [model("a", READY, last_used=NOW - 20), model("b", READY, last_used=NOW - 70), model("c", READY, active=1)]
    assert decided(*models).look_again_at == NOW + 230


# --- 3: the order ------------------------------------------------------------------------------------


def test_3_the_first_waiter_counts_then_names_then_the_preload_list() -> None:
    models = [
        model("preload-1", OFF, preload=True),
        model("preload-2", OFF, preload=True),
        model("asked-1", OFF, asked=True),
        model("late", OFF, head=head(7.0), preload=True),
        model("asked-2", OFF, asked=True),
        model("early", OFF, head=head(3.0)),
    ]
    order = ["early", "late", "asked-1", "asked-2", "preload-1", "preload-2"]
    for places in range(7):
        decision = decided(*models, places=places)
        assert decision.actions == tuple(Start(alias) for alias in order[:places])
        assert decision.someone_waits == (places < 6)


def test_3_models_that_failed_are_not_wanted() -> None:
    assert decided(model("a", FAILED, head=head(1.0), asked=True, preload=True), places=3) == Decision()


def test_3_a_model_nobody_wants_stays_off() -> None:
    assert decided(model("a", OFF), model("b", OFF), places=2) == Decision()


# --- 4: room ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [STARTING, LOADING, READY, STOPPING, CRASHED])
def test_4_every_resident_takes_a_place(state: State) -> None:
    resident = model("a", state, active=1, ready_at=NOW)
    wanted = model("b", OFF, head=head(1.0))
    assert decided(resident, wanted, places=1).actions == ()
    assert decided(resident, wanted, places=2).actions == (Start("b"),)


@pytest.mark.parametrize("state", [OFF, FAILED])
def test_4_others_take_none(state: State) -> None:
    assert decided(model("a", state), model("b", OFF, head=head(1.0))).actions == (Start("b"),)


# --- 5: a place that is about to be free --------------------------------------------------------------


@pytest.mark.parametrize(
    "leaving",
    [
        model("a", STOPPING, active=1),
        model("a", READY, retiring=True),
        model("a", LOADING, retiring=True),
        model("a", STOPPING, retiring=True),
    ],
)
def test_5_wait_for_the_one_that_leaves(leaving: ModelSnapshot) -> None:
    idle = model("idle", READY)
    wanted = model("b", OFF, head=head(1.0))
    decision = decided(leaving, idle, wanted, places=2)
    assert (decision.actions, decision.someone_waits) == ((), True)
    second = model("c", OFF, head=head(2.0))
    assert decided(leaving, idle, wanted, second, places=2).actions == (Retire("idle", EVICTED),)


@pytest.mark.parametrize(
    ("leaving", "reason"), [(model("a", READY, last_used=0), IDLE), (model("a", LOADING), ABANDONED)]
)
def test_5_also_if_it_leaves_by_this_very_decision(leaving: ModelSnapshot, reason: UnloadReason) -> None:
    decision = decided(leaving, model("idle", READY), model("b", OFF, head=head(1.0)), places=2)
    assert (decision.actions, decision.someone_waits) == ((Retire("a", reason),), True)


def test_5_a_preload_waits_for_it_too_but_after_the_others() -> None:
    models = [model("a", STOPPING), model("preload", OFF, preload=True), model("b", OFF, head=head(1.0))]
    assert decided(*models).actions == ()
    idle = model("idle", READY)
    assert decided(*models, idle, places=2).actions == (), "the place is b's, and a preload evicts nobody"


# --- 6: eviction ----------------------------------------------------------------------------------------


def test_6_the_least_recently_used_leaves() -> None:
    ages = {"x": 30, "y": 50, "z": 40}
    for order in permutations(ages):
        residents = [model(alias, READY, last_used=NOW - ages[alias]) for alias in order]
        decision = decided(*residents, model("b", OFF, head=head(1.0)), places=3)
        assert (decision.actions, decision.someone_waits) == ((Retire("y", EVICTED),), True)


def test_6_one_for_each_that_waits() -> None:
    models = [
        model("x", READY, last_used=NOW - 30),
        model("busy", READY, active=1, last_used=NOW - 90),
        model("y", READY, last_used=NOW - 50),
        model("b", OFF, head=head(1.0)),
        model("c", OFF, asked=True),
        model("d", OFF, asked=True),
    ]
    assert decided(*models, places=3).actions == (Retire("y", EVICTED), Retire("x", EVICTED))


@pytest.mark.parametrize("wish", [{"head": head(1.0)}, {"asked": True}])
def test_6_for_requests_and_for_those_who_ask_by_name(wish: dict) -> None:
    assert decided(model("a", READY), model("b", OFF, **wish)).actions == (Retire("a", EVICTED),)


def test_6_a_preload_evicts_nobody() -> None:
    decision = decided(model("a", READY), model("b", OFF, preload=True))
    assert decision == Decision(look_again_at=NOW + 290, someone_waits=True)


def test_6_a_model_that_is_being_restarted_can_be_evicted() -> None:
    models = [model("a", CRASHED, was_ready=True), model("b", OFF, head=head(1.0))]
    assert decided(*models).actions == (Retire("a", EVICTED),)


# --- 7: waiting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "busy",
    [
        model("a", READY, active=1, ready_at=NOW),
        model("a", READY, head=head(1.0)),
        model("a", READY, asked=True),
        model("a", LOADING, head=head(1.0)),
        model("a", LOADING, asked=True),
        model("a", LOADING, preload=True),
        model("a", CRASHED, was_ready=True, active=1, ready_at=NOW),
    ],
)
def test_7_all_have_their_turn(busy: ModelSnapshot) -> None:
    decision = decided(busy, model("b", OFF, head=head(2.0)))
    assert (decision.actions, decision.someone_waits) == ((), True)


def test_7_the_first_end_of_a_turn_is_looked_at_again() -> None:
    models = [
        model("a", READY, active=1, ready_at=NOW - 1, load_seconds=20.0),
        model("b", READY, active=1, ready_at=NOW - 1, load_seconds=10.0),
        model("c", OFF, head=head(900.0)),
    ]
    assert decided(*models, places=2) == Decision(look_again_at=NOW + 39, someone_waits=True)
    later = attrs.evolve(models[2], head=head(901.0))
    assert decided(*models[:2], later, places=2).look_again_at == NOW + 39


# --- 6, again: busy ones ---------------------------------------------------------------------------------


def test_6_an_idle_one_leaves_before_a_busy_one_and_then_the_one_whose_first_came_last() -> None:
    idle = model("idle", READY, last_used=NOW - 5)
    runs = model("runs", READY, active=1)
    late, early = model("late", READY, head=head(30.0)), model("early", READY, head=head(20.0))
    wanted = model("b", OFF, head=head(1.0))
    assert decided(early, late, runs, idle, wanted, places=4).actions == (Retire("idle", EVICTED),)
    assert decided(early, late, runs, wanted, places=3) == Decision(
        yielding={"runs": "b"}, look_again_at=NOW + 300, someone_waits=True
    )
    assert decided(early, late, wanted, places=2).actions == (Retire("late", EVICTED),)


def test_6_of_idle_ones_the_least_recently_used_leaves_whosever_turn_is_over() -> None:
    over = model("over", READY, ready_at=NOW - 50, last_used=NOW - 0.1)
    has_its_turn = model("turn", READY, ready_at=NOW - 0.4, last_used=NOW - 0.2, load_seconds=1.0)
    wanted = model("b", OFF, head=head(1.0))
    assert decided(over, has_its_turn, wanted, places=2).actions == (Retire("turn", EVICTED),)
    assert decided(has_its_turn, wanted).actions == ()
    cheap = attrs.evolve(has_its_turn, load_seconds=0.3)
    assert decided(cheap, wanted).actions == (Retire("turn", EVICTED),), "its load is not worth that b waits"


def test_6_one_that_yields_already_goes_on_yielding() -> None:
    models = [
        model("idle", READY),
        model("yields", READY, active=1, yielding=True, heir="b"),
        model("runs", READY, active=1),
        model("b", OFF, head=head(1.0)),
    ]
    decision = decided(*models, places=3)
    assert (decision.actions, decision.yielding) == ((), {"yields": "b"})
    assert decided(*models[:3], places=3).yielding == {}, "nobody wants its place any more"
    models[1] = attrs.evolve(models[1], active=0)
    assert decided(*models, places=3).actions == (Retire("yields", EVICTED),)


def test_6_whose_place_it_was_comes_behind_who_got_it() -> None:
    old = model("a", READY, head=head(10.0), last_used=NOW - 40)
    (retired,) = decided(old, model("b", OFF, head=head(900.0)), turns=TurnRules(max_swap_wait=5.0)).actions
    assert isinstance(retired, Retire)
    assert retired.behind == head(900.0)
    gone = attrs.evolve(old, state=OFF, behind=retired.behind)
    others = [model("b", OFF, head=head(900.0)), model("c", OFF, head=head(901.0))]
    assert decided(gone, *others).actions == (Start("b"),)
    assert decided(gone, *others, places=2).actions == (Start("b"), Start("a"))
    high = attrs.evolve(gone, head=head(899.0, steps=0))
    assert decided(high, *others).actions == (Start("a"),)


def test_6_one_that_died_while_requests_ran_does_not_yield_but_leaves() -> None:
    died = model("a", CRASHED, was_ready=True, active=1)
    assert decided(died, model("b", OFF, head=head(1.0))).actions == (Retire("a", EVICTED),)


# --- whatever the models are -----------------------------------------------------------------------------


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Any that a registry could take: no more residents than there may be."""
    places = draw(st.integers(1, 4))
    times = st.integers(900, 1060).map(float)
    residents = 0
    models = []
    for number in range(draw(st.integers(0, 7))):
        state = draw(st.sampled_from([OFF, FAILED] if residents == places else State))
        residents += state.resident
        models.append(
            ModelSnapshot(
                alias=f"m{number}",
                state=state,
                retiring=state is STOPPING or (state.resident and draw(st.booleans())),
                head=draw(st.none() | st.builds(Head, key=times, arrived_at=times, steps=st.integers(0, 2))),
                behind=draw(st.none() | st.builds(Head, key=times, arrived_at=times, steps=st.integers(0, 2))),
                ready_at=draw(st.sampled_from([-math.inf, 700.0, 950.0, 990.0, 1000.0])),
                load_seconds=draw(st.sampled_from([0.0, 20.0, 100.0])),
                active=draw(st.sampled_from([0, 0, 1, 3])),
                asked=draw(st.booleans()),
                preload=state is not READY and draw(st.booleans()),
                serving=state is READY,
                yielding=state is READY and draw(st.booleans()),
                heir=draw(st.none() | st.sampled_from(["m0", "m1", "m2", "m3"])),
                was_ready=state is READY or (state.resident and draw(st.booleans())),
                last_used=draw(st.sampled_from([-math.inf, 0.0, 650.0, 700.0, 701.0, 950.0, 1000.0])),
            )
        )
    timeout = draw(st.none() | st.just(300.0))
    rules = TurnRules(
        min_turn=draw(st.sampled_from([None, 0.0, 30.0])), max_swap_wait=draw(st.sampled_from([5.0, 60.0]))
    )
    return Snapshot(now=NOW, models=models, max_resident=places, idle_timeout=timeout, turns=rules)


def wished(one: ModelSnapshot) -> bool:
    return one.head is not None or one.asked


KEPT = Retire("", EVICTED)
EXAMPLES = settings(max_examples=100)


@EXAMPLES
@given(snapshots())
def test_what_is_done_is_possible(snapshot: Snapshot) -> None:
    decision = decide(snapshot)
    models = {one.alias: one for one in snapshot.models}
    aliases = [action.alias for action in decision.actions]
    assert len(set(aliases)) == len(aliases), "one action a model"
    for action in decision.actions:
        one = models[action.alias]
        match action:
            case Start():
                assert one.state is OFF
                assert wished(one) or one.preload
            case Retire(reason=reason):
                assert one.state.resident
                assert not one.retiring
                assert one.state is not STOPPING
                assert not one.asked
                assert not one.preload
                if reason is EVICTED:
                    claims = [_claim(other) for other in snapshot.models if other.wanted]
                    instead = [one, *(other for other in snapshot.models if other.idle)] if one.idle else [one]
                    assert any(due(other, claim, snapshot.turns) <= NOW for other in instead for claim in claims)
                else:
                    assert not one.active
                    assert one.head is None
                    assert (reason is ABANDONED) == (not one.was_ready)
    residents = sum(one.resident for one in snapshot.models)
    starts = sum(isinstance(action, Start) for action in decision.actions)
    assert residents + starts <= snapshot.max_resident, "what leaves holds its memory until it has left"


@EXAMPLES
@given(snapshots())
def test_it_depends_on_nothing_else(snapshot: Snapshot) -> None:
    assert decide(snapshot) == decide(attrs.evolve(snapshot, models=tuple(snapshot.models)))


@EXAMPLES
@given(snapshots())
def test_no_more_leave_than_room_is_wanted(snapshot: Snapshot) -> None:
    decision = decide(snapshot)
    evicted = [action for action in decision.actions if isinstance(action, Retire) and action.reason is EVICTED]
    started = {action.alias for action in decision.actions if isinstance(action, Start)}
    without = [one for one in snapshot.models if one.wanted and one.alias not in started]
    assert len(evicted) <= sum(wished(one) for one in without)
    assert decision.someone_waits == bool(without)


def _without_promised(waiting: list[ModelSnapshot], leaving: list[ModelSnapshot]) -> list[ModelSnapshot]:
    """Those for whom somebody has to make room: no place is about to be free for them, and it is no preload."""
    aliases = {model.alias for model in waiting}
    promised = {model.heir for model in leaving if model.heir in aliases}
    others = len(leaving) - len(promised)
    left = [model for model in waiting if model.alias not in promised]
    return [model for model in left[others:] if model.head is not None or model.asked]


@EXAMPLES
@given(snapshots())
def test_whoever_can_be_served_is(snapshot: Snapshot) -> None:
    """For each that is wanted by somebody there is a place, one that leaves, or nobody who could."""
    decision = decide(snapshot)
    actions = {action.alias: action for action in decision.actions}
    urgent = sum(one.wanted and wished(one) for one in snapshot.models)
    residents = [one for one in snapshot.models if one.resident]
    free = snapshot.max_resident - len(residents)
    leaving = sum(
        one.leaving or one.alias in decision.yielding or isinstance(actions.get(one.alias), Retire)
        for one in residents
    )  # fmt: skip
    waiting = sorted((one for one in snapshot.models if one.wanted and one.alias not in actions), key=_urgency)
    out = [one for one in residents if one.leaving or actions.get(one.alias, KEPT).reason in {IDLE, ABANDONED}]
    made_for = {
        *decision.yielding.values(),
        *(action.heir for action in decision.actions if isinstance(action, Retire)),
    }
    claims = [_claim(one) for one in _without_promised(waiting, out) if one.alias not in made_for]
    could_leave = [
        one for one in residents
        if not one.leaving and one.alias not in actions
        and any(due(one, claim, snapshot.turns) <= NOW for claim in claims)
    ]  # fmt: skip
    assert free + leaving >= urgent or not could_leave, (free, leaving, urgent)
    started = sum(isinstance(action, Start) for action in decision.actions)
    assert started == min(free, sum(one.wanted for one in snapshot.models))


@EXAMPLES
@given(snapshots())
def test_the_next_look_is_in_the_future_and_not_missed(snapshot: Snapshot) -> None:
    decision = decide(snapshot)
    assert decision.look_again_at > snapshot.now
    if snapshot.idle_timeout is None:
        return
    gone = {action.alias for action in decision.actions}
    for one in snapshot.models:
        if one.idle and one.alias not in gone:
            assert decision.look_again_at <= one.last_used + snapshot.idle_timeout
        elif one.state is READY and one.alias not in gone and not one.retiring:
            assert decision.look_again_at <= snapshot.now + snapshot.idle_timeout


@EXAMPLES
@given(snapshots())
def test_what_was_decided_is_not_decided_again(snapshot: Snapshot) -> None:
    """The registry looks as often as it likes: done once, a decision leads to no other until something happens."""
    decision = decide(snapshot)
    actions = {action.alias: action for action in decision.actions}

    def done(one: ModelSnapshot) -> ModelSnapshot:
        match actions.get(one.alias):
            case Start():
                return attrs.evolve(one, state=STARTING, was_ready=False)
            case Retire():
                return attrs.evolve(
                    one, state=STOPPING, retiring=True, behind=actions[one.alias].behind, heir=actions[one.alias].heir
                )
        heir = decision.yielding.get(one.alias)
        return attrs.evolve(one, yielding=heir is not None, heir=heir or one.heir)

    again = decide(attrs.evolve(snapshot, models=[done(one) for one in snapshot.models]))
    assert again.actions == ()
    assert again.someone_waits == decision.someone_waits
    assert again.yielding == decision.yielding
