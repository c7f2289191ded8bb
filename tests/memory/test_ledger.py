"""The ledger by itself: single facts, then any order of loads, failures, evictions and others' programs."""

import math
from typing import Any

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.fleet.conftest import _quiet as quiet  # noqa: F401  (a fixture)
from trio_router.memory.devices import Device, DeviceStatus, Snapshot
from trio_router.memory.ledger import SEEN_SECONDS, Ledger, Reservation
from trio_router.memory.room import RAM, Need, Room, Spot

GIB = 1024**3


def device(index: int, total: int | None, free: int | None) -> Device:
    return Device(
        index=index, uuid=f"GPU-{index}", name="fake", total_bytes=total, free_bytes=free,
        used_bytes=None if free is None or total is None else total - free, utilization_percent=None,
        temperature_celsius=None, power_watts=None, processes={},
    )  # fmt: skip


def sample(*free: float | None, at: float, total: float = 24, stale: bool = False) -> Snapshot:
    """So much free on each GPU, in GiB."""
    devices = tuple(
        device(index, int(total * GIB), None if size is None else int(size * GIB)) for index, size in enumerate(free)
    )
    return Snapshot(taken_at=at, seen_at=at, devices=devices, status=DeviceStatus.OK, stale=stale)


def spot(gibibytes: float, **more: Any) -> Spot:
    return Spot(bytes={0: int(gibibytes * GIB)}, devices=(0,), **more)


def free(ledger: Ledger, seen: Snapshot, now: float, **more: Any) -> tuple[float, float, float]:
    """Free, coming and most of the first GPU, in GiB."""
    room = ledger.room(seen, None, now, **more)
    return room.free[0] / GIB, room.coming[0] / GIB, room.most[0] / GIB


def test_a_reservation_counts_before_the_process_exists() -> None:
    ledger = Ledger(reserve_bytes=GIB)
    seen = sample(20, at=0)
    assert free(ledger, seen, 0) == (19, 0, 19)
    ledger.reserve("a", spot(8), seen)
    assert free(ledger, seen, 0) == (11, 0, 23), "nobody knows that it has taken nothing yet"


def test_until_a_sample_was_begun_after_it_was_ready() -> None:
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    ledger.ready("a", 5)
    assert free(ledger, sample(17, at=5), 5)[:2] == (9, 7), "7 of its 8 are in both numbers"
    assert free(ledger, sample(16, at=5.1), 5.1) == (16, 0, 24)


def test_what_it_takes_in_use_is_kept_for_it() -> None:
    ledger = Ledger()
    ledger.reserve("a", Spot(bytes={0: 6 * GIB, 1: 2 * GIB}, devices=(0, 1)), sample(24, 24, at=0), growth=GIB)
    ledger.ready("a", 5)
    room = ledger.room(sample(19, 22.5, at=6), None, 6)
    assert room.free == {0: 18.25 * GIB, 1: 22.25 * GIB}
    ledger.leaving("a")
    leaving = ledger.room(sample(19, 22.5, at=6), None, 6)
    assert leaving.free == room.free, "its last requests may still have it take that"
    assert leaving.coming == {0: 6 * GIB, 1: 2 * GIB}
    ledger.left("a", sample(19, 22.5, at=6), 7)
    assert ledger.room(sample(24, 24, at=8), None, 8).free == {0: 24 * GIB, 1: 24 * GIB}


def test_what_strays_onto_other_gpus_is_known_of_those_there_are() -> None:
    assert Ledger(strays={0: GIB, 7: GIB}).room(sample(24, 24, at=0), None, 0).strays == {0: GIB}


def test_what_a_load_took_already_comes_when_it_is_ready() -> None:
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    assert free(ledger, sample(18, at=1), 1)[:2] == (10, 6)


def test_other_programs_count() -> None:
    assert free(Ledger(), sample(3, at=0), 0) == (3, 0, 3)


def test_what_left_comes_until_it_is_seen() -> None:
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    ledger.ready("a", 1)
    ledger.leaving("a")
    assert free(ledger, sample(16, at=2), 2) == (16, 8, 24)
    ledger.left("a", sample(16, at=2), 3)
    assert free(ledger, sample(16, at=2), 3) == (16, 8, 24)
    assert ledger.room(sample(16, at=2), None, 3).changes_at == 3 + SEEN_SECONDS
    assert free(ledger, sample(17, at=3.4), 3.4) == (17, 8, 24), "not all of it"
    assert free(ledger, sample(24, at=3.8), 3.8) == (24, 0, 24)
    assert ledger.room(sample(24, at=3.8), None, 3.8).changes_at == math.inf


