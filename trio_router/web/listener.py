"""Our sockets, and what happens on each connection.

A connection begins in the data plane, which answers plain inference requests itself. At the first request that is
anything else it becomes Hypercorn's, with every byte that was read; Quart answers then, inference too.

Hypercorn reads and writes HTTP, but not with `hypercorn.trio.serve`: there one connection's failure ends the
server (hypercorn#225: an upgrade request with early data does it), and a client that stops reading can be neither
cancelled nor shut down (its sends are shielded). Here each connection has a boundary of its own, a bound on every
send, and a socket that can be closed under it.

*Resource handling.* `serve_connections` owns the sockets it listens on and every connection.

*Error handling.* What goes wrong on one connection is logged and ends that connection. Out of file descriptors, no
connection is accepted for `ACCEPT_PAUSE_SECONDS`, and then it is tried again.

*Cancellation.* Closes everything at once, also what is shielded.
"""

import errno
import logging
import math
import resource
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, cast

import attrs
import h11
import structlog
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, ConnectionState, Scope

from trio_router.web import dataplane
from trio_router.web.body import INVITE
from trio_router.web.client_socket import ClientLeft, ClientSocket
from trio_router.web.client_stream import ClientStream
from trio_router.web.dataplane import DataPlane
from trio_router.web.hangup import Hangups
from trio_router.web.in_flight import InFlight
from trio_router.web.protocols import MAX_HEADERS_BYTES, Http1, Protocols

log = structlog.get_logger("trio_router.web")

BACKLOG: Final = 1024
ACCEPT_PAUSE_SECONDS: Final = 0.1
KEEPALIVE_SECONDS: Final = 60
"""After so long without a byte a client's machine is asked whether it is still there."""
CONTINUE: Final = b"HTTP/1.1 100 "
KEPT_FILES: Final = 1024
"""For llama-servers, their pipes and slots, and for reading files; of few files half."""
OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def hypercorn_config() -> Config:
    """How Hypercorn is to treat a connection."""
    config = Config()
    config.keep_alive_timeout = math.inf  # `Connections.watch` has the time
    config.keep_alive_max_requests = 1_000_000
    config.include_server_header = False
    config.h11_max_incomplete_size = 64 * 1024
    config.h2_max_header_list_size = MAX_HEADERS_BYTES
    config.graceful_timeout = 0
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    return config


@attrs.define(eq=False)
class ConnectionApp:
    """The app, as one connection calls it: its requests are counted among those in flight."""

    app: AppWrapper
    in_flight: InFlight
    stream: ClientStream
    answered: trio.Event | None = None
    """Set at the end of the HTTP/1 answer that is under way; None when none is."""
    answering: trio.lowlevel.Task | None = None
    """Whose answer that is."""
    invitation: Callable[[], Awaitable[None]] | None = None
    """Sends the `100 Continue` that Hypercorn has for a client that waits for it; None when there is none."""
    reads_body: bool = False
    """Whether the body is wanted already: a request that is refused by its head need not send it."""

    async def invite(self) -> None:
        """Have the client send its body, if it waits for a word."""
        send, self.invitation = self.invitation, None
        self.reads_body = send is None
        if send is not None:
            await send()

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable, *more: Any) -> None:
        async def noting(message: ASGISendEvent) -> None:
            if self.answered is None and scope.get("http_version") in {"1.0", "1.1"}:
                self.answered, self.answering = trio.Event(), trio.lowlevel.current_task()
            if message["type"] == "http.response.start":  # not at its end: the next request may be there by then
                self.invitation, self.reads_body = None, False
            await send(message)

        if scope["type"] == "http":
            scope["extensions"][INVITE] = self.invite  # type: ignore[assignment]
        self.stream.requests, self.stream.idle_since = self.stream.requests + 1, None
        try:
            with self.in_flight:
                await self.app(scope, receive, noting, *more)
        finally:
            self.stream.requests -= 1
            if self.answered is not None:
                self.answered.set()
                self.answered = self.answering = None


class ConnectionServer(TCPServer):
    """Hypercorn's, with protocols of our own (`web.protocols`) and without its timers.

    It invites no body that nobody reads: Hypercorn sends `100 Continue` as soon as it has read the head. And it lets an
    answer out before it closes for what was wrong with the rest of a request: Hypercorn's reader closes at once, often
    before the answer's first byte was sent by another task.
    """

    async def _idle_timeout(self) -> None:
        """`Connections.watch` has the time."""

    async def _read_data(self) -> None:
        self.protocol = Protocols.of(self.protocol)
        await self.protocol.initiate()
        await super()._read_data()

    async def protocol_send(self, event: Event) -> None:
        app = cast("ConnectionApp", self.app)
        if isinstance(event, Updated):
            return
        if isinstance(event, RawData) and event.data.startswith(CONTINUE) and not app.reads_body:
            app.invitation = partial(super().protocol_send, event)
            return
        if isinstance(event, Closed) and app.answered is not None and app.answering is not trio.lowlevel.current_task():
            await app.answered.wait()
        if isinstance(event, Closed) and self._has_more_to_read() and not app.stream.lingering:
            await app.stream.linger()
        await super().protocol_send(event)

    def _has_more_to_read(self) -> bool:
        """Whether its client is in the middle of a body, or of something that is no HTTP."""
        protocol = self.protocol.protocol
        return isinstance(protocol, Http1) and protocol.connection.their_state in {h11.SEND_BODY, h11.ERROR}


