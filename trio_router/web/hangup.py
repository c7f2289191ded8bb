"""Who has hung up, told at once, for every client at the price of one task.

A connection whose request is being worked on is not read from, so a client that leaves would go unnoticed; and
reading would not help with one that sent another request before it left (RFC 9112 pipelining): its data stands
before the end of the stream. The kernel knows: EPOLLRDHUP is reported whatever is unread, epoll_ctl(2). A client
that only closed its sending half counts as gone too, as it does for Hypercorn: until something is written to it, TCP
tells no difference. llama-server answers one.
"""

import select
import socket
from collections.abc import Callable

import attrs
import trio

AT_ONCE = 64
"""How many are told before others get their turn: a crowd that leaves takes 0.1 ms each to unwind."""
HUNG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


@attrs.define(eq=False)
class Hangups:
    """One epoll that watches sockets for nothing but their end."""

    _epoll: select.epoll = attrs.field(factory=lambda: select.epoll(flags=select.EPOLL_CLOEXEC))
    _told: dict[int, Callable[[], None]] = attrs.field(factory=dict)

    def watch(self, sock: socket.socket | trio.socket.SocketType, told: Callable[[], None]) -> None:
        """Call `told` once when `sock`'s peer hangs up; at once from `run` if it has already. Until `forget`."""
        descriptor = sock.fileno()
        self._told[descriptor] = told
        self._epoll.register(descriptor, HUNG_UP | select.EPOLLET)

    def forget(self, sock: socket.socket | trio.socket.SocketType) -> None:
        """Watch no more; before `sock` is closed or given away. Any number of times."""
        descriptor = sock.fileno()
        if self._told.pop(descriptor, None) is not None and not self._epoll.closed:  # at the end it may be
            self._epoll.unregister(descriptor)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell, until cancelled."""
        with self._epoll:
            task_status.started()
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for descriptor, _ in self._epoll.poll(0, AT_ONCE):
                    told = self._told.get(descriptor)
                    if told is not None:
                        told()
