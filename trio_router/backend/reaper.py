"""One small process that ends every llama-server's process group if the router is killed.

The kernel kills a router's children with it (`guard`), but not what they forked. The reaper reads the numbers of
groups from a pipe whose other end only the router holds: when the pipe ends before it was told that they are gone, it
kills them. It is a shell that waits in `read`: 1 ms to start, under 1 MiB, and nothing is added to a spawn but a
write.

*Resource handling.* `close` ends it. It has a session of its own, no environment, and ignores what would stop it.

*Error handling.* If somebody killed it, the next word to it starts another, which is told everything. If none can be
started, that is logged, and the kernel's own guard remains.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import attrs
import structlog

SCRIPT: Final = """
trap '' HUP INT TERM QUIT
groups=' '
while read -r what group; do
  case $what in
    +) groups="$groups$group " ;;
    -) case $groups in *" $group "*) groups="${groups%% $group *} ${groups#* $group }" ;; esac ;;
  esac
done
for group in $groups; do kill -9 "-$group"; done
"""
END_SECONDS: Final = 2.0

log = structlog.get_logger("trio_router.backend")


@attrs.define(eq=False)
class Reaper:
    """The process, and what it knows."""

    _groups: set[int] = attrs.field(factory=set)
    _popen: subprocess.Popen[bytes] | None = None
    _pipe: int = -1

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return None if self._popen is None else self._popen.pid

    def add(self, group: int) -> None:
        """Have `group` killed with the router."""
        self._groups.add(group)
        self._say(f"+ {group}\n")

    def remove(self, group: int) -> None:
        """`group` has been ended. To be said before its leader is reaped: then its number may be another's."""
        self._groups.discard(group)
        self._say(f"- {group}\n")

    def start(self) -> None:
        """Start it, and tell it all."""
        self.close()
        try:
            writing = self._spawn()
        except OSError as error:
            log.error("no reaper", error=str(error))  # noqa: TRY400  (the sentence says all)
            return
        os.set_blocking(writing, False)  # it reads at once; if not, nothing of ours waits for it
        self._pipe = writing
        for group in sorted(self._groups):
            self._write(f"+ {group}\n")

    def _spawn(self) -> int:
        """Start the process; the end of the pipe that is ours."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            self._popen = subprocess.Popen(
                ["/bin/sh", "-c", SCRIPT],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                start_new_session=True,
                cwd="/",
            )
        except OSError:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        return writing

    def _say(self, line: str) -> None:
        if self._pipe < 0 or not self._write(line):
            self.start()

    def _write(self, line: str) -> bool:
        try:
            os.write(self._pipe, line.encode())
        except BrokenPipeError:
            return False
        except BlockingIOError:  # it stands still, and would kill who lives if it went on when it is closed
            if self._popen is not None:
                self._popen.kill()
            return False
        return True

    def close(self) -> None:
        """End it; it kills the groups it was not told the end of."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if self._popen is not None:
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(END_SECONDS)
            self._popen = None


@contextmanager
def reaping() -> Iterator[Reaper]:
    """A reaper that runs."""
    reaper = Reaper()
    reaper.start()
    try:
        yield reaper
    finally:
        reaper.close()
