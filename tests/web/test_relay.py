import json
from types import SimpleNamespace
from typing import Any

import h11
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.backend.peer import answer, listening, read_request, say
from trio_router.backend.address import Address
from trio_router.backend.answer import AnswerHead, head_of
from trio_router.backend.backend import Slot
from trio_router.backend.connection import BackendLost
from trio_router.backend.health import expire_silent
from trio_router.errors import BackendTimeout, BackendUnavailable
from trio_router.fleet.scheduler import Lease
from trio_router.web.assembly import NotWhole
from trio_router.web.error_events import error_event
from trio_router.web.outgoing import NOT_FORWARDED, Opened, Outgoing, is_event_stream, request_head, request_start
from trio_router.web.relay import MAX_HALF_BYTES, TAIL_BYTES, Answer

# --- request_head -----------------------------------------------------------------------------------


def forwarded(headers: list[tuple[bytes, bytes]], *, target: str = "/v1/x?a=b", key: str | None = None) -> Any:
    """What a parser that knows nothing of us reads in the head. Both ways in give names in lower case."""
    headers = [(name.lower(), value) for name, value in headers]
    head = request_head(request_start(target, headers), 5, request_id="req_1", key=key)
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(head + b"12345")
    event = parser.next_event()
    assert isinstance(event, h11.Request)
    assert isinstance(parser.next_event(), h11.Data)
    assert isinstance(parser.next_event(), h11.EndOfMessage)
    assert parser.next_event() is h11.NEED_DATA  # nothing was smuggled in behind it
    assert event.target == target.encode()
    assert event.method == b"POST"
    return list(event.headers)


FIRST = [(b"host", b"llama-server"), (b"content-type", b"application/json")]
ALWAYS = [*FIRST, (b"x-request-id", b"req_1"), (b"content-length", b"5")]


def test_what_goes_to_the_backend():
    found = forwarded([(b"Content-Type", b"text/plain"), (b"X-Own", b"1"), (b"x-own", b"2"), (b"Accept", b"*/*")])
    assert found == [*FIRST, (b"x-own", b"1"), (b"x-own", b"2"), (b"accept", b"*/*"), *ALWAYS[2:]]


@pytest.mark.parametrize("name", sorted({*NOT_FORWARDED, b"x-request-id"}))
def test_what_does_not(name):
    assert forwarded([(name, b"999")]) == ALWAYS
    assert forwarded([(b"x-kept", b"1"), (name, b"999"), (name, b"")])[2:-2] == [(b"x-kept", b"1")]


@pytest.mark.parametrize(
    "connection", [[b"X-A, close, x-b"], [b"x-a", b"x-b"], [b" \tX-A\t,,x-B , "], [b"keep-alive,x-a,X-B,upgrade"]]
)
def test_what_connection_names_does_not_either(connection):
    headers = [(b"Connection", value) for value in connection] + [(b"X-A", b"1"), (b"x-b", b"2"), (b"X-C", b"3")]
    assert forwarded(headers) == [*FIRST, (b"x-c", b"3"), *ALWAYS[2:]]


def test_connection_cannot_take_our_own_away():
    names = b"host, content-length, x-request-id, authorization"
    found = forwarded([(b"connection", names)], key="k")
    assert found == [*ALWAYS[:3], (b"authorization", b"Bearer k"), ALWAYS[3]]


def test_the_clients_key_is_replaced_by_ours():
    secrets = [(b"Authorization", b"Bearer client"), (b"X-Api-Key", b"client"), (b"Cookie", b"session")]
    assert forwarded(secrets) == ALWAYS
    assert forwarded(secrets, key="ours") == [*ALWAYS[:3], (b"authorization", b"Bearer ours"), ALWAYS[3]]


names = st.text("abcxyzABC-_0123456789!#$%&'*+.^`|~", min_size=1, max_size=12).map(str.encode)
field_values = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters="\x7f\x85\xa0"), max_size=20
)


@given(st.lists(st.tuples(names, field_values.map(lambda text: text.encode("latin-1"))), max_size=10))
def test_whatever_a_client_sends_it_is_one_request(headers):
    found = forwarded(headers)
    assert [name for name, _ in found].count(b"content-length") == 1
    assert not {b"transfer-encoding", b"connection", b"expect", b"upgrade"} & {name for name, _ in found}


