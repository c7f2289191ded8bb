"""What is under way, and its end by an operator, whichever way it came and wherever it is."""

import json

import trio

from tests.backend.peer import until
from tests.web.site import BODY, CHAT, Headers, Site, open_site, request
from tests.web.test_app import EVENTS, STREAM, Server, chunk
from trio_router.config.schema import KeyConfig
from trio_router.telemetry.events import Outcome


async def listed(site: Site, headers: Headers | None = None) -> list[dict]:
    found = json.loads((await site.ask("GET", "/v1/requests", headers)).body)
    assert found["total"] == len(found["requests"])
    return found["requests"]


async def until_state(site: Site, *states: str, headers: Headers | None = None) -> list[dict]:
    with trio.fail_after(5):
        while True:
            found = await listed(site, headers)
            if [one["state"] for one in found] == list(states):
                return found
            await trio.sleep(0.01)


def saying(identity: str, way: Headers) -> bytes:
    return request("POST", CHAT, [*way, ("X-Request-ID", identity)], BODY)


async def test_one_that_waits_for_a_slot(sockets, way):
    go = trio.Event()
    async with open_site(sockets, Server(go, STREAM, chunk(EVENTS[0]) + b"0\r\n\r\n")) as site:
        async with site.client() as first, site.client() as second:
            await first.say(saying("first", way))
            await until_state(site, "running")
            await second.say(saying("a/b?c", [*way, ("X-Request-Priority", "low")]))
            found = await until_state(site, "running", "waiting")
            assert [(one["id"], one["model"], one["endpoint"], one["priority"]) for one in found] == [
                ("first", "qwen", CHAT, "normal"), ("a/b?c", "qwen", CHAT, "low"),
            ]  # fmt: skip
            assert (found[0]["queue_time_ms"] >= 0, found[1]["queue_time_ms"]) == (True, None)
            done = await site.ask("POST", "/v1/requests/a%2Fb%3Fc/cancel")
            assert json.loads(done.body) == {"status": "success", "cancelled": 1}
            reply = await second.hear("POST")
            assert reply.code == (503, "request_cancelled")
            assert reply.headers["x-should-retry"] == "false"
            assert site.model.scheduler.waiting == 0
            go.set()
            assert (await first.hear("POST")).status == 200
        assert await listed(site) == []
        assert [event.outcome for event in await site.told(2)] == [Outcome.CANCELLED, Outcome.OK]


async def test_one_that_runs_and_has_no_answer_yet(sockets, way):
    server = Server(trio.Event())
    async with open_site(sockets, server) as site, site.client() as client:
        await client.say(saying("x", way))
        await until_state(site, "running")
        await site.ask("POST", "/v1/requests/x/cancel")
        assert (await client.hear("POST")).code == (503, "request_cancelled")
        await until(lambda: server.cut == 1)
        assert (await site.told(1))[0].outcome is Outcome.CANCELLED
        assert len(server.asked) == 1, "it is not tried again"


async def test_a_stream_ends_with_an_error(sockets, way):
    server = Server(STREAM, chunk(EVENTS[0]), trio.Event())
    async with open_site(sockets, server) as site, site.client() as client:
        await client.say(saying("x", way))
        await until_state(site, "answering")
        await site.ask("POST", "/v1/requests/x/cancel")
        reply = await client.hear("POST")
        assert (reply.status, reply.whole) == (200, True)
        assert reply.body.startswith(EVENTS[0])
        said = json.loads(reply.body.removeprefix(EVENTS[0]).removeprefix(b"data: "))
        assert said["error"]["code"] == "request_cancelled"
        await until(lambda: server.cut == 1)
        assert (await site.told(1))[0].outcome is Outcome.CANCELLED


async def test_an_answer_that_is_no_stream_is_cut(sockets, way):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 300000\r\n\r\n{"
    async with open_site(sockets, Server(head, trio.Event())) as site, site.client() as client:
        await client.say(saying("x", way))
        await until_state(site, "answering")
        await site.ask("POST", "/v1/requests/x/cancel")
        reply = await client.hear("POST")
        assert (reply.status, reply.whole) == (200, False)


async def test_nobody_and_several_of_one_name(sockets, way):
    async with open_site(sockets, Server(trio.Event()), slots=2) as site:
        assert (await site.ask("POST", "/v1/requests/x/cancel")).code == (404, "request_not_found")
        async with site.client() as first, site.client() as second:
            for client in (first, second):
                await client.say(saying("x", way))
            await until_state(site, "running", "running")
            assert json.loads((await site.ask("POST", "/v1/requests/x/cancel")).body)["cancelled"] == 2
            for client in (first, second):
                assert (await client.hear("POST")).code == (503, "request_cancelled")


async def test_a_client_that_left_is_not_listed(sockets, way):
    async with open_site(sockets, Server(trio.Event())) as site:
        async with site.client() as client:
            await client.say(saying("x", way))
            await until_state(site, "running")
        assert await until_state(site) == []


async def test_keys_see_their_own_and_operators_all(sockets, way):
    keys = (
        KeyConfig(name="a", key="ka"), KeyConfig(name="b", key="kb"), KeyConfig(name="boss", key="kc", admin=True),
    )  # fmt: skip

    def key(name: str) -> Headers:
        return [("Authorization", f"Bearer k{name}")]

    site_of_two = open_site(sockets, Server(trio.Event()), slots=2, keys=keys)
    async with site_of_two as site, site.client() as first, site.client() as second:
        await first.say(saying("1", [*way, *key("a")]))
        await second.say(saying("2", [*way, *key("b")]))
        await until_state(site, "running", "running", headers=key("c"))
        assert [one["key"] for one in await listed(site, key("a"))] == ["a"]
        assert [one["key"] for one in await listed(site, key("b"))] == ["b"]
        assert (await site.ask("POST", "/v1/requests/1/cancel", key("a"))).code == (403, "admin_required")
        assert (await site.ask("POST", "/v1/requests/1/cancel", key("c"))).status == 200
        assert (await first.hear("POST")).code == (503, "request_cancelled")


async def test_one_whose_client_takes_nothing_gives_its_slot_back(sockets, way):
    flood = [chunk(b"data: " + b"x" * 60_000 + b"\n\n")] * 60
    async with open_site(sockets, Server(STREAM, *flood, b"0\r\n\r\n")) as site, site.client() as client:
        await client.say(saying("stuck", way))
        await until_state(site, "answering")
        await trio.sleep(0.1)
        assert not site.model.scheduler.idle
        reply = await site.ask("POST", "/v1/requests/stuck/cancel")
        assert json.loads(reply.body) == {"status": "success", "cancelled": 1}
        await site.until_idle()
        # its client has yet to take what it may; there is nothing left to cancel
        assert json.loads((await site.ask("POST", "/v1/requests/stuck/cancel")).body)["cancelled"] == 0
        heard = await client.hear("POST")
        assert heard.body.rstrip().endswith(b"}")
        assert b"cancelled by an operator" in heard.body[-400:]
