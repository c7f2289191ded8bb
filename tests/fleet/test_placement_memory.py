"""Decisions where memory is short. The numbers are those of the cases in `placement`'s docstring."""

import math

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fleet.test_placement import IDLE, LOADING, NOW, OFF, READY, STARTING, STOPPING, head, model
from trio_router.fleet.placement import Decision, ModelSnapshot, Refuse, Retire, Snapshot, Start, decide
from trio_router.fleet.turns import TURN_LOADS
from trio_router.memory.room import Need, Room, Shortage, Spot
from trio_router.telemetry.events import UnloadReason

EVICTED = UnloadReason.EVICTED


def wanted(alias: str, size: int, key: float = 1.0, **facts) -> ModelSnapshot:
    return model(alias, OFF, head=head(key), need=Need(device_bytes=size), **facts)


def resident(alias: str, size: int, state=READY, **facts) -> ModelSnapshot:
    return model(alias, state, frees={0: size}, **facts)


def decided(*models: ModelSnapshot, free: int, total: int = 24, coming: int = 0, places: int = 9, **room) -> Decision:
    pinned = sum(one.frees.get(0, 0) for one in models if one.pinned)
    memory = Room(devices=(0,), free={0: free}, coming={0: coming}, most={0: total - pinned}, **room)
    return decide(Snapshot(now=NOW, models=models, max_resident=places, idle_timeout=300, room=memory))


def at(size: int) -> Spot:
    return Spot(bytes={0: size}, devices=(0,))


def test_4_started_where_it_fits() -> None:
    assert decided(wanted("a", 10), free=10).actions == (Start("a", at(10)),)


def test_4_what_one_takes_is_not_there_for_the_next() -> None:
    models = [wanted("a", 10, 1.0), wanted("b", 10, 2.0), wanted("c", 4, 3.0)]
    assert decided(*models, free=24).actions == (Start("a", at(10)), Start("b", at(10)), Start("c", at(4)))
    decision = decided(*models, free=20, total=20)
    assert decision.actions == (Start("a", at(10)), Start("b", at(10)))
    assert decision.someone_waits


def test_4_one_of_unknown_needs_counts_by_its_place() -> None:
    assert decided(model("a", OFF, head=head(1.0)), free=0).actions == (Start("a"),)


def test_5_what_can_never_fit_is_refused() -> None:
    decision = decided(wanted("a", 30), free=24)
    assert decision.actions == (Refuse("a", Shortage(required_bytes=30, available_bytes=24)),)
    assert not decision.someone_waits


def test_5_nor_beside_what_is_pinned() -> None:
    decision = decided(wanted("a", 20), resident("p", 10, pinned=True), free=14)
    assert decision.actions == (Refuse("a", Shortage(required_bytes=20, available_bytes=14)),)


def test_5_nor_where_pinned_models_have_every_place() -> None:
    pinned = [resident("p", 1, pinned=True), resident("q", 1, pinned=True, active=1)]
    assert decided(*pinned, wanted("a", 1), free=22, places=2).actions == (Refuse("a", None),)
    assert decided(*pinned, wanted("a", 1), free=22, places=3).actions == (Start("a", at(1)),)
    leaves = [pinned[0], attrs.evolve(pinned[1], retiring=True)]
    assert decided(*leaves, wanted("a", 1), free=22, places=2).actions == ()


def test_5_a_preload_that_can_never_fit_is_given_up_too() -> None:
    models = [model("a", OFF, preload=True, need=Need(device_bytes=30))]
    assert decided(*models, free=24).actions == (Refuse("a", Shortage(required_bytes=30, available_bytes=24)),)


def test_6_wait_for_memory_that_is_coming() -> None:
    idle = resident("idle", 10)
    decision = decided(idle, wanted("a", 10), free=4, coming=6, changes_at=NOW + 3)
    assert decision == Decision(someone_waits=True, memory_waits=True, look_again_at=NOW + 3)


def test_6_but_not_if_it_will_not_be_enough() -> None:
    decision = decided(resident("idle", 10), wanted("a", 11), free=4, coming=6)
    assert decision.actions == (Retire("idle", EVICTED),)


def test_6_what_is_coming_is_there_for_one_only() -> None:
    idle = resident("idle", 10)
    decision = decided(idle, wanted("a", 10), wanted("b", 10, 2.0), free=4, coming=6)
    assert decision.actions == (Retire("idle", EVICTED),), "for b"


