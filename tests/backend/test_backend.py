import json
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.backend.peer import answer, listening, read_request, until
from trio_router.backend.address import Address
from trio_router.backend.backend import Backend
from trio_router.backend.client import BackendClient
from trio_router.backend.connection import BackendLost, Connection
from trio_router.backend.logtail import LogTail

REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"


def backend_at(address: Address, slots: int = 2) -> Backend:
    backend = Backend(
        alias="qwen",
        incarnation=1,
        address=address,
        pid=1,
        tail=LogTail(),
        client=BackendClient(None),
        model_file=Path("/m.gguf"),
    )
    backend.open_slots(slots)
    return backend


async def polite(stream: trio.SocketStream) -> None:
    while await read_request(stream):
        await stream.send_all(answer())


async def use(slot) -> object:
    connection = await slot.connect()
    await connection.send(REQUEST, b"")
    await connection.receive_head()
    while await connection.receive():
        pass
    connection.finish()
    return connection


async def test_a_slot_keeps_its_connection(sockets):
    async with listening(sockets / "a.sock", polite) as address:
        one, other = backend_at(address).slots
        first = await use(one)
        assert await use(one) is first
        assert await use(other) is not first
        one.disconnect()
        assert await use(one) is not first
        one.backend.lose("the end")


async def test_a_connection_that_was_cut_off_is_replaced(sockets):
    async with listening(sockets / "a.sock", polite) as address:
        (slot,) = backend_at(address, 1).slots
        first = await slot.connect()
        await first.send(REQUEST, b"")
        second = await slot.connect()  # nobody finished the first exchange
        assert second is not first
        assert first.closed
        slot.disconnect()
        slot.disconnect()
        assert slot.connection is None


async def test_a_connection_that_is_cut_off_while_it_is_made_is_none(sockets, monkeypatch):
    async with listening(sockets / "a.sock", polite) as address:
        (slot,) = backend_at(address, 1).slots
        connect = Connection.open

        async def late(address: Address) -> Connection:
            connection = await connect(address)
            slot.disconnect()
            return connection

        monkeypatch.setattr(Connection, "open", late)
        with pytest.raises(BackendLost, match="while it was made"):
            await slot.connect()
        assert slot.connection is None
        monkeypatch.undo()
        await use(slot)
        slot.disconnect()


async def test_a_backend_that_cannot_be_reached_leaves_no_connection(sockets):
    (slot,) = backend_at(Address(path=str(sockets / "none.sock")), 1).slots
    with pytest.raises(BackendLost):
        await slot.connect()
    assert slot.connection is None


