"""How much of the host's memory is available to us: Linux's own number, and the bounds of our control groups."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs

FRESH_SECONDS: Final = 1.0
KIB: Final = 1024
_DIGITS: Final = re.compile("[0-9]{1,19}")
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
    kib = _value(_read(path), "MemAvailable:")
    return None if kib is None else kib * KIB


def _left_in_groups(root: Path) -> Iterator[int]:
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, named = line.partition(":")
        controllers, found, group = named.partition(":")
        if not found:
            continue
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
    limit, used = _number(_read(folder / limit_name)), _number(_read(folder / used_name))
    if limit is None or used is None or limit >= _UNBOUNDED:
        return None
    droppable = _value(_read(folder / "memory.stat"), droppable_name) or 0
    return max(0, limit - used + droppable)


def _value(text: str | None, name: str) -> int | None:
    """The number behind `name`, at the beginning of a line."""
    for line in (text or "").splitlines():
        first, *rest = line.split(maxsplit=2)[:2] or [""]
        if first == name:
            return _number(rest[0]) if rest else None
    return None


def _number(text: str | None) -> int | None:
    """None for anything else, such as `max`."""
    match = _DIGITS.fullmatch((text or "").strip())
    return None if match is None else int(match[0])


def _read(path: Path) -> str | None:
    """What stands in a file of the kernel's; None where there is none, or nothing that could be a name."""
    try:
        return path.read_text("ascii", "replace")
    except (OSError, ValueError):  # a path with a zero byte is the latter
        return None