def test_7_as_few_as_make_room() -> None:
    residents = [resident("x", 2, last_used=NOW - 90), resident("y", 8, last_used=NOW - 10)]
    assert decided(*residents, wanted("a", 10), free=2).actions == (Retire("y", EVICTED),)
    assert decided(*residents, wanted("a", 3), free=1).actions == (Retire("x", EVICTED),)
    both = decided(*residents, wanted("a", 12), free=2)
    assert both.actions == (Retire("x", EVICTED), Retire("y", EVICTED))


def test_7_there_may_be_places_and_no_memory() -> None:
    decision = decided(resident("x", 8), wanted("a", 10), free=2, places=2)
    assert decision.actions == (Retire("x", EVICTED),)


def test_7_there_may_be_memory_and_no_place() -> None:
    residents = [resident("x", 2, last_used=NOW - 90), resident("y", 8, last_used=NOW - 10)]
    assert decided(*residents, wanted("a", 1), free=14, places=2).actions == (Retire("x", EVICTED),)


def test_7_pinned_models_stay() -> None:
    residents = [resident("x", 8, last_used=0, pinned=True), resident("y", 8)]
    decision = decided(*residents, wanted("a", 10), free=8)
    assert decision.actions == (Retire("y", EVICTED),), "nor does the idle timeout make x leave"


def test_2_the_idle_timeout_does_not_concern_pinned_models() -> None:
    assert decided(resident("x", 8, last_used=0, pinned=True), free=8) == Decision()
    assert decided(resident("x", 8, last_used=0), free=8).actions == (Retire("x", IDLE),)


def test_7_nobody_leaves_in_vain() -> None:
    residents = [resident("x", 8), resident("busy", 12, active=1, ready_at=NOW - 1, load_seconds=5.0)]
    decision = decided(*residents, wanted("a", 20), free=4)
    assert (decision.actions, decision.yielding, decision.someone_waits, decision.memory_waits) == ((), {}, True, False)
    assert decision.look_again_at == NOW - 1 + TURN_LOADS * 5.0, "its turn is over then"


def test_7_busy_ones_too_if_idle_ones_are_not_enough() -> None:
    residents = [resident("x", 8), resident("y", 12, active=1), resident("z", 4)]
    decision = decided(*residents, wanted("a", 12), free=0)
    assert (decision.actions, decision.yielding) == ((Retire("x", EVICTED), Retire("z", EVICTED)), {})
    decision = decided(*residents, wanted("a", 20), free=0)
    assert (decision.actions, decision.yielding) == ((Retire("x", EVICTED),), {"y": "a"})
    begun = [
        attrs.evolve(residents[0], state=STOPPING, retiring=True, heir="a"),
        attrs.evolve(residents[1], yielding=True, heir="a"),
        residents[2],
    ]
    decision = decided(*begun, wanted("a", 20), free=0, coming=8)
    assert (decision.actions, decision.yielding) == ((), {"y": "a"}), "it goes on so"
    decision = decided(*begun, wanted("a", 8), free=0, coming=8)
    assert (decision.actions, decision.yielding) == ((), {}), "it need not leave after all"


def test_6_what_one_leaves_is_its_heirs() -> None:
    leaving = resident("x", 10, STOPPING, retiring=True, heir="a")
    models = [leaving, resident("y", 10), wanted("a", 10, 2.0), wanted("urgent", 10, 1.0)]
    decision = decided(*models, free=0, coming=10)
    assert decision.actions == (Retire("y", EVICTED),), "for the urgent one"


def test_8_what_waits_has_a_claim() -> None:
    busy = resident("busy", 16, active=1)
    small = wanted("small", 4, 2.0)
    assert decided(busy, wanted("large", 20), small, free=8).actions == (), "small would be in its way"
    assert decided(busy, small, free=8).actions == (Start("small", at(4)),)


def test_8_but_not_a_preload() -> None:
    busy = resident("busy", 16, active=1)
    preload = model("large", OFF, preload=True, need=Need(device_bytes=20))
    asked = model("small", OFF, asked=True, need=Need(device_bytes=4))
    assert decided(busy, preload, asked, free=8).actions == (Start("small", at(4)),)


def test_who_waits_for_memory_takes_no_place_from_who_can_start() -> None:
    """Whoever leaves for it leaves a place, too."""
    small = model("small", OFF, head=head(2.0))
    begun = resident("busy", 4, active=1, ready_at=NOW - 1, load_seconds=60.0)  # its turn
    decision = decided(begun, wanted("large", 22), small, free=20, places=2)
    assert (decision.actions, decision.yielding) == ((Start("small"),), {})  # 8
    busy = attrs.evolve(begun, ready_at=-math.inf)
    decision = decided(busy, wanted("large", 22), small, free=20, places=2)
    assert (decision.actions, decision.yielding) == ((Start("small"),), {"busy": "large"})  # 7