def test_a_target_that_is_not_ascii_is_an_error_and_not_a_request():
    with pytest.raises(UnicodeEncodeError):
        request_start("/ü", [])


# --- error_event ------------------------------------------------------------------------------------

ERROR = BackendUnavailable("the llama-server of model 'ü' was lost", param="model")


def event_of(raw: bytes) -> tuple[str, dict[str, Any]]:
    """Name and data of the only event in `raw`."""
    text = raw.decode()
    assert text.endswith("\n\n")
    lines = text.strip("\n").split("\n")
    assert lines[-1].startswith("data: ")
    name = lines[0].removeprefix("event: ") if lines[0].startswith("event: ") else ""
    assert len(lines) == (2 if name else 1)
    return name, json.loads(lines[-1][6:])


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/completion", "/v1/completions", "/infill"])
def test_openais_words(endpoint):
    name, data = event_of(error_event(endpoint, ERROR, cut=False))
    assert name == ""
    assert data == ERROR.body()
    assert data["error"]["code"] == "backend_unavailable"


@pytest.mark.parametrize("endpoint", ["/v1/responses", "/responses"])
def test_the_words_of_responses(endpoint):
    name, data = event_of(error_event(endpoint, ERROR, cut=False))
    assert name == data["type"] == "response.failed"
    assert data["response"]["status"] == "failed"
    assert data["sequence_number"] == 0
    assert data["response"]["error"]["message"] == ERROR.message
    assert data["error"]["type"] == "service_unavailable_error"


def test_the_words_of_messages():
    name, data = event_of(error_event("/v1/messages", ERROR, cut=False))
    assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")
    assert data["error"]["message"] == ERROR.message


@pytest.mark.parametrize("message", ["two\nlines", "carriage\rreturn", "\u2028 and \u2029", "data: [DONE]\n\n", "\x00"])
def test_a_message_cannot_end_its_event(message):
    _, data = event_of(error_event("/x", BackendUnavailable(message), cut=False))
    assert data["error"]["message"] == message
    assert b"\r" not in error_event("/x", BackendUnavailable(message), cut=False)


def test_an_event_that_was_cut_is_ended_first():
    assert error_event("/x", ERROR, cut=True) == b"\n\n" + error_event("/x", ERROR, cut=False)


# --- Answer -----------------------------------------------------------------------------------------


class Scripted:
    """A connection whose body is a script; exceptions are raised, numbers are pauses."""

    def __init__(self, *script: bytes | float | Exception) -> None:
        self.script = list(script)
        self.finished = 0

    @property
    def complete(self) -> bool:
        return not self.script

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while self.script:
            step = self.script.pop(0)
            if isinstance(step, Exception):
                raise step
            if isinstance(step, bytes):
                return step
            await trio.sleep(step)
        return b""

    def finish(self) -> None:
        self.finished += 1


class Scheduler:
    releases = 0

    def _released(self, lease: Lease) -> None:
        self.releases += 1


def answer_of(
    *script: bytes | float | Exception,
    first: bytes = b"",
    stream: bool = True,
    headers: list[tuple[bytes, bytes]] | None = None,
    endpoint: str = "/v1/chat/completions",
) -> tuple[Answer, Scripted, Scheduler]:
    connection, scheduler = Scripted(*script), Scheduler()
    backend: Any = SimpleNamespace(alias="qwen", lost=None, look_for_its_end=lambda: None)
    slot: Any = SimpleNamespace(backend=backend)
    kind = b"text/event-stream; charset=utf-8" if stream else b"application/json"
    head = head_of(200, [(b"content-type", kind), *(headers or [])])
    opened: Any = Opened(connection, head, first)  # type: ignore[arg-type]
    made = Answer(
        endpoint=endpoint,
        lease=Lease(slot, scheduler),  # type: ignore[arg-type]
        opened=opened,
        queue_seconds=1.2346,
    )
    return made, connection, scheduler


async def all_of(made: Answer) -> list[bytes]:
    pieces = []
    while piece := await made.receive():
        pieces.append(piece)
    return pieces


