"""One child process in a group of its own, tied to the life of this one.

The child is spawned from the trio thread, not with `trio.lowlevel.open_process`: Linux's parent-death signal
fires when the *thread* that forked ends, and trio spawns from a worker thread that retires after 10 s idle
(trio `_subprocess.py`, `_thread_cache.py`). `subprocess.Popen` costs the loop about 0.2 ms.

The child is reached through its process group, so that what it forked goes with it, and it is reaped only after
the group was signalled: until then the kernel cannot give the group's number to anyone else.
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import attrs
import structlog
import trio

from trio_router.backend.logtail import LogTail
from trio_router.backend.reaper import Reaper

GUARD = (
    "import ctypes,os,sys,_signal as s\n"
    "ctypes.CDLL(None).prctl(1,9)\n"  # PR_SET_PDEATHSIG, SIGKILL: prctl(2)
    "s.signal(s.SIGPIPE,s.SIG_DFL);s.signal(s.SIGXFSZ,s.SIG_DFL)\n"  # Python ignores these, and exec keeps that
    "os.getppid()==int(sys.argv[1]) or os._exit(125)\n"  # the parent died before prctl
    "try: os.execv(sys.argv[2],sys.argv[2:])\n"
    "except OSError as e: print(f'cannot execute {sys.argv[2]}: {e.strerror}',file=sys.stderr);os._exit(126)\n"
)
"""Asks the kernel to kill this process with its parent, then becomes the program."""

TERM_GRACE_SECONDS = 2.0
KILL_GRACE_SECONDS = 10.0
EXITING = 0x4
"""Among the flags of a task in /proc (PF_EXITING, the kernel's include/linux/sched.h)."""
LAST_LOG_SECONDS = 1.0
"""How long a log pipe is still read once the leader is gone: something it forked may hold it open."""

log = structlog.get_logger("trio_router.backend")


def is_exiting(pid: int) -> bool:
    """Whether a process that was not reaped yet has begun to end, or has ended.

    A killed one closes its connections, then gives back what devices hold of its memory, and only then can its exit be
    waited for: 0.1 s later with 8 GB on a GPU, 3 s with 24 GB of the host's memory pinned besides (measured on an H200).
    """
    try:
        stat = Path("/proc", str(pid), "stat").read_bytes()
    except OSError:
        return False
    state, *fields = stat.rpartition(b")")[2].split()
    return state in {b"Z", b"X"} or bool(int(fields[5]) & EXITING)


@attrs.define(eq=False)
class ServerProcess:
    """A running child. `tail` fills while `read_log` runs."""

    popen: subprocess.Popen[bytes]
    _pidfd: int
    _output: int
    _reaper: Reaper | None = None
    tail: LogTail = attrs.field(factory=LogTail)
    hear: Callable[[str], None] | None = None
    """Told of each line, for as long as somebody wants to know."""
    _log_scope: trio.CancelScope = attrs.field(factory=lambda: trio.CancelScope(shield=True))
    _code: int | None = None

    @classmethod
    def spawn(
        cls, command: Sequence[str], environment: Mapping[str, str], reaper: Reaper | None = None
    ) -> "ServerProcess":
        """Start `command` (an absolute path and its arguments). Raises OSError when no process can be made.

        `reaper` ends its group if this process is killed.
        """
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writing, True)  # the child's end is an ordinary pipe
        try:
            popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", GUARD, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                env=dict(environment),
                start_new_session=True,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        try:
            pidfd = os.pidfd_open(popen.pid)
        except OSError:  # no file descriptor left: nobody would notice its end
            os.close(reading)
            os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
            raise
        if reaper is not None:
            reaper.add(popen.pid)
        return cls(popen, pidfd, reading, reaper)

    @property
    def pid(self) -> int:
        """The leader's process id, which is also the group's."""
        return self.popen.pid

    @property
    def code(self) -> int | None:
        """The exit status once reaped, negative for a signal."""
        return self._code

    async def read_log_until_stopped(self, name: str) -> None:
        """Fill `tail` until the pipe ends; every line also goes to our log, at debug.

        Shielded, because a child that is told to stop still writes, and a full pipe would block it: bounded by
        `stop_within`, after which what holds the pipe open gets `LAST_LOG_SECONDS`.
        """
        with self._log_scope:
            async with trio.lowlevel.FdStream(self._output) as stream:
                self._output = -1
                async for data in stream:
                    for line in self.tail.feed(bytes(data)):
                        log.debug("llama-server", model=name, line=line)
                        if self.hear is not None:
                            self.hear(line)
        self.tail.close()

    def has_exited(self) -> bool:
        """Whether the leader has exited, reaped or not."""
        if self._code is not None:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    async def wait(self) -> None:
        """Return when the leader has exited; it is not reaped yet."""
        await trio.lowlevel.wait_readable(self._pidfd)

    def signal(self, number: signal.Signals) -> None:
        """Send `number` to the whole group, unless the leader has been reaped already."""
        if self._code is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    async def stop_within(self, term_seconds: float = TERM_GRACE_SECONDS) -> int | None:
        """End the group and reap the leader: SIGTERM, after `term_seconds` SIGKILL. Shielded, bounded in time.

        Returns the exit status, or None for a process that not even SIGKILL ended within
        `KILL_GRACE_SECONDS` (one stuck in a driver): it is reported and left.
        """
        with trio.CancelScope(shield=True):
            if self._code is None:
                await self._end(term_seconds)
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
            self._log_scope.deadline = trio.current_time() + LAST_LOG_SECONDS
        return self._code

    async def _end(self, term_seconds: float) -> None:
        if term_seconds > 0:
            self.signal(signal.SIGTERM)
            with trio.move_on_after(term_seconds):
                await self.wait()
        self.signal(signal.SIGKILL)  # whatever is left of the group, also when the leader is gone
        with trio.move_on_after(KILL_GRACE_SECONDS) as bound:
            await self.wait()
        if bound.cancelled_caught:
            log.error("process survives SIGKILL", pid=self.pid)
        else:
            if self._reaper is not None:
                self._reaper.remove(self.pid)
            self._code = self.popen.wait()  # it has exited: returns at once
