from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.backend.peer import answer, listening, read_request
from trio_router.backend.address import Address
from trio_router.backend.backend import Backend
from trio_router.backend.client import BackendClient
from trio_router.backend.connection import BackendLost
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