# --- whatever the models are -----------------------------------------------------------------------------


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """One GPU of 24; what its residents have not taken is free."""
    models = []
    total = draw(st.integers(8, 24))
    left = total
    for number in range(draw(st.integers(0, 6))):
        state = draw(st.sampled_from([OFF, OFF, READY, LOADING, STARTING, STOPPING]))
        size = draw(st.integers(0, 12))
        size = min(size, left) if state.resident else size
        left -= size if state.resident else 0
        models.append(
            ModelSnapshot(
                alias=f"m{number}",
                state=state,
                retiring=state is STOPPING,
                head=draw(st.none() | st.integers(900, 1000).map(lambda key: head(float(key)))),
                active=draw(st.sampled_from([0, 0, 1])),
                preload=state is not READY and draw(st.booleans()),
                was_ready=state is READY,
                last_used=draw(st.sampled_from([0.0, 650.0, 950.0, 1000.0])),
                need=Need(device_bytes=size),
                frees={0: size} if state.resident else {},
                pinned=draw(st.sampled_from([False, False, False, True])),
                load_seconds=draw(st.sampled_from([0.0, 1.0, 60.0])),
                serving=state is READY,
            )
        )
    coming = sum(one.frees.get(0, 0) for one in models if one.leaving)
    pinned = sum(one.frees.get(0, 0) for one in models if one.pinned and not one.leaving)
    room = Room(devices=(0,), free={0: left}, coming={0: coming}, most={0: total - pinned})
    resident_count = sum(one.resident for one in models)
    places = draw(st.integers(max(1, resident_count), 7))
    return Snapshot(now=NOW, models=models, max_resident=places, idle_timeout=300, room=room)


EXAMPLES = settings(max_examples=200)


@EXAMPLES
@given(snapshots())
def test_no_more_is_started_than_fits_and_nobody_leaves_in_vain(snapshot: Snapshot) -> None:
    decision = decide(snapshot)
    models = {one.alias: one for one in snapshot.models}
    started = sum(action.spot.bytes.get(0, 0) for action in decision.actions if isinstance(action, Start))
    assert started <= snapshot.room.free[0]
    for action in decision.actions:
        one = models[action.alias]
        match action:
            case Refuse(shortage=shortage):
                never = shortage is not None and one.need.device_bytes > snapshot.room.most[0]
                assert never or snapshot.max_resident <= sum(other.pinned for other in models.values())
            case Retire(reason=reason) if reason is EVICTED:
                assert not one.pinned
                assert any(other.wanted and other.wished for other in models.values())


@EXAMPLES
@given(snapshots())
def test_what_was_decided_leads_on(snapshot: Snapshot) -> None:
    """Done, and once what leaves has left, the most urgent that waits for nobody else is started."""
    decision = decide(snapshot)
    actions = {action.alias: action for action in decision.actions}

    def done(one: ModelSnapshot) -> ModelSnapshot:
        match actions.get(one.alias):
            case Start(spot=spot):
                return attrs.evolve(one, state=STARTING, was_ready=False, frees=spot.bytes, behind=None)
            case Retire() as retire:
                return attrs.evolve(one, state=STOPPING, retiring=True, heir=retire.heir, behind=retire.behind)
            case Refuse():
                return attrs.evolve(one, head=None, asked=False, preload=False)
        return one

    models = [done(one) for one in snapshot.models]
    free = snapshot.room.free[0] - sum(
        action.spot.bytes.get(0, 0) for action in decision.actions if isinstance(action, Start)
    )
    leaving = sum(one.frees.get(0, 0) for one in models if one.leaving)
    room = attrs.evolve(snapshot.room, free={0: free}, coming={0: leaving})
    assert decide(attrs.evolve(snapshot, models=models, room=room)).actions == ()
    gone = [attrs.evolve(one, state=OFF, retiring=False, head=None) if one.leaving else one for one in models]
    later = attrs.evolve(snapshot, models=gone, room=attrs.evolve(room, free={0: free + leaving}, coming={0: 0}))
    evicted = [action for action in decision.actions if isinstance(action, Retire) and action.reason is EVICTED]
    if evicted and not decision.yielding:  # else some may wait for what works yet, too
        assert any(isinstance(action, Start) for action in decide(later).actions)
