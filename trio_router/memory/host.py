"""How much of the host's memory is available to us: Linux's own number, and the bounds of our control groups."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs

FRESH_SECONDS: Final = 1.0
KIB: Final = 1024
_UNBOUNDED: Final = 1 << 60
"""Control groups of version 1 say a number like this for no limit."""


@attrs.define(eq=False)
class HostMemory:
    """What is available, looked at once a second at most: many decisions may ask."""

    read: Callable[[], int | None] = lambda: available_bytes()  # noqa: PLW0108  (it stands below)
    _known: int | None = None
    _read_at: float = -math.inf

    def available(self, now: float) -> int | None:
        """Bytes, at most `FRESH_SECONDS` old."""
        if now >= self._read_at + FRESH_SECONDS:
            self._known, self._read_at = self.read(), now
        return self._known


def has_unseen_gpu(root: Path = Path("/")) -> bool:
    """Whether there is a GPU here that NVML may know nothing of: an AMD, Intel or Apple one has a render node."""
    return (root / "dev/kfd").exists() or any((root / "dev/dri").glob("renderD*"))


def available_bytes(root: Path = Path("/")) -> int | None:
    """What could be taken without swapping; None where the system does not say (not Linux).

    The least of `MemAvailable` and what each control group above us has left; file pages that it could drop count as
    left, as `MemAvailable` counts them. Reads a few small files of the kernel's: microseconds.
    """
    available = _mem_available(root / "proc/meminfo")
    if available is None:
        return None
    return min([available, *_left_in_groups(root)])


def _mem_available(path: Path) -> int | None:
    text = _read(path) or ""
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * KIB
    return None


def _left_in_groups(root: Path) -> Iterator[int]:
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            top = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        inside = Path(group.lstrip("/"))
        # in a container our own group may be mounted as the top one
        for folder in {top / place for place in (inside, *inside.parents)} if ".." not in inside.parts else {top}:
            if (left := _left(folder, *names)) is not None:
                yield left


def _left(folder: Path, limit_name: str, used_name: str, droppable_name: str) -> int | None:
    """Bytes that a group may still take; None if it has no limit."""
    limit, used = _read(folder / limit_name), _read(folder / used_name)
    if limit is None or used is None or not limit.strip().isdigit() or int(limit) >= _UNBOUNDED:
        return None
    droppable = 0
    for line in (_read(folder / "memory.stat") or "").splitlines():
        if line.startswith(f"{droppable_name} "):
            droppable = int(line.split()[1])
    return max(0, int(limit) - int(used) + droppable)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
