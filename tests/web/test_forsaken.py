"""Requests that nobody waits for any more, and llama-servers that go on with them: their slot is nobody else's meanwhile."""

import pytest
import trio

from tests.backend.peer import answer, read_request, until
from tests.web.site import BODY, CHAT, open_site, request
from trio_router.telemetry.events import Outcome


class Computing:
    """Computes for the first who asks until it is told to stop, whether that one is there or not; answers the others."""

    def __init__(self, *, then: bytes = answer()) -> None:
        self.asked = 0
        self.over = trio.Event()
        self.left = trio.Event()
        """Set once its first client had left."""
        self.then = then

    async def __call__(self, stream: trio.SocketStream) -> None:
        while await read_request(stream):
            self.asked += 1
            if self.asked > 1:
                await stream.send_all(answer(b'{"ok":true}'))
                continue
            assert await stream.receive_some(1) == b"", "nothing more is said to it"
            self.left.set()
            await self.over.wait()
            await stream.send_all(self.then)
            return


@pytest.mark.parametrize("then", [answer(), b""], ids=["an answer for nobody", "nothing"])
async def test_who_comes_next_waits_here(sockets, way, then):
    """Where priorities count, and not in llama-server's own queue."""
    server = Computing(then=then)
    async with open_site(sockets, server) as site, site.client() as next_one:
        async with site.client() as leaving:
            await leaving.say(request("POST", CHAT, way, BODY))
            await until(lambda: server.asked == 1)
        with trio.fail_after(2):
            await server.left.wait()
        await site.until_idle()
        left = site.model.scheduler.statistics()
        assert (left.active, left.free) == (0, 0)
        await next_one.say(request("POST", CHAT, way, BODY))
        await until(lambda: site.model.scheduler.waiting == 1)
        assert server.asked == 1
        server.over.set()
        with trio.fail_after(5):
            assert (await next_one.hear("POST")).body == b'{"ok":true}'
        told = await site.told(2)
        assert [event.outcome for event in told] == [Outcome.CANCELLED, Outcome.OK]


async def test_another_slot_is_taken_meanwhile(sockets, way):
    server = Computing()
    async with open_site(sockets, server, slots=2) as site:
        async with site.client() as leaving:
            await leaving.say(request("POST", CHAT, way, BODY))
            await until(lambda: server.asked == 1)
        for _ in range(3):
            assert (await site.ask("POST", CHAT, way, BODY)).status == 200
        await site.until_idle()
        assert site.model.scheduler.statistics().free == 1
        server.over.set()


async def test_what_is_no_llama_server_is_not_waited_for(sockets, way):
    """It may never close, for all we know."""
    server = Computing()
    async with open_site(sockets, server) as site:
        assert site.backend is not None
        site.backend.genuine = False
        async with site.client() as leaving:
            await leaving.say(request("POST", CHAT, way, BODY))
            await until(lambda: server.asked == 1)
        assert (await site.ask("POST", CHAT, way, BODY)).status == 200
        server.over.set()


async def test_one_that_is_silent_for_too_long_is_not_waited_for(sockets, way):
    server = Computing()
    async with open_site(sockets, server, request_timeout_sec=0.3) as site:
        async with site.client() as leaving:
            await leaving.say(request("POST", CHAT, way, BODY))
            await until(lambda: server.asked == 1)
        assert site.backend is not None
        assert not site.backend.heard(), "somebody who looks for a stall sees that nothing comes"
        assert (await site.ask("POST", CHAT, way, BODY)).status == 200
        server.over.set()


async def test_its_backend_is_lost(sockets, way):
    server = Computing()
    async with open_site(sockets, server) as site:
        async with site.client() as leaving:
            await leaving.say(request("POST", CHAT, way, BODY))
            await until(lambda: server.asked == 1)
        await site.until_idle()
        assert site.backend is not None
        assert site.backend.slots[0].connection is not None
        site.backend.slots[0].disconnect()  # as `lose` does
        await until(lambda: site.model.scheduler.statistics().free == 1)
        assert site.backend.slots[0].connection is None
        server.over.set()
