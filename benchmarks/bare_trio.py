"""The least that a router made with trio can do: what was read from one socket is written to another, and back.

It parses, checks, counts and queues nothing, and opens a connection to the backend for each client's. What it adds to a
request is what two waits of trio and the system calls cost; no router in trio can add less.

    python -m benchmarks.bare_trio PORT BACKEND_PORT
"""

import socket
import sys
from contextlib import suppress

import trio

READ_BYTES = 65536


def _ready(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


async def _serve(client: socket.socket, backend_port: int) -> None:
    def connect() -> socket.socket:
        return _ready(socket.create_connection(("127.0.0.1", backend_port)))

    backend = connect()
    with _ready(client), suppress(ConnectionError):  # load generators end with a reset
        while True:
            await trio.lowlevel.wait_readable(client)
            asked = client.recv(READ_BYTES)
            if not asked:
                break
            answered = b""
            while not answered:
                try:
                    backend.send(asked)
                    await trio.lowlevel.wait_readable(backend)
                    answered = backend.recv(READ_BYTES)
                except ConnectionError:
                    pass
                if not answered:  # llama-server ends a connection after some requests
                    backend.close()
                    backend = connect()
            client.send(answered)
    backend.close()


async def serve(port: int, backend_port: int) -> None:
    """Until it is killed."""
    listening = socket.create_server(("127.0.0.1", port), backlog=512)
    listening.setblocking(False)
    async with trio.open_nursery() as nursery:
        while True:
            await trio.lowlevel.wait_readable(listening)
            nursery.start_soon(_serve, listening.accept()[0], backend_port)


if __name__ == "__main__":
    trio.run(serve, *map(int, sys.argv[1:]))
