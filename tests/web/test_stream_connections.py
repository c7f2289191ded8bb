"""Streams on connections: what a client that does not read, or leaves, does to the router."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.web.site import Client, Site, open_site, request

STATUS = "/v1/models/status/stream"


@asynccontextmanager
async def narrow_client(site: Site) -> AsyncIterator[Client]:
    """A connection on which little is under way."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    site.nursery.start_soon(site.connections.serve, ours)
    async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as stream:
        yield Client(stream)


def numbers(data: bytes) -> list[int]:
    """What the ids count, of whole events."""
    return [int(line.rpartition(b"-")[2]) for line in data.split(b"\n") if line.startswith(b"id: ")]


async def until(data: bytearray, client: Client, wanted: bytes) -> None:
    while wanted not in data:
        data += await client.stream.receive_some(65536)


async def test_who_does_not_read_is_dropped_and_resumes(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with open_site(tmp_path) as site, narrow_client(site) as client:
            await client.say(request("GET", STATUS))
            seen = bytearray()
            await until(seen, client, b"full_status")
            for _ in range(1500):  # it reads nothing of these
                site.registry.enter("ready")
                await trio.lowlevel.checkpoint()
            client._left = bytes(seen)
            reply = await client.hear()
            assert reply.whole  # the stream ended as it should: its client connects again
            got = numbers(reply.body)
            assert 0 < len(got) < 500
            boot = reply.body.rpartition(b"id: ")[2].partition(b"-")[0].decode()
            async with site.client() as again:
                await again.say(request("GET", STATUS, [("Last-Event-ID", f"{boot}-{got[-1]}")]))
                rest = bytearray()
                await until(rest, again, b"-1500\n")
            assert [*got, *numbers(bytes(rest))] == list(range(got[0], 1501))
            assert b"full_status" not in rest


async def test_a_client_that_leaves_is_no_reader(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with open_site(tmp_path) as site:
            for path in (STATUS, "/metrics/stream", "/v1/models/qwen/logs?follow=1"):
                for _ in range(10):
                    async with site.client() as client:
                        await client.say(request("GET", path))
                        if "logs" not in path:
                            await client.stream.receive_some(10)
            while site.connections.open:  # noqa: ASYNC110  (they end by themselves, and tell nobody)
                await trio.sleep(0.001)
            site.registry.enter("draining")
            reply = await site.ask("GET", STATUS)
            assert reply.whole
            assert reply.headers["connection"] == "close"


async def test_a_follower_that_waits_has_its_head_at_once(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with open_site(tmp_path) as site, site.client() as client:
            await client.say(request("GET", "/v1/models/qwen/logs?follow=1"))
            data = bytearray()
            await until(data, client, b"\r\n\r\n")
            assert data.startswith(b"HTTP/1.1 200")
            site.model.supervisor.journal.append("a line")
            await until(data, client, b"a line\n")
            site.registry.enter("draining")
            await until(data, client, b"\r\n0\r\n\r\n")  # the end of the answer; the connection may serve another
