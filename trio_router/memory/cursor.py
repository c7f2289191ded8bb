"""A position in a hostile file: it never passes the file's end or the cap of a GGUF header.

Every length is compared with what the file still holds before anything is read or allocated.
"""

import io
import struct
from pathlib import Path
from typing import BinaryIO, Final

import attrs

MAX_HEADER_BYTES: Final = 64 * 1024 * 1024


class GgufError(Exception):
    """Raised when a file cannot be read as GGUF; the message names the file and what is wrong with it."""


@attrs.define(eq=False)
class Cursor:
    """Reads little-endian numbers and strings; `what` names the thing in the `GgufError` of a failure."""

    file: BinaryIO
    path: Path
    size: int
    position: int = 0

    def error(self, message: str) -> GgufError:
        return GgufError(f"{self.path}: {message}")

    def need(self, count: int, what: str) -> None:
        """Raise unless `count` more bytes are there."""
        if self.position + count > self.size:
            raise self.error(f"truncated: {what} needs {count} bytes at {self.position}, the file has {self.size}")
        if self.position + count > MAX_HEADER_BYTES:
            raise self.error(f"{what} lies beyond the {MAX_HEADER_BYTES} bytes a header may have")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self.file.read(count)
        self.position += count
        if len(data) != count:  # the file shrank under us
            raise self.error(f"truncated while it was read: {what} at {self.position - count}")
        return data

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.file.seek(count, 1)
        self.position += count

    def number(self, code: str, what: str) -> int:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))
        return int(value)

    def bounded(self, code: str, limit: int, what: str) -> int:
        value = self.number(code, what)
        if value > limit:
            raise self.error(f"{what} is {value}, at most {limit} is allowed")
        return value

    def string(self, limit: int, what: str) -> str:
        length = self.bounded("Q", limit, f"length of {what}")
        return self.take(length, what).decode(errors="replace")

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings; apart from `skip` because token lists are most of a header."""
        self.need(8 * count, what)
        read, position, end = self.file.read, self.position, min(self.size, MAX_HEADER_BYTES)
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            position += 8
            if position + length > end:
                self.position = position
                self.need(length, what)
            if length < io.DEFAULT_BUFFER_SIZE:
                read(length)
            else:
                self.file.seek(length, 1)
            position += length
        self.position = position
        if self.file.tell() != position:
            raise self.error(f"truncated while it was read: {what}")