@attrs.define(eq=False, kw_only=True)
class Connections:
    """Every connection there is."""

    app: AppWrapper
    plane: DataPlane
    hangups: Hangups = attrs.field(factory=Hangups)
    config: Config = attrs.field(factory=hypercorn_config)
    context: WorkerContext = attrs.field(factory=lambda: WorkerContext(None))
    open: set[ClientSocket | ClientStream] = attrs.field(factory=set)
    most: int = attrs.field(factory=lambda: most_connections(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    """How many there may be at once; more wait to be accepted."""

    async def serve(self, sock: socket.socket) -> None:
        """One connection, from its first byte to its last. `sock` is non-blocking."""
        try:
            client = ClientSocket(sock, self.hangups)
        except (OSError, ValueError) as error:  # ValueError: nobody watches any more, we are at the end
            log.debug("connection not taken", error=str(error))
            sock.close()
            return
        self.open.add(client)
        try:
            rest = await self.plane.serve(client)
            if rest is not None:
                await self._give_to_hypercorn(client, rest)
        except ClientLeft as error:
            log.debug("client left", reason=str(error))
        except Exception:
            log.exception("connection failed")
        finally:
            self.open.discard(client)
            client.close()

    async def _give_to_hypercorn(self, client: ClientSocket, rest: bytes) -> None:
        sock = trio.socket.from_stdlib_socket(client.give_away())
        self.open.discard(client)
        try:
            stream = ClientStream(trio.SocketStream(sock), self.hangups, rest)
        except BaseException:
            sock.close()
            raise
        self.open.add(stream)
        try:
            # it asks of its stream what ClientStream has
            app = ConnectionApp(self.app, self.plane.in_flight, stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.abort_when_gone, nursery.cancel_scope)
                await ConnectionServer(app, self.config, self.context, ConnectionState({}), stream)  # type: ignore[arg-type]
                nursery.cancel_scope.cancel()
        except* trio.Cancelled:
            raise
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            log.debug("connection broke")
        except* h11.ProtocolError as group:  # pgjones/hypercorn#225: it is this connection's fault, and its alone
            log.info("connection broke the protocol", errors=_kinds(group))
        except* Exception as group:  # noqa: BLE001  (nothing that a client does may end more than its connection)
            log.warning("connection failed", errors=_kinds(group))
        finally:
            self.open.discard(stream)
            stream.abort()

    async def watch(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See who hangs up, and who takes too long to ask, until cancelled.

        One look at every connection now and then, in the place of a timer for each head: that costs a request as much
        as reading it. Slowness is noticed late by at most a tenth of what is allowed.
        """
        async with trio.open_nursery() as nursery:
            await nursery.start(self.hangups.run)
            task_status.started()
            while True:
                await trio.sleep(min(1.0, dataplane.HEAD_SECONDS / 20))
                now = trio.current_time()
                for client in list(self.open):
                    client.expire_idle(now, dataplane.HEAD_SECONDS)

    def close_all(self) -> None:
        """Close every connection under whoever uses it."""
        for client in list(self.open):
            client.close()


def _kinds(group: ExceptionGroup[Exception]) -> list[str]:
    """Not their words: those of a parser may hold heads and bodies, and keys in them."""
    return [type(error).__name__ for error in group.exceptions]


async def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address `host` stands for, all on one port. Raises OSError."""
    found = await trio.socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            chosen = bound_port(sockets) if port == 0 and len(sockets) > 1 else port
            sock.bind((address[0], chosen, *address[2:]))
            sock.listen(BACKLOG)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def bound_port(sockets: Sequence[socket.socket]) -> int:
    """The port that was given to us."""
    port: int = sockets[0].getsockname()[1]
    return port


async def serve_connections(
    connections: Connections,
    sockets: Sequence[socket.socket],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept on `sockets`, which are ours from now on, until cancelled."""
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(connections.watch)
            for sock in sockets:
                nursery.start_soon(_accept, nursery, connections, sock)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # before the nursery waits for its tasks: some of Hypercorn's are shielded until their socket is closed
                for sock in sockets:
                    trio.lowlevel.notify_closing(sock)
                    sock.close()
                connections.close_all()
    finally:
        for sock in sockets:
            sock.close()


def most_connections(files: int) -> int:
    """Of so many files that may be open, how many may be clients': to run a model takes some, and each slot one."""
    return max(files // 2, files - KEPT_FILES)


async def _accept(nursery: trio.Nursery, connections: Connections, listening: socket.socket) -> None:
    short = False
    while True:
        try:
            if len(connections.open) >= connections.most:
                raise OSError(errno.EMFILE, "as many connections as there may be files, less those that models need")  # noqa: TRY301  (the same shortage)
            sock, _ = listening.accept()
        except BlockingIOError:
            short = False
            await trio.lowlevel.wait_readable(listening)
        except OSError as error:
            if listening.fileno() < 0:
                return
            if error.errno in OUT_OF_RESOURCES:
                if not short:
                    log.error("cannot accept", error=error.strerror, open=len(connections.open))  # noqa: TRY400
                short = True
                await trio.sleep(ACCEPT_PAUSE_SECONDS)
            # anything else is the fate of one connection that ended before we took it, accept(2)
        else:
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # of who reads only, nothing else tells
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
            nursery.start_soon(connections.serve, sock)
            await trio.lowlevel.checkpoint()
