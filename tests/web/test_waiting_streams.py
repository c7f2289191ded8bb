"""Streams that wait, on both ways in: their clients are told so, and what goes wrong then is an event."""

import json

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.backend.peer import answer, until
from tests.fleet.fake_servers import FakeServers
from tests.fleet.fleet import running
from tests.fleet.test_scheduler import LOW, ticket
from tests.web.site import CHAT, Client, Site, open_site, request
from tests.web.test_app import EVENTS, STREAM, Server, chunk
from trio_router.errors import ShuttingDown
from trio_router.fleet.scheduler import Scheduler
from trio_router.fleet.ticket import Ticket
from trio_router.telemetry.events import Outcome
from trio_router.web import waiting_streams
from trio_router.web.client_socket import ClientSocket
from trio_router.web.hangup import Hangups
from trio_router.web.waiting_streams import Waiting, WaitingStreams

WANTS_STREAM = b'{"model":"qwen","stream":true}'
WANTS_WHOLE = b'{"model":"qwen","stream":false}'
MESSAGES = "/v1/messages"
SOON = 0.05


@pytest.fixture
def servers() -> FakeServers:
    return FakeServers()


@pytest.fixture(autouse=True)
def _often(monkeypatch) -> None:
    monkeypatch.setattr(waiting_streams, "PERIOD_SECONDS", 0.1)
    monkeypatch.setattr(waiting_streams, "LOOK_SECONDS", 0.01)


async def occupy(site: Site, client: Client) -> None:
    """A request that has the one slot there is."""
    await client.say(request("POST", CHAT, [], WANTS_WHOLE))
    await until(lambda: site.model.scheduler.active == 1)


async def hear_until(client: Client, words: bytes) -> None:
    """Read until the client has those; `hear` begins with all that came."""
    with trio.fail_after(10):
        while words not in client._left:
            client._left += await client.stream.receive_some(65536)


async def test_a_stream_that_waits_is_told_where_it_stands(sockets, way):
    gate = trio.Event()
    server = Server(gate, STREAM, chunk(EVENTS[0]) + chunk(EVENTS[1]) + b"0\r\n\r\n")
    async with (
        open_site(sockets, server, keepalive_after_sec=SOON) as site,
        site.client() as first,
        site.client() as second,
        site.client() as third,
    ):
        await occupy(site, first)
        await second.say(request("POST", CHAT, [*way, ("X-Request-ID", "mine")], WANTS_STREAM))
        await until(lambda: site.model.scheduler.waiting == 1)
        await third.say(request("POST", CHAT, [*way, ("X-Request-Priority", "low")], WANTS_STREAM))
        await hear_until(third, b": queued position=2\n\n")
        await hear_until(second, b": queued position=1\n\n")
        assert b"data" not in second._left
        gate.set()
        replies = [await second.hear("POST"), await third.hear("POST")]
        for reply in replies:
            comments, _, events = reply.body.partition(EVENTS[0])
            assert (reply.status, reply.whole, events) == (200, True, EVENTS[1])
            assert set(comments.decode().split("\n\n")) <= {
                ": queued position=1", ": queued position=2", ": running", ""
            }  # fmt: skip
            assert reply.headers["content-type"] == "text/event-stream"
            assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")
        assert [reply.headers["x-queue-position"] for reply in replies] == ["1", "2"]
        assert replies[0].headers["x-request-id"] == "mine"
        await first.hear("POST")
        assert {event.outcome for event in await site.told(3)} == {Outcome.OK}
        # the connection goes on
        assert (await second.ask("POST", CHAT, way, WANTS_WHOLE)).status == 200


async def test_it_is_told_again_and_again(sockets, way):
    gate = trio.Event()
    async with (
        open_site(sockets, Server(gate, answer(b"{}")), keepalive_after_sec=SOON) as site,
        site.client() as first,
        site.client() as second,
    ):
        await occupy(site, first)
        await second.say(request("POST", CHAT, way, WANTS_STREAM))
        with trio.fail_after(10):
            while second._left.count(b": queued position=1\n\n") < 4:
                second._left += await second.stream.receive_some(65536)