def test_a_load_since_hides_what_became_free() -> None:
    """Seen on an H100: the memory is back at once, the next model takes it, and free never rises."""
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    ledger.ready("a", 1)
    ledger.left("a", sample(16, at=2), 3)
    ledger.reserve("b", spot(8), sample(16, at=2))
    ledger.ready("b", 3.2)
    assert free(ledger, sample(16, at=3.4), 3.4) == (16, 8, 24), "it may still come"
    assert free(ledger, sample(16, at=3.6), 3.6) == (16, 0, 24)


def test_a_load_that_the_sample_before_did_not_show_hides_it_too() -> None:
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    ledger.ready("a", 1)
    ledger.reserve("b", spot(8), sample(16, at=2))
    ledger.ready("b", 2.5)
    ledger.left("a", sample(16, at=2), 3)
    assert free(ledger, sample(16, at=3.6), 3.6) == (16, 0, 24)


def test_but_not_for_ever() -> None:
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    ledger.left("a", sample(16, at=2), 3)
    before, end = 3 + 0.9 * SEEN_SECONDS, 3 + SEEN_SECONDS
    assert free(ledger, sample(16, at=before), before) == (16, 8, 24)
    assert free(ledger, sample(16, at=end), end) == (16, 0, 16)


def test_a_look_from_before_the_end_is_not_the_last() -> None:
    """The router had no turn for some seconds: what it saw before them is no reason that another model leaves."""
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    ledger.left("a", sample(16, at=2), 3)
    late = 3 + 2 * SEEN_SECONDS
    assert free(ledger, sample(16, at=3.4), late) == (16, 8, 24)
    assert free(ledger, sample(24, at=late), late) == (24, 0, 24)


def test_a_driver_that_fails_while_a_load_is_half_seen() -> None:
    """Nothing will be seen any more: who waits for that waits for ever."""
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    ledger.ready("a", 1)
    assert free(ledger, sample(20, at=0.9), 2)[:2] == (12, 4)
    assert free(ledger, sample(20, at=0.9, stale=True), 2)[:2] == (12, 0)


def test_a_driver_that_fails() -> None:
    ledger = Ledger()
    last = sample(24, at=0, stale=True)
    ledger.reserve("a", spot(8), last)
    ledger.ready("a", 1)
    assert free(ledger, last, 100)[0] == 16, "loaded since: counted in full"
    ledger.left("a", last, 100)
    assert free(ledger, last, 100.5)[:2] == (16, 8), "and its memory may not be free yet"
    assert free(ledger, last, 100 + SEEN_SECONDS)[:2] == (24, 0)


def test_one_that_came_and_left_between_two_samples() -> None:
    ledger = Ledger()
    seen = sample(24, at=0)
    ledger.reserve("a", spot(8), seen)
    ledger.ready("a", 1)
    ledger.left("a", seen, 1.5)
    assert free(ledger, seen, 1.5)[:2] == (16, 8)
    assert free(ledger, sample(23, at=2), 2)[:2] == (23, 8), "now it shows"
    assert free(ledger, sample(24, at=7), 7)[:2] == (24, 0)


def test_a_driver_that_fails_shows_nothing_free() -> None:
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    ledger.ready("a", 1)
    last = sample(16, at=2, stale=True)
    ledger.left("a", last, 100)
    assert free(ledger, last, 100) == (16, 8, 24)
    assert free(ledger, last, 100 + SEEN_SECONDS) == (24, 0, 24)


def test_pinned_models_do_not_leave_for_others() -> None:
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    ledger.ready("a", 1)
    assert free(ledger, sample(16, at=2), 2, pinned=["a"]) == (16, 0, 16)
    ledger.leaving("a")
    assert free(ledger, sample(16, at=2), 2, pinned=["a"]) == (16, 8, 24), "an eject does make it leave"


def test_nobody_knows_what_a_model_of_unknown_needs_would_free() -> None:
    ledger = Ledger()
    ledger.reserve("a", Spot(), sample(24, at=0), known=False)
    assert free(ledger, sample(4, at=2), 2) == (4, 0, 24)


