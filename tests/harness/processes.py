"""Looking at processes by way of /proc: who lives, under whom, how much memory it took."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PROC = Path("/proc")


def wait_until(look: Callable[[], T], *, timeout_seconds: float = 5.0, what: str = "") -> T:
    """What `look` returned when it was first true. For things that send no event, such as other processes."""
    end = time.monotonic() + timeout_seconds
    pause = 0.002
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > end:
            raise TimeoutError(f"{what or look} still {seen!r} after {timeout_seconds} s")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


def _state_and_parent(pid: int) -> tuple[str, int] | None:
    with suppress(OSError):
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1])
    return None


def is_alive(pid: int) -> bool:
    """Whether `pid` runs. A zombie, which nobody has reaped yet, does not (a PID 1 may never reap)."""
    found = _state_and_parent(pid)
    return found is not None and found[0] not in "ZX"


def command_line(pid: int) -> list[str]:
    """Its arguments, empty when it is gone."""
    with suppress(OSError):
        return [os.fsdecode(part) for part in (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")[:-1]]
    return []


def marked(mark: str) -> set[int]:
    """Living processes whose environment at their start held `mark`, "NAME=value"; so orphans are found, too."""
    found = set()
    for entry in PROC.iterdir():
        if entry.name.isdigit() and is_alive(int(entry.name)):
            with suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
    return found


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    """`VmRSS` now, `VmHWM` at its highest."""
    for line in (PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def reset_highest_memory(pid: int) -> None:
    """Make `VmHWM` start again from what is used now, proc(5)."""
    (PROC / str(pid) / "clear_refs").write_text("5")


def stop(pid: int) -> None:
    """SIGSTOP; returns when all its threads stand still."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path("/proc", str(pid), "task")
    wait_until(lambda: all(b") T " in (task / "stat").read_bytes() for task in tasks.iterdir()))