async def test_bytes_come_out_as_they_came():
    made, connection, scheduler = answer_of(b"two", b"three", first=b"one", stream=False)
    assert not made.handed_out
    assert await all_of(made) == [b"one", b"two", b"three"]
    assert made.handed_out
    assert await made.receive() == b""
    assert made.tail == b"onetwothree"
    made.close()
    made.close()
    assert (connection.finished, scheduler.releases) == (1, 1)


async def test_an_answer_without_a_body():
    made, _, _ = answer_of()
    assert not made.handed_out
    assert await all_of(made) == []
    assert made.handed_out


async def test_the_tail_is_bounded():
    made, _, _ = answer_of(b"a" * 3000, b"b" * 3000, b"c" * 10_000, b"d")
    await all_of(made)
    assert made.tail == b"c" * (TAIL_BYTES - 1) + b"d"


async def test_a_stream_whose_backend_dies_ends_with_an_event():
    made, _, _ = answer_of(BackendLost("gone"), first=b'data: {"a":1}\n\n')
    pieces = await all_of(made)
    assert pieces[0] == b'data: {"a":1}\n\n'
    assert event_of(pieces[1])[1]["error"]["code"] == "backend_unavailable"
    assert b"[DONE]" not in b"".join(pieces)
    assert not pieces[1].startswith(b"\n")
    assert isinstance(made.error, BackendUnavailable)
    assert "lost in the middle of an answer: gone" in made.error.message
    assert not made.handed_out


async def test_a_stream_that_is_cut_within_an_event():
    """No client has to make sense of half an event; of a very long one it has had a part."""
    whole = b'data: {"a":1}\n\n'
    made, _, _ = answer_of(b'data: {"b"', BackendLost("gone"), first=whole + b'data: {"b":')
    pieces = await all_of(made)
    assert pieces[0] == whole
    assert event_of(pieces[1])[1]["error"]["code"] == "backend_unavailable"
    assert pieces[2:] == []
    made, _, _ = answer_of(b"x" * MAX_HALF_BYTES, BackendLost("gone"), first=b"data: ")
    pieces = await all_of(made)
    assert pieces[0] == b"data: " + b"x" * MAX_HALF_BYTES
    assert pieces[1].startswith(b"\n\ndata: ")


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
async def test_a_stream_comes_event_by_event_whatever_the_pieces(size, line_end):
    whole = (
        b"".join(b"event: a" + line_end + b"data: %d" % number + 2 * line_end for number in range(20)) + b"data: no end"
    )
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    made, _, _ = answer_of(*pieces[1:], first=pieces[0])
    found = await all_of(made)
    assert b"".join(found) == whole
    assert all(piece.endswith(line_end + line_end) for piece in found[:-1])
    assert found[-1] == b"data: no end"
    assert made.handed_out


async def test_why_it_died_is_said_if_known():
    made, _, _ = answer_of(BackendLost("closed"), first=b"x")
    made.lease.slot.backend.lost = "it was unloaded"
    await all_of(made)
    assert made.error is not None
    assert made.error.message.endswith(": it was unloaded")


async def test_any_other_answer_is_cut_and_not_completed():
    made, _, scheduler = answer_of(BackendLost("gone"), first=b'{"half":', stream=False)
    assert await made.receive() == b'{"half":'
    with pytest.raises(BackendUnavailable):
        await made.receive()
    assert await made.receive() == b""
    assert not made.handed_out
    made.close()
    assert scheduler.releases == 1


async def test_a_backend_that_falls_silent_in_the_middle():
    made, _, _ = answer_of(b"x\n\n", BackendLost("llama-server was silent for 30 s", silent=True))
    pieces = await all_of(made)
    assert event_of(pieces[1])[1]["error"]["code"] == "backend_timeout"
    assert isinstance(made.error, BackendTimeout)
    made, _, _ = answer_of(b"x", BackendLost("llama-server was silent for 30 s", silent=True), stream=False)
    with pytest.raises(BackendTimeout, match="silent for 30 s"):
        await all_of(made)


def test_headers_of_a_plain_answer():
    made, _, _ = answer_of(
        stream=False,
        headers=[
            (b"server", b"llama.cpp"), (b"date", b"x"), (b"access-control-allow-origin", b"*"), (b"x-own", b"1"),
            (b"cache-control", b"private"), (b"content-length", b"7"),
        ],
    )  # fmt: skip
    assert made.headers() == [
        (b"content-type", b"application/json"), (b"x-own", b"1"), (b"cache-control", b"private"), (b"content-length", b"7"),
        (b"x-queue-time-ms", b"1235"),
        (b"x-queue-position", b"0"),
    ]  # fmt: skip


