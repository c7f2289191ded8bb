"""The numbers are those of the cases in `placement`'s docstring."""

import math
from itertools import permutations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_router.backend.lifecycle import State
from trio_router.fleet.placement import Decision, ModelSnapshot, Retire, Snapshot, Start, decide
from trio_router.telemetry.events import UnloadReason

NOW = 1000.0
OFF, STARTING, LOADING, READY, STOPPING, CRASHED, FAILED = State
ABANDONED, EVICTED, IDLE = UnloadReason.ABANDONED, UnloadReason.EVICTED, UnloadReason.IDLE


def model(alias: str, state: State, **facts) -> ModelSnapshot:
    """A model; one that is ready was so before."""
    return ModelSnapshot(alias=alias, state=state, **{"was_ready": state is READY, "last_used": NOW - 10, **facts})


def decided(*models: ModelSnapshot, places: int = 1, idle_timeout: float | None = 300) -> Decision:
    return decide(Snapshot(now=NOW, models=models, max_resident=places, idle_timeout=idle_timeout))


# --- 1: a load nobody waits for -------------------------------------------------------------------


@pytest.mark.parametrize("state", [STARTING, LOADING, CRASHED])
def test_1_an_abandoned_load_is_given_up(state: State) -> None:
    assert decided(model("a", state)).actions == (Retire("a", ABANDONED),)


@pytest.mark.parametrize("wish", [{"first_key": 1.0}, {"asked": True}, {"preload": True}])
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


@pytest.mark.parametrize("facts", [{"active": 1}, {"first_key": 1.0}, {"asked": True}])
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
        model("late", OFF, first_key=7.0, preload=True),
        model("asked-2", OFF, asked=True),
        model("early", OFF, first_key=3.0),
    ]
    order = ["early", "late", "asked-1", "asked-2", "preload-1", "preload-2"]
    for places in range(7):
        decision = decided(*models, places=places)
        assert decision.actions == tuple(Start(alias) for alias in order[:places])
        assert decision.someone_waits == (places < 6)


def test_3_models_that_failed_are_not_wanted() -> None:
    assert decided(model("a", FAILED, first_key=1.0, asked=True, preload=True), places=3) == Decision()


def test_3_a_model_nobody_wants_stays_off() -> None:
    assert decided(model("a", OFF), model("b", OFF), places=2) == Decision()


# --- 4: room ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [STARTING, LOADING, READY, STOPPING, CRASHED])
def test_4_every_resident_takes_a_place(state: State) -> None:
    resident = model("a", state, active=1)
    wanted = model("b", OFF, first_key=1.0)
    assert decided(resident, wanted, places=1).actions == ()
    assert decided(resident, wanted, places=2).actions == (Start("b"),)


@pytest.mark.parametrize("state", [OFF, FAILED])
def test_4_others_take_none(state: State) -> None:
    assert decided(model("a", state), model("b", OFF, first_key=1.0)).actions == (Start("b"),)


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
    wanted = model("b", OFF, first_key=1.0)
    decision = decided(leaving, idle, wanted, places=2)
    assert (decision.actions, decision.someone_waits) == ((), True)
    second = model("c", OFF, first_key=2.0)
    assert decided(leaving, idle, wanted, second, places=2).actions == (Retire("idle", EVICTED),)


@pytest.mark.parametrize(
    ("leaving", "reason"), [(model("a", READY, last_used=0), IDLE), (model("a", LOADING), ABANDONED)]
)
def test_5_also_if_it_leaves_by_this_very_decision(leaving: ModelSnapshot, reason: UnloadReason) -> None:
    decision = decided(leaving, model("idle", READY), model("b", OFF, first_key=1.0), places=2)
    assert (decision.actions, decision.someone_waits) == ((Retire("a", reason),), True)


def test_5_a_preload_waits_for_it_too_but_after_the_others() -> None:
    models = [model("a", STOPPING), model("preload", OFF, preload=True), model("b", OFF, first_key=1.0)]
    assert decided(*models).actions == ()
    idle = model("idle", READY)
    assert decided(*models, idle, places=2).actions == (), "the place is b's, and a preload evicts nobody"


# --- 6: eviction ----------------------------------------------------------------------------------------


