"""When a llama-server counts as stalled, in virtual time."""

from collections.abc import Callable
from typing import Any, cast

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.fleet.fake_backend import FakeConnection, backend_of, connect
from trio_router.backend.backend import Backend
from trio_router.backend.client import BackendClient, NoAnswer
from trio_router.backend.stall import until_stalled


@attrs.define(eq=False)
class Counters:
    """Stands for the client: `/metrics` takes `seconds`, or is refused, and shows what `value` returns."""

    value: Callable[[], int] = lambda: 7
    seconds: float = 0.0
    refused: bool = False
    asked_at: list[float] = attrs.field(factory=list)

    async def metrics(self) -> str:
        self.asked_at.append(trio.current_time())
        await trio.sleep(self.seconds)
        if self.refused:
            raise NoAnswer("/metrics answered 501")
        return f"# TYPE llamacpp:n_decode_total counter\nllamacpp:n_decode_total {self.value()}\nllamacpp:busy {trio.current_time()}\n"


def server(counters: Counters) -> tuple[Backend, FakeConnection]:
    """A backend with a request that waits, and one connection that nobody waits on."""
    backend = backend_of(3)
    backend.client = cast("BackendClient", counters)
    waiting = connect(backend.slots[0])
    waiting.awaited = True
    connect(backend.slots[1])
    return backend, waiting


async def stalls_at(backend: Backend, *, within: float = 10_000) -> float | None:
    with trio.move_on_after(within):
        said = await until_stalled(backend, 100)
        assert said == "llama-server computed nothing for 100 s while requests waited"
        return trio.current_time()
    return None


@pytest.mark.parametrize(("seconds", "refused"), [(0, False), (1000, False), (24, False), (0, True)])
async def test_silent_and_counters_that_stand_still(
    seconds: float, autojump_clock: MockClock, *, refused: bool
) -> None:
    backend, _ = server(Counters(seconds=seconds, refused=refused))
    when = await stalls_at(backend)
    assert when is not None
    assert 100 <= when <= 115


async def test_a_long_prompt_moves_them(autojump_clock: MockClock) -> None:
    counters = Counters(lambda: int(trio.current_time() / 40))
    backend, _ = server(counters)
    assert await stalls_at(backend) is None
    assert len(counters.asked_at) < 400


async def test_a_batch_during_which_it_answers_nothing(autojump_clock: MockClock) -> None:
    @attrs.define(eq=False)
    class Busy(Counters):
        """Answers between two batches of 20 s; our client waits for 5."""

        async def metrics(self) -> str:
            left = 20 - trio.current_time() % 20
            await trio.sleep(min(left, 5))
            if left > 5:
                raise NoAnswer("/metrics did not answer within 5 s")
            return f"llamacpp:n_decode_total {trio.current_time() // 20}\n"

    backend, _ = server(Busy())
    assert await stalls_at(backend) is None


async def test_nobody_waits(autojump_clock: MockClock) -> None:
    counters = Counters()
    backend, waiting = server(counters)
    waiting.awaited = False
    assert await stalls_at(backend) is None
    assert counters.asked_at == []


async def test_somebody_hears_something_now_and_then(autojump_clock: MockClock) -> None:
    counters = Counters(seconds=3)
    backend, _ = server(counters)
    other = connect(backend.slots[2])
    other.awaited = True
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def speak() -> None:
            for _ in range(40):
                await trio.sleep(47)
                other.spoke = True

        when = await stalls_at(backend)
    assert when is not None
    assert 40 * 47 + 95 < when < 40 * 47 + 120


async def test_a_word_while_the_last_question_is_asked(autojump_clock: MockClock) -> None:
    backend, waiting = server(Counters(seconds=20))

    async def speak(_: Any) -> None:
        await trio.sleep(81)
        waiting.spoke = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(speak, None)
        when = await stalls_at(backend)
    assert when is not None
    assert when > 181


async def test_new_requests_are_no_sign_of_life(autojump_clock: MockClock) -> None:
    backend, _ = server(Counters())
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def come_and_go() -> None:
            while True:
                await trio.sleep(7)
                connect(backend.slots[2]).awaited = True

        when = await stalls_at(backend)
        nursery.cancel_scope.cancel()
    assert when is not None
    assert when <= 115


async def test_never(autojump_clock: MockClock) -> None:
    backend, _ = server(Counters())
    with trio.move_on_after(1e9) as scope:
        await until_stalled(backend, float("inf"))
    assert scope.cancelled_caught