def test_headers_of_a_stream():
    made, _, _ = answer_of(headers=[(b"cache-control", b"public"), (b"x-accel-buffering", b"yes")])
    assert made.headers()[1:] == [
        (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"), (b"x-queue-time-ms", b"1235"),
        (b"x-queue-position", b"0"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "is_stream"),
    [
        ([(b"content-type", b"text/event-stream")], True),
        ([(b"content-type", b"TEXT/Event-Stream; x=y")], True),
        ([(b"content-type", b"application/json")], False),
        ([], False),
    ],
)
def test_what_a_stream_is(headers, is_stream):
    assert is_event_stream(AnswerHead(status=200, headers=headers)) is is_stream


# --- Outgoing ---------------------------------------------------------------------------------------


def outgoing() -> Outgoing:
    return Outgoing(request_start("/x", []), b"{}", "r")


async def attempt(sockets, script) -> Opened:
    async with listening(sockets / "a.sock", script) as address, trio.open_nursery() as nursery:
        backend: Any = SimpleNamespace(alias="qwen", address=address, patience_seconds=30)
        slot = Slot(backend, 0)
        backend.slots = (slot,)
        nursery.start_soon(expire_silent, backend)
        try:
            return await outgoing().attempt(slot)
        finally:
            slot.disconnect()
            nursery.cancel_scope.cancel()


def saying(*pieces: bytes | float):
    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        for piece in pieces:
            if isinstance(piece, bytes):
                await say(stream, piece)
            else:
                await trio.sleep(piece)
        await trio.sleep_forever()

    return script


async def test_a_short_answer_is_read_whole_before_it_is_begun(sockets, autojump_clock: MockClock):
    whole = answer(b'{"a": 1}')
    opened = await attempt(sockets, saying(whole[:-4], 5.0, whole[-4:-2], 5.0, whole[-2:]))
    assert opened.first == b'{"a": 1}'
    assert opened.connection.complete


async def test_a_stream_begins_with_its_first_bytes_not_with_its_head(sockets, autojump_clock: MockClock):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    began = trio.current_time()
    opened = await attempt(sockets, saying(head, 20.0, b"3\r\none\r\n", b"3\r\ntwo\r\n"))
    assert opened.first == b"one"
    assert trio.current_time() - began == pytest.approx(20, abs=0.1)


@pytest.mark.parametrize(
    "pieces", [(), (b"HTTP/1.1 200 OK\r\nX: y\r\n",), (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx",)]
)
async def test_a_silent_backend(sockets, autojump_clock: MockClock, pieces):
    began = trio.current_time()
    with pytest.RaisesGroup(BackendTimeout, flatten_subgroups=True):
        await attempt(sockets, saying(*pieces))
    assert 30 <= trio.current_time() - began <= 35


async def test_a_backend_that_cannot_be_reached(sockets):
    condemned: list[str] = []
    backend: Any = SimpleNamespace(address=Address(path=str(sockets / "none")), condemn=condemned.append)
    with pytest.raises(BackendLost):
        await outgoing().attempt(Slot(backend, 0))
    assert condemned == ["its socket was removed"]


async def test_who_ended_its_connection_may_have_its_slot(sockets):
    """In the tick in which its stream turns out to be no whole: it does not ask again, nor has it the slot any more."""

    async def answers(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(answer(b"{}"))
        await trio.sleep_forever()

    async with listening(sockets / "a.sock", answers) as address:
        backend: Any = SimpleNamespace(alias="qwen", address=address, patience_seconds=30, pins=False)
        slot = Slot(backend, 0)

        def check(_: Any) -> None:
            slot.disconnect()
            raise NotWhole("no whole", ever=False)

        stoppable: Any = SimpleNamespace(body=b"{}", check=check)
        stoppable.on = lambda _: stoppable
        out = outgoing()
        out.stoppable = stoppable
        with pytest.raises(BackendLost, match="was ended"):
            await out.attempt(slot)
        assert out.slot is None
