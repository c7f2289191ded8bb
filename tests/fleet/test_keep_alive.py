"""How long a model stays is what its last request said, in virtual time."""

import math

import pytest
import trio
from trio.testing import MockClock

from tests.fleet.fake_servers import FakeServers
from tests.fleet.fleet import Fleet, running


async def ask(fleet: Fleet, seconds: float, keep_seconds: float | None) -> None:
    """A request that runs for so long, and says how long its model is to stay."""
    lease = await fleet.lease("a")
    fleet.registry.keep("a", keep_seconds)
    await trio.sleep(seconds)
    lease.release()


@pytest.mark.parametrize(
    ("said", "record"),
    [
        ([0.0], ["4 a left: idle"]),
        ([10.0], ["14 a left: idle"]),
        ([100.0], ["104 a left: idle"]),
        ([math.inf], []),
        ([None], ["64 a left: idle"]),
        ([math.inf, None], ["67 a left: idle"]),
        ([5.0, None], ["67 a left: idle"]),
        ([math.inf, 7.0], ["14 a left: idle"]),
        ([1.0, 100.0], ["107 a left: idle"]),
    ],
)  # fmt: skip
async def test_the_last_request_decides(said: list[float | None], record: list[str], autojump_clock: MockClock) -> None:
    async with running(FakeServers(), idle_timeout_sec=60) as fleet:
        for keep_seconds in said:
            await ask(fleet, 3, keep_seconds)
        await trio.sleep(1000)
        assert fleet.of("left:") == record


async def test_it_holds_also_where_models_stay(autojump_clock: MockClock) -> None:
    async with running(FakeServers(), enable_idle_timeout=False) as fleet:
        await ask(fleet, 3, 20)
        await trio.sleep(1000)
        assert fleet.of("left:") == ["24 a left: idle"]


async def test_what_comes_back_goes_by_the_usual_time(autojump_clock: MockClock) -> None:
    async with running(FakeServers(), idle_timeout_sec=60) as fleet:
        await ask(fleet, 3, math.inf)
        await fleet.eject("a")
        await fleet.load("a")
        loaded = trio.current_time()
        await trio.sleep(1000)
        assert fleet.of("left:")[1:] == [f"{loaded + 60:g} a left: idle"]


async def test_who_stays_makes_room_all_the_same(autojump_clock: MockClock) -> None:
    async with running(FakeServers(), max_concurrent_models=1) as fleet:
        await ask(fleet, 3, math.inf)
        await fleet.ask("b", 1)
        assert fleet.of("left:") == ["4.5 a left: evicted"], "half a second after it was used last"