def test_one_that_is_restarted_takes_it_again() -> None:
    ledger = Ledger()
    ledger.reserve("a", spot(8), sample(24, at=0))
    ledger.ready("a", 1)
    ledger.reloading("a", sample(16, at=2))
    assert free(ledger, sample(24, at=3), 3) == (16, 0, 24)


@pytest.mark.parametrize(("total", "shown"), [(24, None), (None, 24), (None, None)])
def test_a_device_that_does_not_tell(total: int | None, shown: int | None) -> None:
    seen = Snapshot(taken_at=0, seen_at=0, devices=(device(0, total, shown),), status=DeviceStatus.OK)
    room = Ledger().room(seen, None, 0)
    assert (room.devices, room.free) == ((0,), {})
    assert room.spot(Need(device_bytes=99 * GIB)) == Spot(bytes={0: 99 * GIB}, devices=(0,))


def ram(room: Room) -> tuple[int, int, int]:
    return room.free[RAM], room.coming[RAM], room.most[RAM]


def test_the_hosts_memory_by_default() -> None:
    ledger = Ledger()
    nothing = sample(at=0)
    assert ram(ledger.room(nothing, 1000, 0)) == (900, 0, 900)
    ledger.reserve("a", Spot(bytes={RAM: 300}), nothing)
    assert ram(ledger.room(nothing, 1000, 0)) == (600, 0, 900)
    ledger.ready("a", 1)
    assert ram(ledger.room(nothing, 1000, 2)) == (600, 0, 900), "mapped files stay available, and count all the same"
    assert ram(ledger.room(nothing, 400, 2)) == (360, 0, 660), "others take more than they did"
    ledger.left("a", nothing, 3)
    assert ram(ledger.room(nothing, 400, 3)) == (360, 0, 360)


def test_the_hosts_memory_as_router_toml_says() -> None:
    ledger = Ledger(ram_bytes=1000)
    for available in (None, 10, 10**9):
        assert ram(ledger.room(sample(at=0), available, 0)) == (1000, 0, 1000)


def test_nobody_bounds_the_hosts_memory() -> None:
    assert RAM not in Ledger().room(sample(at=0), None, 0).free


# --- whatever happens ---------------------------------------------------------------------------------

