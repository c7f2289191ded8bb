"""Standard output and standard error that neither raise nor wait.

A full disk under a log must not end the router, and whoever reads a pipe slowly must not stop its loop. What is not
taken at once is kept, up to `KEPT_BYTES`, and tried with the next line; what comes when that is full is lost, counted,
and told of as soon as there is room again.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Callable
from typing import Final, TextIO

import attrs

KEPT_BYTES: Final = 1024 * 1024

Write = Callable[[bytes], int]
"""Takes some of it and returns how much. Raises OSError."""


@attrs.define(eq=False)
class Output:
    """A text file, as far as those who write lines need one."""

    _write: Write
    _own: socket.socket | None = None
    lost: int = 0
    """Texts that were given up since some were taken last."""
    _kept: bytearray = attrs.field(factory=bytearray)

    @classmethod
    def of(cls, file: TextIO | None) -> "Output":
        """One that writes to where `file` does; nowhere, if that is closed."""
        if file is None:
            return cls(len)
        try:
            descriptor = file.fileno()
        except (OSError, ValueError, AttributeError):  # not a real file: a test's
            return cls(_writer_of_text(file))
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(kind):  # systemd's journal. The flag that makes one non-blocking belongs to others, too
            own = socket.socket(fileno=os.dup(descriptor))
            return cls(lambda data: own.send(data, socket.MSG_DONTWAIT), own)
        if stat.S_ISFIFO(kind):
            with contextlib.suppress(OSError):  # another description of the same pipe, with a flag of its own
                descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return cls(lambda data: os.write(descriptor, data))

    def write(self, text: str) -> int:
        """Take whole lines."""
        data = text.encode("utf-8", "backslashreplace")
        if self.lost and len(self._kept) + len(data) <= KEPT_BYTES:
            data = b"--- %d messages lost: they were not taken ---\n" % self.lost + data
            self.lost = 0
        if len(self._kept) + len(data) > KEPT_BYTES:
            self.lost += 1
        else:
            self._kept += data
        self.flush()
        return len(text)

    def close(self) -> None:
        """Give back what it opened."""
        if self._own is not None:
            self._own.close()

    def flush(self) -> None:
        """Hand on as much as is taken now."""
        try:
            while self._kept:
                taken = self._write(bytes(self._kept))
                del self._kept[:taken]
        except OSError:
            return  # to whom should we say it? The next line tries again


def _writer_of_text(file: TextIO) -> Write:
    def write(data: bytes) -> int:
        file.write(data.decode())
        file.flush()
        return len(data)

    return write
