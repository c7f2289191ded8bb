import itertools

import pytest
import trio
from trio.testing import MockClock

from tests.backend.peer import answer, listening, read_request
from trio_router.backend.address import Address
from trio_router.backend.client import NoAnswer, NoFiles, backend_client
from trio_router.backend.health import MAX_CONSECUTIVE_FAILURES, READY_POLL_SECONDS, Health, until_ready, watch


class Scripted:
    """A client whose probes find what the script says, and then the last of it for ever."""

    def __init__(self, *script: bool | str, seconds: float = 0.0) -> None:
        self.script = list(script)
        self.seconds = seconds
        self.times: list[float] = []

    async def healthy(self) -> bool:
        self.times.append(trio.current_time())
        await trio.sleep(self.seconds)
        found = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(found, str):
            raise NoFiles(found) if found == "files" else NoAnswer(found)
        return found


async def test_ready_is_noticed_within_one_poll(autojump_clock: MockClock):
    client = Scripted("refused", "refused", *[False] * 200, True)
    assert await until_ready(client, Address(port=1)) == 0
    pauses = [after - before for before, after in itertools.pairwise(client.times)]
    assert pauses[0] == pytest.approx(0.003)
    assert all(before <= after + 1e-9 for before, after in itertools.pairwise(pauses))
    assert pauses[-1] == pytest.approx(READY_POLL_SECONDS)
    assert READY_POLL_SECONDS < 0.03


async def test_what_the_answer_took_is_returned(autojump_clock: MockClock):
    assert await until_ready(Scripted(False, True, seconds=0.25), Address(port=1)) == pytest.approx(0.25)


async def test_nothing_is_asked_before_the_socket_is_there(sockets, autojump_clock: MockClock):
    client = Scripted(True)
    path = sockets / "a.sock"
    with trio.move_on_after(1):
        await until_ready(client, Address(path=str(path)))
    assert client.times == []
    path.touch()
    await until_ready(client, Address(path=str(path)))
    assert len(client.times) == 1


async def test_a_server_that_is_never_ready_is_asked_until_cancelled(autojump_clock: MockClock):
    client = Scripted(False)
    with trio.move_on_after(10) as scope:
        await until_ready(client, Address(port=1))
    assert scope.cancelled_caught
    assert 500 < len(client.times) < 600


async def test_watch_gives_up_after_three_in_a_row(autojump_clock: MockClock):
    client, health = Scripted(True, True, "it hangs"), Health()
    began = trio.current_time()
    said = await watch(client, health, 30)
    assert said == "failed 3 health checks in a row, the last with: it hangs"
    # two healthy ones at the interval, then looked at every second once it is ill
    assert [when - began for when in client.times] == [30, 60, 90, 91, 92]
    assert (health.checks, health.failures, health.consecutive_failures) == (5, 3, MAX_CONSECUTIVE_FAILURES)
    assert health.last_error == "it hangs"
    assert len(health.response_seconds) == 2


async def test_one_good_answer_forgives(autojump_clock: MockClock):
    client, health = Scripted("a", "b", True, False, "c", True, "d", "e", "f"), Health()
    assert await watch(client, health, 5) == "failed 3 health checks in a row, the last with: f"
    assert (health.checks, health.failures) == (9, 7)


async def test_without_descriptors_there_is_no_verdict(autojump_clock: MockClock):
    client, health = Scripted("it hangs", "it hangs", *["files"] * 20, "it hangs"), Health()
    with trio.fail_after(100):
        assert await watch(client, health, 30.0) == "failed 3 health checks in a row, the last with: it hangs"
    assert len(client.times) == 23
    assert health.checks == 3


async def test_loading_again_counts_as_a_failure(autojump_clock: MockClock):
    assert await watch(Scripted(False), Health(), 1) == (
        "failed 3 health checks in a row, the last with: /health answered 503"
    )


async def test_a_short_interval_is_kept_also_when_ill(autojump_clock: MockClock):
    client = Scripted("x")
    began = trio.current_time()
    await watch(client, Health(), 0.25)
    assert [when - began for when in client.times] == [0.25, 0.5, 0.75]


async def test_response_times_are_measured_and_bounded(autojump_clock: MockClock):
    client, health = Scripted(True, seconds=0.125), Health()
    with trio.move_on_after(1000):
        await watch(client, health, 1)
    assert list(health.response_seconds) == pytest.approx([0.125] * 20)
    assert health.checks > 800
    assert health.last_error is None
    assert health.last_check is not None


async def test_a_server_that_hangs_is_noticed(sockets, autojump_clock: MockClock):
    """The whole of it, over a socket: 503 while it loads, 200, then accepted and never answered."""
    answers = [answer(status="503 Loading"), answer(status="503 Loading"), answer(), answer()]

    async def script(stream: trio.SocketStream) -> None:
        while await read_request(stream):
            if not answers:
                await trio.sleep_forever()
            await stream.send_all(answers.pop(0))

    async with listening(sockets / "a.sock", script) as address, backend_client(address) as client:
        await until_ready(client, address)
        assert len(answers) == 1
        health = Health()
        assert "did not answer" in await watch(client, health, 30) or health.last_error
        assert (health.checks, health.failures) == (4, 3)
