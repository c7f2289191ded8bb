"""HTTP/2, which Hypercorn speaks and `web.protocols` bounds: what is odd on one stream is that stream's alone."""

import contextlib
from collections import defaultdict

import attrs
import h2.config
import h2.connection
import h2.events
import h2.settings
import h11
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.backend.peer import until
from tests.web.site import BODY, CHAT, Client, open_site, request
from tests.web.test_app import EVENTS, STREAM, Server, chunk
from trio_router.telemetry.events import Outcome
from trio_router.web.protocols import H1_PIECE_BYTES, H2_PIECE_BYTES

Fields = list[tuple[bytes, bytes]]
LAST = b"0\r\n\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CHUNKED = [("Transfer-Encoding", "chunked")]
PING = b"\0\0\x08\x06\0\0\0\0\0" + b"12345678"


@attrs.define
class Speaker:
    """A client that speaks HTTP/2."""

    client: Client
    window: int = 65535
    """Of each stream."""
    opens_more: bool = True
    """Whether it makes room again for what it has taken."""
    speech: h2.connection.H2Connection = attrs.field(init=False)
    status: dict[int, bytes] = attrs.field(factory=dict)
    body: defaultdict[int, bytes] = attrs.field(factory=lambda: defaultdict(bytes))
    ended: dict[int, str] = attrs.field(factory=dict)

    async def begin(self) -> "Speaker":
        config = h2.config.H2Configuration(
            client_side=True, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.speech = h2.connection.H2Connection(config)
        codes = h2.settings.SettingCodes
        self.speech.local_settings = h2.settings.Settings(
            client=True, initial_values={codes.INITIAL_WINDOW_SIZE: self.window, codes.ENABLE_PUSH: 0}
        )
        self.speech.initiate_connection()
        await self.flush()
        return self

    async def flush(self) -> None:
        if data := self.speech.data_to_send():
            await self.client.say(data)

    async def ask(self, method: bytes, path: bytes, more: Fields = [], body: bytes = b"") -> int:  # noqa: B006
        stream = self.speech.get_next_available_stream_id()
        fields = [(b":method", method), (b":authority", b"localhost")]
        if path:
            fields += [(b":scheme", b"http"), (b":path", path)]
        self.speech.send_headers(stream, [*fields, *more], end_stream=not body)
        if body:
            self.speech.send_data(stream, body, end_stream=True)
        await self.flush()
        return stream

    async def hear(self, stream: int) -> tuple[int, bytes]:
        """Its status and body, once it has ended."""
        while stream not in self.ended:
            data = await self.client.stream.receive_some(65536)
            assert data, "the connection ended"
            for event in self.speech.receive_data(data):
                match event:
                    case h2.events.ResponseReceived():
                        self.status[event.stream_id] = dict(event.headers)[b":status"]
                    case h2.events.DataReceived():
                        self.body[event.stream_id] += event.data
                        if self.opens_more:
                            self.speech.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    case h2.events.StreamEnded():
                        self.ended[event.stream_id] = "whole"
                    case h2.events.StreamReset():
                        self.ended.setdefault(event.stream_id, "reset")
            await self.flush()
        return int(self.status.get(stream, b"0")), self.body[stream]


async def test_streams_side_by_side(sockets):
    async with open_site(sockets, Server(), slots=2) as site, site.client() as client:
        speaker = await Speaker(client).begin()
        asked = [await speaker.ask(b"POST", CHAT.encode(), body=BODY) for _ in range(5)]
        for stream in asked:
            assert await speaker.hear(stream) == (200, b'{"ok":true}')


@pytest.mark.parametrize(
    ("method", "path", "more"),
    [
        (b"CONNECT", b"/", [(b":protocol", b"websocket")]),
        (b"CONNECT", b"", []),
        (b"G\xc3\xa9T", b"/livez", []),
        (b"GET x", b"/livez", []),
        (b"GET", b"/\xff", []),
        (b"POST", b"/tokenize?\xff", []),
        (b"POST", b"/tokenize?a b", []),
        (b"GET", b"/livez", [(b"x-odd", b"a\x01b")]),
    ],
)
async def test_a_request_that_cannot_be_passed_on_ends_nothing_but_itself(sockets, method, path, more):
    go_on = trio.Event()
    server = Server(STREAM, chunk(EVENTS[0]), go_on, chunk(EVENTS[1]), LAST)
    async with open_site(sockets, server) as site, site.client() as client:
        speaker = await Speaker(client).begin()
        streaming = await speaker.ask(b"POST", CHAT.encode(), body=BODY)
        for body in (b"", b"x" * 10_000):
            status, words = await speaker.hear(await speaker.ask(method, path, more, body))
            assert status == 400
            assert b'"code": "bad_request"' in words
        go_on.set()
        assert await speaker.hear(streaming) == (200, EVENTS[0] + EVENTS[1])
        assert len(server.asked) == 1


async def test_what_comes_behind_an_answer_ends_nothing(sockets):
    """A body that is too large: it is answered before it is there."""
    async with open_site(sockets, Server(), api={"max_body_mb": 1}) as site, site.client() as client:
        speaker = await Speaker(client).begin()
        fields = [
            (b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"localhost"), (b":path", CHAT.encode()),
            (b"content-length", b"9000000"),
        ]  # fmt: skip
        stream = speaker.speech.get_next_available_stream_id()
        speaker.speech.send_headers(stream, fields)
        await speaker.flush()
        status, words = await speaker.hear(stream)
        assert (status, b"request_too_large" in words or b"too_large" in words) == (413, True)
        speaker.speech.send_data(stream, b"x" * 1000)
        await speaker.flush()
        assert await speaker.hear(await speaker.ask(b"POST", CHAT.encode(), body=BODY)) == (200, b'{"ok":true}')


async def test_a_stream_without_a_window_is_given_up(sockets, autojump_clock: MockClock):
    """The others of its connection go on."""
    server = Server()
    async with open_site(sockets, server) as site, site.client() as client:
        speaker = await Speaker(client, window=0).begin()
        stream = await speaker.ask(b"POST", CHAT.encode(), body=BODY)
        began = trio.current_time()
        await until(lambda: len(server.asked) == 1)
        await site.until_idle()  # its slot is free before: llama-server has nothing more to do
        assert trio.current_time() - began < 1
        await speaker.hear(stream)
        assert speaker.ended[stream] == "reset"
        assert 59 < trio.current_time() - began < 62
        assert (await site.told())[0].outcome is Outcome.OK
        other = await speaker.ask(b"POST", CHAT.encode(), body=BODY)
        speaker.speech.increment_flow_control_window(1000, other)
        await speaker.flush()
        assert await speaker.hear(other) == (200, b'{"ok":true}')


async def test_a_stream_that_floods_a_client_without_a_window(sockets, autojump_clock: MockClock):
    flood = [chunk(b"data: " + b"x" * 60_000 + b"\n\n")] * 20
    server = Server(STREAM, *flood, LAST)
    async with open_site(sockets, server) as site, site.client() as client:
        speaker = await Speaker(client, window=10, opens_more=False).begin()
        stream = await speaker.ask(b"POST", CHAT.encode(), body=BODY)
        await speaker.hear(stream)
        assert speaker.ended[stream] == "reset"
        assert (await site.told())[0].outcome is Outcome.CANCELLED
        await site.until_idle()


async def test_priorities_of_streams_cost_nothing(sockets):
    """RFC 9113 has given them up; a tree of some hundred was a second's work for each thousand frames."""
    async with open_site(sockets, Server()) as site, site.client() as client:
        speaker = await Speaker(client).begin()
        frames = [
            b"\0\0\x05\x02\0" + (2 * (number % 1500) + 1).to_bytes(4, "big") + b"\0\0\0\0" + bytes([number % 250])
            for number in range(1, 20_000)
        ]
        await client.say(b"".join(frames))
        with trio.fail_after(5):
            asked = await speaker.ask(b"POST", CHAT.encode(), body=BODY)
            assert await speaker.hear(asked) == (200, b'{"ok":true}')


async def test_more_streams_than_may_be_are_refused_alone(sockets):
    go_on = trio.Event()
    server = Server(STREAM, chunk(EVENTS[0]), go_on, chunk(EVENTS[1]), LAST)
    async with open_site(sockets, server) as site, site.client() as client:
        speaker = await Speaker(client).begin()
        speaker.speech.remote_settings = h2.settings.Settings(client=False)  # as if it had not heard how many may be
        first = await speaker.ask(b"POST", CHAT.encode(), body=BODY)
        others = [await speaker.ask(b"POST", CHAT.encode(), body=BODY) for _ in range(120)]
        for stream in others[-21:]:
            await speaker.hear(stream)
            assert speaker.ended[stream] == "reset"
        go_on.set()
        assert await speaker.hear(first) == (200, EVENTS[0] + EVENTS[1])
        for stream in others[:-21]:
            assert (await speaker.hear(stream))[0] == 200


@pytest.mark.parametrize("before", [False, True])
async def test_who_says_goodbye_gets_what_it_asked_for(sockets, before):
    go_on = trio.Event()
    server = Server(STREAM, chunk(EVENTS[0]), go_on, chunk(EVENTS[1]), LAST)
    async with open_site(sockets, server) as site, site.client() as client:
        speaker = await Speaker(client).begin()
        if before:
            left = await speaker.ask(b"POST", CHAT.encode(), body=BODY)
            await trio.testing.wait_all_tasks_blocked()
            speaker.speech.reset_stream(left)
            await speaker.flush()
            await site.until_idle()
        stream = await speaker.ask(b"POST", CHAT.encode(), body=BODY)
        await trio.testing.wait_all_tasks_blocked()
        await client.say(b"\0\0\x08\x07\0\0\0\0\0" + b"\0" * 8)
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        assert await speaker.hear(stream) == (200, EVENTS[0] + EVENTS[1])
        with trio.fail_after(5):
            await client.ended()


async def test_a_slow_client_that_goes_on_is_waited_for(sockets, autojump_clock: MockClock):
    async with open_site(sockets, Server()) as site, site.client() as client:
        speaker = await Speaker(client, window=0, opens_more=False).begin()
        stream = await speaker.ask(b"POST", CHAT.encode(), body=BODY)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _open() -> None:
                for _ in range(len(b'{"ok":true}')):
                    await trio.sleep(40)
                    speaker.speech.increment_flow_control_window(1, stream)
                    await speaker.flush()

            assert await speaker.hear(stream) == (200, b'{"ok":true}')


@pytest.mark.parametrize(
    "said",
    [
        PREFACE[:10], PREFACE[:16], PREFACE, PREFACE + b"\0\0\0\x04\0\0\0\0\0",
        PREFACE + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x01\x01\0\0\0\0\x01\x82",  # HEADERS, and no end of them
    ],
)  # fmt: skip
async def test_who_never_asks_has_an_end(sockets, said, autojump_clock: MockClock):
    async with open_site(sockets, Server()) as site, site.client() as client:
        began = trio.current_time()
        await client.say(said)
        await client.ended()
        assert 29 < trio.current_time() - began < 33


async def test_who_only_pings_has_an_end(sockets, autojump_clock: MockClock):
    async with open_site(sockets, Server()) as site, site.client() as client:
        speaker = await Speaker(client).begin()
        assert (await speaker.hear(await speaker.ask(b"GET", b"/livez")))[0] == 200
        began = trio.current_time()
        with contextlib.suppress(trio.BrokenResourceError):
            while trio.current_time() - began < 100:
                await client.say(PING)
                await trio.sleep(1)
        assert 29 < trio.current_time() - began < 35


async def test_all_at_once(sockets):
    """The words that begin HTTP/2, and more behind them than is taken in at once."""
    async with open_site(sockets, Server()) as site, site.client() as client:
        speaker = Speaker(client)
        body = BODY[:-1] + b" " * 14_000 + b"}"
        speech = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        speech.initiate_connection()
        for stream in (1, 3):
            head = [
                (b":method", b"POST"),
                (b":authority", b"localhost"),
                (b":scheme", b"http"),
                (b":path", CHAT.encode()),
            ]
            speech.send_headers(stream, head)
            speech.send_data(stream, body, end_stream=True)
        speaker.speech = speech
        await speaker.flush()
        for stream in (1, 3):
            assert await speaker.hear(stream) == (200, b'{"ok":true}')


async def test_heads_that_unpack_to_too_much(sockets):
    """A few bytes that refer to one entry again and again: the connection ends."""
    async with open_site(sockets, Server()) as site, site.client() as client:
        speaker = await Speaker(client).begin()
        await speaker.ask(b"GET", b"/livez", [(b"x-long", b"y" * 3000)])
        with contextlib.suppress(trio.BrokenResourceError):
            await speaker.ask(b"GET", b"/livez", [(b"x-long", b"y" * 3000)] * 15)
        with trio.fail_after(5):
            await client.ended()
        assert (await site.ask("GET", "/livez")).status == 200


async def test_who_does_not_end_its_request_is_told_to(sockets):
    async with open_site(sockets, Server()) as site, site.client() as client:
        speaker = await Speaker(client).begin()
        for _ in range(3):
            stream = speaker.speech.get_next_available_stream_id()
            head = [(b":method", b"GET"), (b":authority", b"localhost"), (b":scheme", b"http"), (b":path", b"/livez")]
            speaker.speech.send_headers(stream, head)
            await speaker.flush()
            assert (await speaker.hear(stream))[0] == 200
            with trio.fail_after(5):
                while not speaker.speech.streams[stream].closed:
                    speaker.speech.receive_data(await client.stream.receive_some(65536))


async def test_others_get_their_turn_while_much_is_taken_in(sockets, monkeypatch):
    """Of HTTP/2, and of HTTP/1 that Hypercorn reads: no more at once than is said, and a checkpoint in between."""
    taken: list[tuple[int, int]] = []
    turns = 0

    def noting(receive):
        def note(self, data):
            taken.append((len(data), turns))
            return receive(self, data)

        return note

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with open_site(sockets, Server()) as site, trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        for kind, size, said in (
            (h2.connection.H2Connection, H2_PIECE_BYTES, PREFACE + b"\0\0\0\x04\0\0\0\0\0" + PING * 3000),
            (h11.Connection, H1_PIECE_BYTES, request("POST", "/livez", CHUNKED) + b"1\r\na\r\n" * 8000 + b"0\r\n\r\n"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(kind, "receive_data", noting(kind.receive_data))
                async with site.client() as client:
                    await client.say(said)
                    most = len(said) - len(PREFACE) - 200  # the first words are another parser's
                    await until(lambda: sum(count for count, _ in taken) >= most, 10)  # noqa: B023  (it waits here)
            assert max(count for count, _ in taken) <= size
            assert len({turn for _, turn in taken}) > len(taken) // 2
            taken.clear()
        nursery.cancel_scope.cancel()
