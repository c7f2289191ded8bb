"""A low request gives its slot to a high one, on both ways in, and is done again."""

import json

import pytest
import trio

from tests.backend.peer import answer, until
from tests.web.site import CHAT, Site, open_site, request
from tests.web.test_app import EVENTS, STREAM, Server, chunk
from trio_router.telemetry.events import Outcome

LOW, HIGH, NORMAL = ([("X-Request-Priority", priority)] for priority in ("low", "high", "normal"))
ANSWER = answer(b'{"ok":true}', headers=b"Content-Type: application/json\r\n")


def body(**more) -> bytes:
    return json.dumps({"model": "qwen", "messages": [], **more}).encode()


class Slow(Server):
    """Answers all but the first request at once; that one so far as `begun`."""

    def __init__(self, *begun: bytes) -> None:
        super().__init__()
        self.begun = begun

    @property
    def pieces(self):
        return (*self.begun, trio.Event()) if len(self.asked) == 1 else (ANSWER,)

    @pieces.setter
    def pieces(self, _) -> None:
        """There is no choice."""


async def running(site: Site, server: Server, count: int = 1) -> None:
    await until(lambda: len(server.asked) == count)


@pytest.mark.parametrize("stream", [False, True])
async def test_it_is_done_again_from_the_start(sockets, way, stream):
    server = Slow(STREAM) if stream else Slow()
    async with open_site(sockets, server, preempt_low=True) as site, site.client() as low:
        await low.say(request("POST", CHAT, [*way, *LOW], body(stream=stream)))
        await running(site, server)
        reply = await site.ask("POST", CHAT, [*way, *HIGH], body())
        assert (reply.status, reply.body) == (200, b'{"ok":true}')
        assert server.cut == 1  # llama-server saw its client leave
        again = await low.hear("POST")
        assert (again.status, again.body) == (200, b'{"ok":true}')
        assert len(server.asked) == 3
        assert server.asked[2].partition(b"\r\n\r\n")[2] == server.asked[0].partition(b"\r\n\r\n")[2]
        assert {event.outcome for event in await site.told(2)} == {Outcome.OK}


@pytest.mark.parametrize(
    ("first", "fields", "second", "on"),
    [
        (LOW, {}, HIGH, False),
        (LOW, {}, NORMAL, True),
        (NORMAL, {}, HIGH, True),
        (LOW, {"return_progress": True}, HIGH, True),
    ],
    ids=["off", "for normal", "normal", "one that wants to hear of it"],
)
async def test_else_nobody_is_stopped(sockets, way, first, fields, second, on):
    server = Slow()
    async with open_site(sockets, server, preempt_low=on, queue_timeout_sec=0.3) as site, site.client() as client:
        await client.say(request("POST", CHAT, [*way, *first], body(**fields)))
        await running(site, server)
        assert (await site.ask("POST", CHAT, [*way, *second], body())).code == (504, "queue_timeout")
        assert (server.cut, len(server.asked)) == (0, 1)


async def test_a_stream_that_has_begun_is_never_cut(sockets, way):
    server = Slow(STREAM, chunk(EVENTS[0]))
    async with open_site(sockets, server, preempt_low=True, queue_timeout_sec=0.3) as site, site.client() as low:
        await low.say(request("POST", CHAT, [*way, *LOW], body(stream=True)))
        with trio.fail_after(10):
            while EVENTS[0] not in low._left:
                low._left += await low.stream.receive_some(65536)
        assert (await site.ask("POST", CHAT, [*way, *HIGH], body())).code == (504, "queue_timeout")
        assert server.cut == 0


async def test_one_that_has_waited_long_keeps_its_slot(sockets, way):
    server = Slow()
    settings = {"preempt_low": True, "queue_timeout_sec": 0.3, "aging_sec": 0.01}
    async with open_site(sockets, server, **settings) as site, site.client() as low:
        await low.say(request("POST", CHAT, [*way, *LOW], body()))
        await running(site, server)
        await trio.sleep(0.05)
        assert (await site.ask("POST", CHAT, [*way, *HIGH], body())).code == (504, "queue_timeout")
        assert server.cut == 0


async def test_as_many_as_there_are_high_ones(sockets, way):
    class TwoSlow(Slow):
        @property
        def pieces(self):
            return (trio.Event(),) if len(self.asked) <= 2 else (0.2, ANSWER)

        @pieces.setter
        def pieces(self, _) -> None:
            """There is no choice."""

    server = TwoSlow()
    async with (
        open_site(sockets, server, slots=2, preempt_low=True) as site,
        site.client() as first,
        site.client() as second,
    ):
        for number, low in enumerate((first, second), 1):
            await low.say(request("POST", CHAT, [*way, *LOW], body()))
            await running(site, server, number)
        assert (await site.ask("POST", CHAT, [*way, *HIGH], body())).status == 200
        assert server.cut == 1  # the one that came last
        assert (await second.hear("POST")).status == 200
        assert (await site.ask("POST", CHAT, [*way, *HIGH], body())).status == 200
        await first.stream.aclose()