def test_6_the_least_recently_used_leaves() -> None:
    ages = {"x": 30, "y": 50, "z": 40}
    for order in permutations(ages):
        residents = [model(alias, READY, last_used=NOW - ages[alias]) for alias in order]
        decision = decided(*residents, model("b", OFF, first_key=1.0), places=3)
        assert (decision.actions, decision.someone_waits) == ((Retire("y", EVICTED),), True)


def test_6_one_for_each_that_waits() -> None:
    models = [
        model("x", READY, last_used=NOW - 30),
        model("busy", READY, active=1, last_used=NOW - 90),
        model("y", READY, last_used=NOW - 50),
        model("b", OFF, first_key=1.0),
        model("c", OFF, asked=True),
        model("d", OFF, asked=True),
    ]
    assert decided(*models, places=3).actions == (Retire("y", EVICTED), Retire("x", EVICTED))


@pytest.mark.parametrize("wish", [{"first_key": 1.0}, {"asked": True}])
def test_6_for_requests_and_for_those_who_ask_by_name(wish: dict) -> None:
    assert decided(model("a", READY), model("b", OFF, **wish)).actions == (Retire("a", EVICTED),)


def test_6_a_preload_evicts_nobody() -> None:
    decision = decided(model("a", READY), model("b", OFF, preload=True))
    assert decision == Decision(look_again_at=NOW + 290, someone_waits=True)


def test_6_a_model_that_is_being_restarted_can_be_evicted() -> None:
    models = [model("a", CRASHED, was_ready=True), model("b", OFF, first_key=1.0)]
    assert decided(*models).actions == (Retire("a", EVICTED),)


# --- 7: waiting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "busy",
    [
        model("a", READY, active=1),
        model("a", READY, first_key=1.0),
        model("a", READY, asked=True),
        model("a", LOADING, first_key=1.0),
        model("a", LOADING, asked=True),
        model("a", LOADING, preload=True),
        model("a", CRASHED, was_ready=True, active=1),
    ],
)
def test_7_all_are_busy(busy: ModelSnapshot) -> None:
    decision = decided(busy, model("b", OFF, first_key=0.0))
    assert (decision.actions, decision.someone_waits) == ((), True)


# --- whatever the models are -----------------------------------------------------------------------------


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Any that a registry could take: no more residents than there may be."""
    places = draw(st.integers(1, 4))
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
                first_key=draw(st.none() | st.integers(900, 1060).map(float)),
                active=draw(st.sampled_from([0, 0, 1, 3])),
                asked=draw(st.booleans()),
                preload=state is not READY and draw(st.booleans()),
                was_ready=state is READY or (state.resident and draw(st.booleans())),
                last_used=draw(st.sampled_from([-math.inf, 0.0, 650.0, 700.0, 701.0, 950.0, 1000.0])),
            )
        )
    timeout = draw(st.none() | st.just(300.0))
    return Snapshot(now=NOW, models=models, max_resident=places, idle_timeout=timeout)


def wished(one: ModelSnapshot) -> bool:
    return one.first_key is not None or one.asked


EXAMPLES = settings(max_examples=100, deadline=None)


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
                assert not one.active, "busy models stay"
                assert not wished(one)
                assert not one.preload
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
    stay = {action.alias for action in decision.actions}
    for action in evicted:
        used = next(one.last_used for one in snapshot.models if one.alias == action.alias)
        assert all(used <= one.last_used for one in snapshot.models if one.idle and one.alias not in stay)


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
        one.retiring or one.state is STOPPING or isinstance(actions.get(one.alias), Retire) for one in residents
    )
    could_leave = sum(one.idle and one.alias not in actions for one in residents)
    assert free + leaving >= urgent or not could_leave
    started = sum(isinstance(action, Start) for action in decision.actions)
    assert started == min(free, sum(one.wanted for one in snapshot.models))


@EXAMPLES
@given(snapshots())
def test_the_next_look_is_in_the_future_and_not_missed(snapshot: Snapshot) -> None:
    decision = decide(snapshot)
    assert decision.look_again_at > snapshot.now
    if snapshot.idle_timeout is None:
        assert decision.look_again_at == math.inf
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
                return attrs.evolve(one, state=STOPPING, retiring=True)
        return one

    again = decide(attrs.evolve(snapshot, models=[done(one) for one in snapshot.models]))
    assert again.actions == ()
    assert again.someone_waits == decision.someone_waits