TOTAL = 24 * GIB
STRAY = GIB // 4
RESERVE = GIB // 2
ALIASES = tuple("abcdef")
gigabytes = st.integers(0, 48).map(lambda half: half * GIB // 2)


@attrs.define
class Server:
    """What a model's llama-server really holds."""

    reserved: Reservation
    share: float = 0.0
    """Of what it will hold when it is ready."""
    ready: bool = False
    used: bool = False
    left_at: float = math.nan

    @property
    def spot(self) -> Spot:
        return self.reserved.spot

    def on(self, index: int) -> int:
        later = self.reserved.growing(index)
        return int((self.spot.bytes.get(index, 0) - later) * self.share) + (later if self.used else 0)


class Machine(RuleBasedStateMachine):
    """Two GPUs, models that come and go, other programs; the ledger sees samples only, and those late."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ledger = Ledger(reserve_bytes=RESERVE, ram_bytes=TOTAL, strays={0: STRAY})
        self.foreign = [0, 0]
        self.servers: dict[str, Server] = {}
        self.vanishing: list[Server] = []
        self.look()

    def shown(self, index: int) -> int:
        held = sum(server.on(index) for server in (*self.servers.values(), *self.vanishing))
        return TOTAL - self.foreign[index] - held

    def grow(self, alias: str, *, share: float, used: bool = False) -> bool:
        """Have it take so much, if there is so much: others may have come before it, and then it dies."""
        server = self.servers[alias]
        before = server.share, server.used
        server.share, server.used = max(server.share, share), server.used or used
        if min(self.shown(index) for index in (0, 1)) >= 0:
            return True
        server.share, server.used = before
        self._leaves(alias)
        return False

    def room(self) -> Room:
        return self.ledger.room(self.seen, None, self.now)

    @rule()
    def look(self) -> None:
        devices = tuple(device(index, TOTAL, self.shown(index)) for index in (0, 1))
        self.seen = Snapshot(taken_at=self.now, seen_at=self.now, devices=devices, status=DeviceStatus.OK)
        self.foreign_then = list(self.foreign)

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.vanishing = [server for server in self.vanishing if self.now < server.left_at + SEEN_SECONDS]

    @rule(index=st.integers(0, 1), size=gigabytes)
    def others(self, index: int, size: int) -> None:
        self.foreign[index] = min(size, self.foreign[index] + self.shown(index))

    @rule(
        alias=st.sampled_from(ALIASES),
        size=gigabytes,
        fixed=st.integers(0, GIB),
        host=gigabytes,
        grows=st.floats(0, 0.3),
    )
    def load(self, alias: str, size: int, fixed: int, host: int, grows: float) -> None:
        if alias in self.servers:
            return
        need = Need(device_bytes=size, fixed_bytes=min(fixed, size), host_bytes=host)
        room = self.room()
        found = room.spot(need)
        if found is None:
            return
        assert room.never(need) is None
        self.servers[alias] = Server(self.ledger.reserve(alias, found, self.seen, growth=int(size * grows)))
        for index in found.device_bytes:
            if index not in found.devices and room.most[index] < STRAY:
                continue  # nothing would ever make room for what strays there
            # whatever has still to be taken is, and nothing of ours is where memory was short
            promised = sum(server.spot.bytes.get(index, 0) for server in self.servers.values())
            still_there = sum(server.on(index) for server in self.vanishing)
            assert promised + still_there + self.foreign_then[index] <= TOTAL - RESERVE
        assert sum(server.spot.bytes.get(RAM, 0) for server in self.servers.values()) <= TOTAL

    def _some(self, data: st.DataObject, *, ready: bool | None = None) -> str | None:
        aliases = sorted(alias for alias, server in self.servers.items() if ready is None or server.ready is ready)
        return data.draw(st.sampled_from(aliases)) if aliases else None

    @rule(data=st.data(), share=st.floats(0, 1))
    def goes_on(self, data: st.DataObject, share: float) -> None:
        if (alias := self._some(data, ready=False)) is not None:
            self.grow(alias, share=share)

    @rule(data=st.data())
    def is_ready(self, data: st.DataObject) -> None:
        if (alias := self._some(data, ready=False)) is not None:
            self._is_ready(alias)

    def _is_ready(self, alias: str) -> None:
        if self.grow(alias, share=1.0):
            self.servers[alias].ready = True
            self.ledger.ready(alias, self.now)

    @rule(data=st.data())
    def is_used(self, data: st.DataObject) -> None:
        if (alias := self._some(data, ready=True)) is not None:
            self.grow(alias, share=1.0, used=True)

    @rule(data=st.data())
    def crashes(self, data: st.DataObject) -> None:
        if (alias := self._some(data)) is not None:
            self.ledger.reloading(alias, self.seen)
            server = self.servers[alias]
            if server.reserved.leaving:  # there will be no other one
                self._leaves(alias)
            else:
                server.share, server.ready, server.used = 0.0, False, False

    @rule(data=st.data())
    def is_told_to_leave(self, data: st.DataObject) -> None:
        if (alias := self._some(data)) is not None:
            self.ledger.leaving(alias)

    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        if (alias := self._some(data)) is not None:
            self._leaves(alias)

    def _leaves(self, alias: str) -> None:
        server = self.servers.pop(alias)
        server.left_at = self.now
        self.vanishing.append(server)
        self.ledger.left(alias, self.seen, self.now)

    @precondition(lambda self: self.vanishing)
    @rule()
    def memory_is_freed(self) -> None:
        self.vanishing.pop(0)

    @rule()
    def all_settles(self) -> None:
        """Once nothing moves any more, what may be reserved is what is free, and nothing more is awaited."""
        for alias in list(self.servers):
            self._is_ready(alias)
        self.wait(10.0)
        self.look()
        self.wait(1.0)
        room = self.room()
        for index in (0, 1):
            held = self.ledger.held.values()
            leaving = sum(one.spot.bytes.get(index, 0) for one in held if one.leaving)
            growing = sum(one.growing(index) for one in held)
            assert (room.free[index], room.coming[index]) == (self.shown(index) - RESERVE - growing, leaving)
        assert room.changes_at == math.inf

    @invariant()
    def what_is_reserved_is_told_once(self) -> None:
        assert self.ledger.held.keys() == self.servers.keys()
        room = self.room()
        for index in (0, 1):
            assert room.free[index] <= self.seen.devices[index].free_bytes - RESERVE + sum(
                server.on(index) for server in self.vanishing
            ) + sum(gone.bytes.get(index, 0) for gone in self.ledger._gone)
            assert room.coming[index] >= 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40)
