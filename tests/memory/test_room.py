"""The numbers are those of the cases in `room`'s docstring."""

import math

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_router.memory.room import LAYER_SLACK, RAM, Need, Room, Shortage, Spot
from trio_router.memory.spread import grain

GIB = 1024**3


def room(*free: int, ram: int | None = None, most: tuple[int, ...] | None = None) -> Room:
    """So much free on each GPU, in GiB."""
    now = {index: size * GIB for index, size in enumerate(free)}
    ever = {index: size * GIB for index, size in enumerate(most or free)}
    if ram is not None:
        now[RAM] = ever[RAM] = ram * GIB
    return Room(devices=tuple(range(len(free))), free=now, most=ever, coming=dict.fromkeys(now, 0))


def need(size: float, **more) -> Need:
    return Need(device_bytes=int(size * GIB), **more)


def test_a_model_of_unknown_needs_goes_anywhere() -> None:
    assert room(0, 0, ram=0).spot(None) == Spot()
    assert room(0).never(None) is None


def test_1_the_hosts_part() -> None:
    assert room(8, ram=4).spot(need(1, host_bytes=4 * GIB)) == Spot(bytes={0: GIB, RAM: 4 * GIB}, devices=(0,))
    assert room(8, ram=4).spot(need(1, host_bytes=5 * GIB)) is None
    assert room(8).spot(need(1, host_bytes=5 * GIB)) is not None, "nobody bounds it"


def test_1_without_a_gpu_only_the_host_counts() -> None:
    assert Room(free={RAM: 4 * GIB}).spot(need(99, host_bytes=GIB)) == Spot(bytes={RAM: GIB})


def test_2_flags_that_spread_it_are_only_accounted() -> None:
    spread = need(9, fixed_bytes=GIB, grain_bytes=0, shares={0: 0.75, 1: 0.25})
    assert room(7, 3).spot(spread) == Spot(bytes={0: 7 * GIB, 1: 3 * GIB}), "each has its own fixed part"
    assert room(6, 24).spot(spread) is None


@pytest.mark.parametrize(
    ("free", "size", "device"),
    [((24, 10), 9, 1), ((24, 10), 11, 0), ((10, 24), 9, 0), ((10, 10), 9, 0), ((9, 10, 9), 9, 0)],
)
def test_3_the_tightest_that_takes_all_of_it(free: tuple[int, ...], size: int, device: int) -> None:
    assert room(*free).spot(need(size)) == Spot(bytes={device: size * GIB}, devices=(device,))


def test_3_one_that_does_not_tell_comes_last() -> None:
    some = Room(devices=(0, 1), free={1: 10 * GIB})
    assert some.spot(need(9)) == Spot(bytes={1: 9 * GIB}, devices=(1,))
    assert some.spot(need(11)) == Spot(bytes={0: 11 * GIB}, devices=(0,))


def test_3_the_entry_of_router_toml_fixes_it() -> None:
    assert room(24, 10).spot(need(9, devices=(0,))) == Spot(bytes={0: 9 * GIB}, devices=(0,))
    assert room(8, 24).spot(need(9, devices=(0,))) is None


