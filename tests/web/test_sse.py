"""The hub: one rendering for all, positions instead of queues."""

import json
from contextlib import ExitStack
from typing import Any

import pytest
import trio

from trio_router.telemetry.ring import Ring
from trio_router.web.sse import HEARTBEAT_SECONDS, PIECE_BYTES, RETRY, Hub, Reader, event_bytes, resume_position


def hub_of(now: dict[str, Any] | None = None, **more: Any) -> Hub:
    state = now if now is not None else {}
    return Hub(opening=lambda: ("all", state), boot="b00", **more)


def parsed(piece: bytes) -> list[tuple[str, str, Any]]:
    """(id, name, data) of each event of a piece."""
    found = []
    for block in piece.removeprefix(RETRY).split(b"\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.decode().split("\n"))
        found.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return found


def ids(piece: bytes) -> list[str]:
    return [event[0] for event in parsed(piece)]


async def all_of(reader: Reader) -> list[bytes]:
    """Every piece until the end."""
    pieces = []
    while piece := await reader.receive():
        pieces.append(piece)
    return pieces


def test_event_bytes() -> None:
    assert event_bytes("update", "b-1", "{}") == b"id: b-1\nevent: update\ndata: {}\n\n"
    assert event_bytes("x", "b-1", "a\nb") == b"id: b-1\nevent: x\ndata: a\ndata: b\n\n"


async def test_opening_then_each_event_once() -> None:
    now = {"n": 0}
    hub = hub_of(now)
    with hub.reader(None) as reader:
        first = await reader.receive()
        assert first.startswith(RETRY)
        assert parsed(first) == [("b00-0", "all", {"n": 0})]
        now["n"] = 1
        hub.publish("update", now)
        now["n"] = 2  # an event is what was true when it happened
        hub.publish("update", now)
        assert parsed(await reader.receive()) == [("b00-1", "update", {"n": 1}), ("b00-2", "update", {"n": 2})]
        with hub.reader(None) as late:
            assert parsed(await late.receive()) == [("b00-2", "all", {"n": 2})]


async def test_waits_for_what_happens(autojump_clock: trio.testing.MockClock) -> None:
    hub = hub_of()
    with hub.reader(None) as reader:
        await reader.receive()
        async with trio.open_nursery() as nursery:

            async def publish_later() -> None:
                await trio.sleep(3)
                hub.publish("update", {})

            nursery.start_soon(publish_later)
            assert ids(await reader.receive()) == ["b00-1"]
        assert trio.current_time() == 3


async def test_many_readers_are_one_rendering() -> None:
    hub = hub_of()
    with ExitStack() as stack:
        readers = [stack.enter_context(hub.reader(None)) for _ in range(300)]
        openings = [await reader.receive() for reader in readers]
        assert len(set(openings)) == 1
        for number in range(10):
            hub.publish("update", {"number": number})
            pieces = [await reader.receive() for reader in readers]
            assert all(piece is pieces[0] for piece in pieces)  # not even a copy
        assert hub.statistics().renderings == 11
        assert hub.statistics().readers == 300
    assert hub.statistics().readers == 0


async def test_an_opening_is_rendered_again_when_it_may_be_another(
    autojump_clock: trio.testing.MockClock,
) -> None:
    now = {"n": 0}
    hub = hub_of(now, opening_seconds=1.0)

    async def opening() -> Any:
        with hub.reader(None) as reader:
            return parsed(await reader.receive())[0][2]["n"]

    assert await opening() == 0
    now["n"] = 1
    assert await opening() == 0
    hub.publish("update", now)
    assert await opening() == 1
    now["n"] = 2
    await trio.sleep(1.1)
    assert await opening() == 2


async def test_resumes_from_every_position() -> None:
    hub = hub_of()
    for number in range(1, 6):
        hub.publish("update", number)
    for position in range(6):
        with hub.reader(f"b00-{position}") as reader:
            first = await reader.receive()
            assert first == RETRY
            hub.close()
            pieces = await all_of(reader)
            assert [event[2] for piece in pieces for event in parsed(piece)] == list(range(position + 1, 6))


@pytest.mark.parametrize(
    "sent", [None, "", "b00-6", "b00--1", "b00-01", "b00-1.0", "c00-1", "-1", "1", "b00-" + "9" * 4000, "b00-\u0661"]
)
async def test_begins_anew(sent: str | None) -> None:
    hub = hub_of()
    for number in range(1, 6):
        hub.publish("update", number)
    with hub.reader(sent) as reader:
        assert parsed(await reader.receive()) == [("b00-5", "all", {})]


async def test_an_id_that_is_too_old_begins_anew() -> None:
    hub = hub_of(ring=Ring(max_items=3, max_bytes=10**6))
    for number in range(1, 6):
        hub.publish("update", number)
    with hub.reader("b00-1") as reader:
        assert ids(await reader.receive()) == ["b00-5"]
    with hub.reader("b00-2") as reader:
        await reader.receive()
        assert ids(await reader.receive()) == ["b00-3", "b00-4", "b00-5"]


async def test_a_slow_reader_is_dropped_and_resumes_without_a_loss() -> None:
    hub = hub_of(ring=Ring(max_items=8, max_bytes=10**6), max_behind=4)
    with hub.reader(None) as reader:
        await reader.receive()
        hub.publish("update", 1)
        assert ids(await reader.receive()) == ["b00-1"]
        for number in range(2, 7):  # five: one more than it may be behind
            hub.publish("update", number)
        assert await reader.receive() == b""
    assert hub.statistics().dropped == 1
    hub.publish("update", 7)
    with hub.reader("b00-1") as reader:  # six behind, and yet it gets on: it cannot have had them
        assert await reader.receive() == RETRY
        assert ids(await reader.receive()) == [f"b00-{number}" for number in range(2, 8)]
        for number in range(8, 13):
            hub.publish("update", number)
        assert await reader.receive() == b""  # now that it had caught up, it may be behind no more than others
    assert hub.statistics().dropped == 2


async def test_a_reader_the_ring_has_left_behind_is_dropped() -> None:
    hub = hub_of(ring=Ring(max_items=100, max_bytes=2000))
    with hub.reader(None) as reader:
        await reader.receive()
        for _ in range(4):
            hub.publish("update", "x" * 900)
        assert await reader.receive() == b""


async def test_a_piece_is_bounded() -> None:
    hub = hub_of()
    with hub.reader(None) as reader:
        await reader.receive()
        for _ in range(30):
            hub.publish("update", "x" * 9000)
        hub.close()
        pieces = await all_of(reader)
    assert [identity for piece in pieces for identity in ids(piece)] == [f"b00-{number}" for number in range(1, 31)]
    assert all(len(piece) <= PIECE_BYTES for piece in pieces)
    assert len(pieces) == 5


async def test_close_ends_after_what_was_published() -> None:
    hub = hub_of()
    with hub.reader(None) as one, hub.reader(None) as other:
        await one.receive()
        hub.publish("last", {})
        hub.close()
        assert [ids(piece) for piece in await all_of(one)] == [["b00-1"]]
        assert [ids(piece) for piece in await all_of(other)] == [["b00-0"], ["b00-1"]]
    with hub.reader("b00-0") as again:
        assert [ids(piece) for piece in await all_of(again)] == [[], ["b00-1"]]


async def test_close_wakes_who_waits(autojump_clock: trio.testing.MockClock) -> None:
    hub = hub_of()
    with hub.reader(None) as reader:
        await reader.receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(all_of, reader)
            await trio.testing.wait_all_tasks_blocked()
            hub.close()


async def test_heartbeats_only_while_somebody_reads(autojump_clock: trio.testing.MockClock) -> None:
    hub = hub_of()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hub.beat)
        await trio.sleep(1000)
        assert hub.statistics().written == 0
        with hub.reader(None) as reader:
            await reader.receive()
            began = trio.current_time()
            for _ in range(3):
                assert parsed(await reader.receive())[0][1] == "heartbeat"
            assert trio.current_time() - began == 3 * HEARTBEAT_SECONDS
        await trio.sleep(1000)
        assert hub.statistics().written == 3
        with hub.reader("b00-3") as reader:  # an hour later nothing was missed
            assert await reader.receive() == RETRY
        nursery.cancel_scope.cancel()


async def test_joining_is_called_for_the_first_reader_only() -> None:
    record: list[str] = []
    hub = hub_of(joining=lambda: record.append("joins"))
    with hub.reader(None), hub.reader(None):
        pass
    with hub.reader(None):
        pass
    assert record == ["joins", "joins"]


def test_resume_position() -> None:
    ring: Ring[bytes] = Ring(max_items=2, max_bytes=100)
    for _ in range(5):
        ring.append(b"x")
    assert [resume_position(f"b00-{number}", "b00", ring) for number in range(7)] == [None, None, None, 3, 4, 5, None]
    assert resume_position(" b00-4 ", "b00", ring) == 4