async def test_anthropics_clients_get_a_ping(sockets, way):
    gate = trio.Event()
    async with (
        open_site(sockets, Server(gate, STREAM, chunk(EVENTS[0]) + b"0\r\n\r\n"), keepalive_after_sec=SOON) as site,
        site.client() as first,
        site.client() as second,
    ):
        await occupy(site, first)
        await second.say(request("POST", MESSAGES, way, WANTS_STREAM))
        await hear_until(second, b': queued position=1\n\nevent: ping\ndata: {"type": "ping"}\n\n')
        gate.set()
        assert (await second.hear("POST")).body.endswith(EVENTS[0])


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (CHAT, lambda data: data["error"]["code"]),
        ("/v1/responses", lambda data: data["error"]["code"]),
        (MESSAGES, lambda data: data["error"]["code"]),
    ],
    ids=["chat", "responses", "messages"],
)
async def test_an_error_afterwards_is_an_event(sockets, way, target, found):
    async with (
        open_site(sockets, Server(99.0), keepalive_after_sec=SOON) as site,
        site.client() as first,
        site.client() as second,
    ):
        await occupy(site, first)
        await second.say(request("POST", target, way, WANTS_STREAM))
        await hear_until(second, b"queued")
        site.model.refused(ShuttingDown("the router is shutting down"))
        reply = await second.hear("POST")
        assert (reply.status, reply.whole) == (200, True)
        last = reply.body.decode().rstrip("\n").split("\n\n")[-1].split("\n")
        assert found(json.loads(last[-1].removeprefix("data: "))) == "shutting_down"
        assert last[:-1] == {
            CHAT: [], "/v1/responses": ["event: response.failed"], MESSAGES: ["event: error"]
        }[target]  # fmt: skip
        assert (await site.told())[0].code == "shutting_down"


REFUSAL = b'{"error":{"code":400,"message":"too many tokens","type":"exceed_context_size_error"}}'


@pytest.mark.parametrize(
    ("body", "told"),
    [(REFUSAL, "too many tokens"), (b"no JSON", "no stream"), (b'{"error":[]}', "no stream"), (b"", "no stream")],
)
async def test_a_refusal_of_llama_server_afterwards_is_an_event(sockets, way, body, told):
    gate = trio.Event()
    async with (
        open_site(sockets, Server(gate, answer(body, "400 Bad Request")), keepalive_after_sec=SOON) as site,
        site.client() as first,
        site.client() as second,
    ):
        await occupy(site, first)
        await second.say(request("POST", CHAT, way, WANTS_STREAM))
        await hear_until(second, b"queued")
        gate.set()
        reply = await second.hear("POST")
        assert (reply.status, reply.whole) == (200, True)
        last = reply.body.decode().rstrip("\n").split("\n\n")[-1]
        assert told in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert [event.status for event in await site.told(2)] == [400, 400]


async def test_a_bug_afterwards_is_an_event(sockets, way, monkeypatch):
    gate = trio.Event()
    async with (
        open_site(sockets, Server(gate, answer(b"{}")), keepalive_after_sec=SOON) as site,
        site.client() as first,
        site.client() as second,
    ):
        await occupy(site, first)
        await second.say(request("POST", CHAT, way, WANTS_STREAM))
        await hear_until(second, b"queued")

        async def bug(*_):
            raise RuntimeError("secret detail")

        monkeypatch.setattr("trio_router.backend.backend.Slot.connect", bug)
        gate.set()
        reply = await second.hear("POST")
        assert b'"internal_error"' in reply.body
        assert b"secret" not in reply.body


async def test_until_then_errors_have_their_status(sockets, way):
    async with open_site(sockets, Server(99.0), queue_timeout_sec=0.1) as site, site.client() as first:
        await occupy(site, first)
        assert (await site.ask("POST", CHAT, way, WANTS_STREAM)).code == (504, "queue_timeout")


@pytest.mark.parametrize(
    ("target", "body", "on"),
    [(CHAT, WANTS_WHOLE, True), ("/v1/embeddings", WANTS_STREAM, True), (CHAT, WANTS_STREAM, False)],
    ids=["no stream", "no path for streams", "off for the model"],
)
async def test_others_wait_in_silence(sockets, way, target, body, on):
    async with (
        open_site(sockets, Server(99.0), queue_timeout_sec=0.4, keepalive_after_sec=SOON, keepalive=on) as site,
        site.client() as first,
    ):
        await occupy(site, first)
        assert (await site.ask("POST", target, way, body)).code == (504, "queue_timeout")


