"""The time of day, as every answer says it (RFC 9110 section 6.6.1)."""

import time
from email.utils import formatdate
from typing import Final

import attrs


@attrs.define(eq=False)
class DateLine:
    """A header line, written once a second: for most answers it is as it was."""

    _second: int = -1
    _line: bytes = b""

    def __call__(self) -> bytes:
        """With its end."""
        now = int(time.time())
        if now != self._second:
            self._second, self._line = now, b"date: %b\r\n" % formatdate(now, usegmt=True).encode("ascii")
        return self._line


date_line: Final = DateLine()
