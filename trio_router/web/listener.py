"""Our sockets, and what happens on each connection.

Hypercorn reads and writes HTTP, but not with `hypercorn.trio.serve`: there one connection's failure ends the
server (hypercorn#225: an upgrade request with early data does it), and a client that stops reading can be neither
cancelled nor shut down (its sends are shielded). Here each connection has a boundary of its own, a bound on every
send, and a socket that can be closed under it.

*Resource handling.* `serve_connections` owns the sockets it listens on and every connection.

*Error handling.* What goes wrong on one connection is logged and ends that connection.

*Cancellation.* Closes everything at once, also what is shielded.
"""

import contextlib
import logging
from collections.abc import Sequence

import attrs
import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState

log = structlog.get_logger("trio_router.web")

WRITE_STALL_SECONDS = 60.0
"""How long a client may take not one byte of what is sent to it."""
HEAD_SECONDS = 30.0
"""How long a connection may be idle, or take to send a head: the guard against slow headers."""
BACKLOG = 1024


def hypercorn_config() -> Config:
    """How Hypercorn is to treat a connection."""
    config = Config()
    config.keep_alive_timeout = HEAD_SECONDS
    config.keep_alive_max_requests = 1_000_000
    config.include_server_header = False
    config.h11_max_incomplete_size = 64 * 1024
    config.graceful_timeout = 0
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


@attrs.define(eq=False)
class ClientStream(trio.abc.HalfCloseableStream):
    """A client's socket, whose sends are bounded from within: that works under Hypercorn's shield too."""

    stream: trio.SocketStream

    @property
    def socket(self) -> trio.socket.SocketType:
        """What Hypercorn asks for its addresses."""
        return self.stream.socket

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with trio.move_on_after(WRITE_STALL_SECONDS) as stall:
            await self.stream.send_all(data)
        if stall.cancelled_caught:
            self.abort()
            raise trio.BrokenResourceError("the client reads nothing")

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self.stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()

    def abort(self) -> None:
        """Close at once; whoever is sending or receiving is woken with ClosedResourceError."""
        self.stream.socket.close()


@attrs.define(eq=False)
class Connections:
    """Every connection there is."""

    app: AppWrapper
    config: Config = attrs.field(factory=hypercorn_config)
    context: WorkerContext = attrs.field(factory=lambda: WorkerContext(None))
    open: set[ClientStream] = attrs.field(factory=set)

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection, from its first byte to its last."""
        client = ClientStream(stream)
        self.open.add(client)
        try:
            # it asks of its stream what ClientStream has
            await TCPServer(self.app, self.config, self.context, ConnectionState({}), client)  # type: ignore[arg-type]
        except* trio.Cancelled:
            raise
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            log.debug("connection broke")
        except* Exception as group:  # pgjones/hypercorn#225: whatever it is, it is this connection's
            log.warning("connection failed", exc_info=group)
        finally:
            self.open.discard(client)
            client.abort()

    def abort_all(self) -> None:
        """Close every connection under whoever uses it."""
        for client in list(self.open):
            client.abort()


async def open_listeners(host: str, port: int) -> list[trio.SocketListener]:
    """Sockets on every address `host` stands for. Raises OSError."""
    return await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)


def bound_port(listeners: Sequence[trio.SocketListener]) -> int:
    """The port that was given to us."""
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def serve_connections(
    connections: Connections,
    listeners: list[trio.SocketListener],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept until cancelled."""
    async with contextlib.AsyncExitStack() as stack:
        for listener in listeners:
            stack.push_async_callback(listener.aclose)
        try:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    await nursery.start(_accept, nursery, connections, listener)
                task_status.started()
        finally:
            connections.abort_all()


async def _accept(
    nursery: trio.Nursery,
    connections: Connections,
    listener: trio.SocketListener,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    task_status.started()
    # out of descriptors, trio waits 0.1 s and goes on accepting (trio/_highlevel_serve_listeners.py)
    await trio.serve_listeners(connections.serve, [listener], handler_nursery=nursery)