@pytest.mark.parametrize("how", ["close", "half"])
async def test_who_leaves_after_being_told_leaves_nothing(sockets, way, how):
    async with open_site(sockets, Server(99.0), keepalive_after_sec=SOON) as site, site.client() as first:
        await occupy(site, first)
        async with site.client() as second:
            await second.say(request("POST", CHAT, way, WANTS_STREAM))
            await hear_until(second, b"queued")
            if how == "half":
                await second.stream.send_eof()
            else:
                await second.stream.aclose()
            await until(lambda: site.model.scheduler.waiting == 0)
        assert (await site.told())[0].outcome is Outcome.CANCELLED
        assert site.connections.plane.waiting_streams.attended == 0


# --- the one who tells them ---------------------------------------------------------------------------


class Told:
    """What clients were told, and when."""

    def __init__(self) -> None:
        self.record: list[str] = []

    def waiting(self, model, mine: Ticket, name: str, *, after: float = 5.0, endpoint: str = CHAT) -> Waiting:
        def say(_: Waiting, events: bytes) -> None:
            self.record.append(f"{trio.current_time():g} {name} {events.decode().strip()}")

        return Waiting(model=model, ticket=mine, endpoint=endpoint, say=say, due=trio.current_time() + after)


async def hold(scheduler: Scheduler, mine: Ticket) -> None:
    """Have a slot for ever."""
    lease = await scheduler.acquire(mine)
    try:
        await trio.sleep_forever()
    finally:
        lease.release()


@pytest.fixture
def _as_it_is(monkeypatch, _often) -> None:
    monkeypatch.setattr(waiting_streams, "PERIOD_SECONDS", 5.0)
    monkeypatch.setattr(waiting_streams, "LOOK_SECONDS", 0.25)


@pytest.mark.usefixtures("_as_it_is")
async def test_when_they_are_told(servers, nursery, autojump_clock: MockClock):
    streams, told = WaitingStreams(), Told()
    await nursery.start(streams.run)
    async with running(servers, {"a": 1}) as fleet:
        servers.plan("a").load_seconds = 19.0
        fleet["a"].supervisor.load_seconds = 20.0
        first, second = ticket(), ticket(LOW)
        waiting = [told.waiting(fleet["a"], first, "first"), told.waiting(fleet["a"], second, "second", after=7.0)]
        for mine, one in zip((first, second), waiting, strict=True):
            fleet.nursery.start_soon(hold, fleet["a"].scheduler, mine)
            await wait_all_tasks_blocked()
            streams.attend(one)
        await trio.sleep(18)
        assert [line.replace("\n", ", ") for line in told.record] == [
            "5 first : loading a 25%, : queued position=1",
            "7 second : loading a 35%, : queued position=2",
            "10 first : loading a 50%, : queued position=1",
            "12 second : loading a 60%, : queued position=2",
            "15 first : loading a 75%, : queued position=1",
            "17 second : loading a 85%, : queued position=2",
        ]
        told.record.clear()
        await trio.sleep(8)  # the first has its slot: it is told until its answer begins
        assert [line.replace("\n", ", ") for line in told.record] == [
            "20 first : running", "22 second : queued position=1", "25 first : running"
        ]  # fmt: skip
        for one in waiting:
            streams.forget(one)
            streams.forget(one)
        told.record.clear()
        await trio.sleep(100)
        assert told.record == []
        fleet.nursery.cancel_scope.cancel()
    nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("_as_it_is")
async def test_who_has_a_slot_in_time_is_not_told_unless_it_loses_that(servers, nursery, autojump_clock: MockClock):
    streams, told = WaitingStreams(), Told()
    await nursery.start(streams.run)
    async with running(servers, {"a": 1}) as fleet:
        one = told.waiting(fleet["a"], ticket(), "one")
        streams.attend(one)
        await trio.sleep(30)
        assert told.record == []
        fleet.nursery.start_soon(hold, fleet["a"].scheduler, one.ticket)
        streams.attend(one)
        await trio.sleep(0.5)
        assert told.record == ["30.25 one : loading a\n: queued position=1"]
        fleet.nursery.cancel_scope.cancel()
    nursery.cancel_scope.cancel()


async def test_nothing_is_piled_up_for_who_reads_nothing(sockets):
    ours, theirs = trio.socket.socketpair()
    async with trio.open_nursery() as nursery:
        hangups = Hangups()
        await nursery.start(hangups.run)
        client = ClientSocket(ours._sock, hangups)
        for _ in range(100_000):
            client.say(b": queued position=1\n\n" * 10)
            if client.unsent:
                break
        left = client.unsent
        assert left
        client.say(b"more")
        assert client.unsent == left
        theirs.close()
        client.unsent = b""
        client.say(b"to nobody")
        assert client.scope.cancel_called
        client.close()
        nursery.cancel_scope.cancel()