async def test_losing_it_ends_every_exchange_and_is_said_once(sockets):
    async def mute(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with listening(sockets / "a.sock", mute) as address:
        backend = backend_at(address, 5)
        lost = 0

        async def ask(slot) -> None:
            nonlocal lost
            with pytest.raises(BackendLost):
                await use(slot)
            lost += 1

        async with trio.open_nursery() as nursery:
            for slot in backend.slots:
                nursery.start_soon(ask, slot)
            await wait_all_tasks_blocked()
            backend.lose("it was unloaded", wanted=True)
            backend.lose("it died")
        assert lost == 5
        assert (backend.lost, backend.unloaded) == ("it was unloaded", True)
        assert backend.gone.is_set()
        assert all(slot.connection is None for slot in backend.slots)


# --- is it still worth its memory -------------------------------------------------------------------

COMPUTE = b'{"error":{"code":500,"message":"Compute error.","type":"server_error"}}'


async def test_three_compute_errors_in_a_row_condemn_it():
    backend = backend_at(Address(port=1))
    for end in (COMPUTE, COMPUTE, b'{"ok":true}', COMPUTE, b"data: " + COMPUTE + b"\n\n"):
        assert backend.answered(end) is (COMPUTE not in end)
    with trio.move_on_after(0) as scope:
        await backend.until_condemned()
    assert scope.cancelled_caught
    assert not backend.answered(COMPUTE)
    assert await backend.until_condemned() == "llama-server answered 'Compute error.' 3 times in a row"
    backend.condemn("something else")
    assert "Compute error." in await backend.until_condemned(), "the first reason stands"


async def test_a_model_that_says_so_does_not():
    """Quotes within a text are escaped, so no text looks like the error object."""
    backend = backend_at(Address(port=1))
    for _ in range(10):
        assert backend.answered(json.dumps({"content": COMPUTE.decode()}).encode())
        assert backend.answered(b'{"content":"Compute error."}')


async def test_it_is_heard_when_an_answer_goes_on(sockets, autojump_clock: MockClock):
    said: list[bytes] = []

    async def script(stream: trio.SocketStream) -> None:
        await read_request(stream)
        while True:
            await trio.sleep(1)
            if said:
                await stream.send_all(said.pop(0))

    async with listening(sockets / "a.sock", script) as address, trio.open_nursery() as nursery:
        backend = backend_at(address)
        slot = backend.slots[0]
        assert backend.heard(), "nobody waits"
        nursery.start_soon(use, slot)
        await trio.sleep(5)
        assert not backend.heard()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        for piece, is_sign in (
            (head, False),
            (b"3\r\n:\n\n\r\n", False),
            (b'19\r\ndata: {"content":"hello"}\r\n', True),
            (b"3\r\n:\n\n\r\n", False),
        ):
            said.append(piece)
            await trio.sleep(5)
            assert backend.heard() is is_sign, piece
            assert not backend.heard(), "once"
        nursery.cancel_scope.cancel()
        slot.disconnect()


class Stubborn:
    """Sees that its client left, and goes on until it is told to let go."""

    def __init__(self, last: bytes) -> None:
        self.last = last
        self.left, self.over = trio.Event(), trio.Event()

    async def __call__(self, stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.receive_some(1)
        self.left.set()
        await self.over.wait()
        if self.last:
            await stream.send_all(self.last)


async def begun(slot) -> None:
    connection = await slot.connect()
    await connection.send(REQUEST, b"")


@pytest.mark.parametrize("last", [b"", answer(), b"x" * 300_000], ids=["nothing", "an answer", "much"])
async def test_a_forsaken_slot_is_let_go_of_when_the_server_closes(sockets, last):
    server, record = Stubborn(last), []
    async with listening(sockets / "a.sock", server) as address, trio.open_nursery() as nursery:
        backend = backend_at(address, 1)
        backend.genuine = True
        (slot,) = backend.slots
        nursery.start_soon(backend.attend_forsaken)
        await wait_all_tasks_blocked()
        await begun(slot)
        assert backend.forsake(slot, lambda: record.append("let go"))
        with trio.fail_after(5):
            await server.left.wait()
            await wait_all_tasks_blocked()
            assert record == []
            assert not backend.heard(), "it is waited for, by who looks for a stall"
            server.over.set()
            await until(lambda: record)
        assert record == ["let go"]
        assert slot.connection is None
        nursery.cancel_scope.cancel()


async def test_what_is_not_waited_for(sockets):
    """Who looks is not there, or it is no llama-server, or it is lost, or nothing runs: the slot can be used at once."""
    record: list[str] = []

    def let_go() -> None:
        record.append("let go")

    async with listening(sockets / "a.sock", Stubborn(b"")) as address, trio.open_nursery() as nursery:
        backend = backend_at(address)
        slot, other = backend.slots
        await begun(slot)
        backend.genuine = True
        assert not backend.forsake(slot, let_go)
        assert slot.connection is None
        nursery.start_soon(backend.attend_forsaken)
        await wait_all_tasks_blocked()
        assert not backend.forsake(other, let_go), "nothing was sent there"
        await begun(slot)
        backend.genuine = False
        assert not backend.forsake(slot, let_go)
        await begun(slot)
        backend.genuine = True
        backend.lose("the end")
        assert not backend.forsake(slot, let_go)
        nursery.cancel_scope.cancel()
    assert record == []


async def test_at_its_end_nobody_is_told(sockets):
    """The slots are gone with their backend."""
    record: list[str] = []
    async with listening(sockets / "a.sock", Stubborn(b"")) as address, trio.open_nursery() as nursery:
        backend = backend_at(address, 1)
        backend.genuine = True
        nursery.start_soon(backend.attend_forsaken)
        await wait_all_tasks_blocked()
        await begun(backend.slots[0])
        assert backend.forsake(backend.slots[0], lambda: record.append("let go"))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert record == []
