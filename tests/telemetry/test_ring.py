"""The ring: bounded, counted from 1, woken when something comes."""

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_router.telemetry.ring import Ring


def ring_of(*items: str, max_items: int = 3, max_bytes: int = 100) -> Ring[str]:
    ring: Ring[str] = Ring(max_items=max_items, max_bytes=max_bytes)
    for item in items:
        ring.append(item)
    return ring


@given(items=st.lists(st.text(max_size=9)), max_items=st.integers(1, 9), max_bytes=st.integers(1, 40))
def test_any_position_gives_what_came_after_it_and_is_kept(items: list[str], max_items: int, max_bytes: int) -> None:
    ring = ring_of(*items, max_items=max_items, max_bytes=max_bytes)
    kept = items[ring.forgotten :]
    assert ring.written == len(items)
    assert len(ring) == len(kept) <= max_items
    assert sum(map(len, kept)) <= max_bytes or len(kept) == 1
    assert bool(kept) == bool(items)
    for position in range(len(items) + 1):
        assert ring.after(position, 10**6) == items[max(position, ring.forgotten) :]
    for count in range(len(items) + 2):
        assert ring.last(count) == kept[max(0, len(kept) - count) :]


def test_as_much_as_fits_but_at_least_one() -> None:
    ring = ring_of("aaaa", "bb", "cc")
    assert ring.after(0, 6) == ["aaaa", "bb"]
    assert ring.after(0, 1) == ["aaaa"]
    assert ring.after(3, 1) == []


async def test_wakes_everyone(autojump_clock: trio.testing.MockClock) -> None:
    ring = ring_of()
    record: list[float] = []

    async def wait(position: int) -> None:
        await ring.until_after(position)
        record.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for position in (0, 0, 1):
            nursery.start_soon(wait, position)
        await trio.sleep(1)
        ring.append("a")
        await trio.sleep(1)
        assert record == [1, 1]
        ring.append("b")
    assert record == [1, 1, 2]


async def test_closed_is_not_waited_for() -> None:
    ring = ring_of("a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ring.until_after, 1)
        await trio.testing.wait_all_tasks_blocked()
        ring.close()
    await ring.until_after(7)
    ring.append("b")
    assert ring.last(9) == ["a", "b"]


def test_nobody_waits_in_vain_for_a_forgotten_one() -> None:
    ring = ring_of("a", "b", "c", "d", "e")
    assert ring.forgotten == 2
    with pytest.raises(RuntimeError):  # no checkpoint is needed for what is there, so no event loop either
        trio.lowlevel.current_task()