def test_4_split_by_what_each_has_free() -> None:
    spot = room(24, 12).spot(need(27, fixed_bytes=2 * GIB))
    assert spot is not None
    assert spot.devices == (0, 1)
    rest = math.ceil(25 * GIB * LAYER_SLACK)
    assert spot.bytes == {0: rest * 22 // 32 + 2 * GIB, 1: rest * 10 // 32 + 2 * GIB}


def test_4_over_as_few_as_can_take_it_the_roomiest() -> None:
    spot = room(10, 8, 16).spot(need(20))
    assert spot is not None
    assert spot.devices == (0, 2)


def test_4_each_needs_its_own_fixed_part() -> None:
    assert room(10, 10).spot(need(18)) is not None
    assert room(10, 10).spot(need(17, fixed_bytes=2 * GIB)) is not None
    assert room(10, 10).spot(need(17, fixed_bytes=4 * GIB)) is None


def test_4_layers_are_dealt_out_and_not_cut() -> None:
    spot = room(24, 12).spot(need(27, fixed_bytes=2 * GIB, each_bytes=3 * GIB, grain_bytes=GIB))
    assert spot is not None
    assert spot.shares == (25 * GIB * 20 // 28, 25 * GIB * 8 // 28)
    assert spot.bytes == {0: spot.shares[0] + 4 * GIB, 1: spot.shares[1] + 4 * GIB}


@given(
    blocks=st.lists(st.integers(1, 300), min_size=1, max_size=90),
    output=st.integers(0, 2000),
    frees=st.lists(st.integers(0, 20_000), min_size=2, max_size=5),
)
def test_4_however_layers_are_dealt_out_nobody_gets_more_than_was_reserved(blocks, output, frees) -> None:
    """As llama.cpp does it, every layer being as large as the largest: smaller ones only take less."""
    layers = [max(blocks)] * len(blocks) + [output]
    free = dict(enumerate(frees))
    wanted = Need(device_bytes=sum(layers), grain_bytes=grain(blocks, output))
    spot = Room(devices=tuple(free), free=free, most=free).spot(wanted)
    if spot is None or len(spot.devices) < 2 or not sum(spot.shares):
        return
    bounds = [sum(spot.shares[: at + 1]) / sum(spot.shares) for at in range(len(spot.shares))]
    took = dict.fromkeys(spot.devices, 0)
    for number, size in enumerate(layers):
        place = next(at for at, bound in enumerate(bounds) if bound > number / len(layers))
        took[spot.devices[place]] += size
    rounding = len(spot.devices)
    assert all(took[device] <= spot.bytes[device] + rounding for device in spot.devices)
    assert all(spot.bytes[device] <= free[device] for device in spot.devices)


def test_5_one_that_may_be_made_smaller_gets_a_device_to_itself() -> None:
    large = need(40, shrinks=True)
    assert room(8, 12).spot(need(40, shrinks=True)) == Spot(bytes={1: 12 * GIB}, devices=(1,))
    alone = room(24)
    assert alone.spot(large) == Spot(bytes={0: 24 * GIB}, devices=(0,))
    assert alone.never(large) is None
    assert alone.never(need(40)) is not None
    crowded = room(10, most=(24,))
    assert crowded.spot(large) is None
    assert crowded.spot_soon(large, {0: 14 * GIB}) == Spot(bytes={0: 24 * GIB}, devices=(0,))
    assert crowded.spot(need(20, shrinks=True)) is None, "it would fit whole, later"
    assert room(4, ram=1).spot(need(9, host_bytes=2 * GIB, shrinks=True)) is None


def test_never_says_what_is_short() -> None:
    assert room(2, most=(8,)).never(need(7)) is None
    assert room(2, most=(8,)).never(need(9)) == Shortage(required_bytes=9 * GIB, available_bytes=8 * GIB)
    assert room(8, 8).never(need(40)) == Shortage(required_bytes=40 * GIB, available_bytes=16 * GIB)
    assert room(8, 8).never(need(9, devices=(1,))) == Shortage(required_bytes=9 * GIB, available_bytes=8 * GIB)
    assert room(8, ram=2).never(need(1, host_bytes=3 * GIB)) == Shortage(
        required_bytes=3 * GIB, available_bytes=2 * GIB, ram=True
    )


def test_what_waits_has_a_claim() -> None:
    busy = room(8, most=(24,))
    assert busy.claimed(need(20)).spot(need(1)) is None
    assert busy.claimed(need(20)).spot(Need()) is not None, "who needs nothing there takes nothing away"
    assert busy.claimed(need(40)) == busy, "what can never fit claims nothing"


sizes = st.integers(0, 24 * GIB)


@settings(max_examples=300)
@given(st.dictionaries(st.integers(0, 3), sizes, max_size=4), st.none() | sizes, sizes, sizes, sizes, st.data())
def test_a_spot_is_never_larger_than_what_is_free(
    free: dict[int, int], ram: int | None, device_bytes: int, fixed: int, host: int, data: st.DataObject
) -> None:
    allowed = data.draw(st.none() | st.lists(st.sampled_from(sorted(free) or [0]), unique=True, min_size=1))
    bounded = {**free, **({} if ram is None else {RAM: ram})}
    wanted = Need(
        device_bytes=device_bytes,
        fixed_bytes=min(fixed, device_bytes),
        host_bytes=host,
        devices=None if allowed is None else tuple(allowed),
    )
    some = Room(devices=tuple(free), free=bounded, most=bounded, coming={})
    spot = some.spot(wanted)
    assert (some.never(wanted) is None) == (spot is not None)
    if spot is None:
        return
    assert all(size <= bounded.get(device, math.inf) for device, size in spot.bytes.items())
    assert spot.bytes.get(RAM, 0) == host
    if device_bytes and free:
        assert sum(spot.device_bytes.values()) >= device_bytes
        assert set(spot.devices) == set(spot.device_bytes)
        assert allowed is None or set(spot.devices) <= set(allowed)


def test_6_what_strays_onto_other_gpus_must_fit_too_unless_it_never_will() -> None:
    two = attrs.evolve(room(1, 9, most=(8, 9)), strays={0: 2 * GIB})
    assert two.spot(need(4)) is None
    assert two.never(need(4)) is None
    assert attrs.evolve(two, most=two.free).spot(need(4)) == Spot(bytes={0: 2 * GIB, 1: 4 * GIB}, devices=(1,))
    assert attrs.evolve(room(3, 9), strays={0: 2 * GIB}).spot(need(4)).bytes == {0: 2 * GIB, 1: 4 * GIB}
    assert attrs.evolve(room(3, 9), strays={0: 2 * GIB}).spot(need(2)).bytes == {0: 2 * GIB}
    assert attrs.evolve(room(1, 9, 9, most=(8, 9, 9)), strays={0: 2 * GIB}).spot(need(12)) is None, "split, too"
    assert attrs.evolve(room(3), strays={0: 2 * GIB}).spot(Need(host_bytes=5)) == Spot(bytes={RAM: 5}), (
        "it is on no GPU"
    )
