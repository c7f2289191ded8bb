"""Tells systemd how we are, sd_notify(3): ready, stopping, a sentence for `systemctl status`, and that we still run.

One datagram a message, to the socket that the variable NOTIFY_SOCKET names. Without it nothing is ever sent.
"""

import os
import socket
from collections.abc import Callable, MutableMapping
from typing import Final, Self

import attrs
import structlog
import trio

from trio_router.telemetry.events import Event, ServerChanged
from trio_router.telemetry.facts import FleetFacts

log = structlog.get_logger("trio_router.notify")

STATUS_SECONDS: Final = 5.0
"""How often the sentence is looked at; it is sent when it is another."""


def sentence(facts: FleetFacts) -> str:
    """What `systemctl status` shows of us."""
    loaded = sum(model.state == "ready" for model in facts.models)
    failed = sum(model.state == "failed" for model in facts.models)
    running = sum(model.slots_busy for model in facts.models)
    waiting = sum(model.waiting for model in facts.models)
    parts = [f"{loaded} of {len(facts.models)} models loaded", f"{running} requests running", f"{waiting} waiting"]
    if failed:
        parts.insert(1, f"{failed} failed")
    return f"{facts.phase}: {', '.join(parts)}"


@attrs.define(eq=False, kw_only=True)
class Notifier:
    """A sink for what the server becomes, and the task that tells systemd.

    *Resource handling.* A socket lives as long as the sending of one message, which never waits.

    *Error handling.* What systemd has no room for is sent with the next message. What cannot be sent at all is said
    once in the log; the router serves on. A loop that stands still for longer than `watchdog_seconds` sends nothing,
    and systemd restarts us: that is what the watchdog is for.

    *Cancellation.* At once; what was told before has been sent.
    """

    address: str | None = None
    """As sendto wants it: a path, or a NUL and an abstract name."""
    watchdog_seconds: float | None = None
    """systemd's patience; None: it does not watch."""
    _unsent: list[str] = attrs.field(factory=list, init=False)
    _status: str = attrs.field(default="", init=False)
    _failed: bool = attrs.field(default=False, init=False)

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> Self:
        """What `environ` says. The variables are taken out of it: they are for us, not for our children."""
        name = environ.pop("NOTIFY_SOCKET", "")
        microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        watched = pid in {"", str(os.getpid())} and microseconds.isdecimal() and int(microseconds) > 0
        return cls(
            address="\0" + name[1:] if name.startswith("@") else name or None,
            watchdog_seconds=int(microseconds) / 1e6 if watched else None,
        )

    def __call__(self, event: Event) -> None:
        """Ready and draining are news."""
        match event:
            case ServerChanged(status="ready"):
                self._tell("READY=1")
            case ServerChanged(status="draining"):
                self._tell("STOPPING=1")
            case _:
                pass

    async def run(
        self, facts: Callable[[], FleetFacts], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Send WATCHDOG=1 at half of what systemd waits for, and a sentence about `facts` when it is another."""
        task_status.started()
        if self.address is None:
            await trio.sleep_forever()
        watched = self.watchdog_seconds
        pause = STATUS_SECONDS if watched is None else min(STATUS_SECONDS, watched / 2)
        while True:
            if (status := sentence(facts())) != self._status:
                self._status = status
                self._tell(f"STATUS={status}")
            if watched is not None:
                self._tell("WATCHDOG=1")
            await trio.sleep(pause)

    def _tell(self, line: str) -> None:
        if self.address is None:
            return
        self._unsent = [*(unsent for unsent in self._unsent if not _replaces(line, unsent)), line]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto("\n".join(self._unsent).encode(), socket.MSG_DONTWAIT, self.address)
        except BlockingIOError:
            return
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("systemd cannot be told", socket=self.address, error=str(error))
        self._unsent = []


def _replaces(new: str, old: str) -> bool:
    """Whether `old`, not sent yet, need not be sent once `new` is."""
    return new.partition("=")[0] == old.partition("=")[0]
