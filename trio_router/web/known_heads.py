"""Heads that were read and admitted lately: a client sends the same each time but for the length of the body."""

import re
from typing import Final

import attrs

from trio_router.web.client_socket import ClientSocket
from trio_router.web.inference import Asked

MAX_HEADS: Final = 256
MAX_BYTES: Final = 2048
"""How many are remembered, and how long they may be."""
LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n")
MAX_DIGITS: Final = 15


@attrs.define(eq=False, kw_only=True)
class Known:
    """What a head says that was read and admitted, whatever the length of the body."""

    asked: Asked
    request_id: str | None
    """The client's own."""
    common: bytes
    """Lines that every answer has, but for the request's id."""
    close: bool
    renewal: int
    """The rules it was admitted by: as many had gone before them."""
    before: bytes = b""
    after: bytes = b""
    """Its bytes before and after the length."""


@attrs.define(eq=False)
class KnownHeads:
    """All of them, by their bytes before and after the length; each client's last one is with its socket, too."""

    _heads: dict[tuple[bytes, bytes], Known] = attrs.field(factory=dict)

    def recall(self, client: ClientSocket, raw: bytes, renewal: int, max_body_bytes: int) -> tuple[Known | None, int]:
        """What is known of the head `raw`, and the length that it says.

        None for one that was admitted by other rules than those of `renewal`, or that says a larger body than may be.
        """
        known = client.known
        if known is not None and raw.startswith(known.before) and raw.endswith(known.after):
            digits = raw[len(known.before) : len(raw) - len(known.after)]
        else:
            found = LENGTH.search(raw)
            if found is None:
                return None, 0
            digits = found[1]
            known = self._heads.get((raw[: found.start(1)], raw[found.end(1) :]))
            if known is None:
                return None, 0
            client.known = known
        if known.renewal != renewal:
            return None, 0
        if not digits.isdigit() or len(digits) > MAX_DIGITS or (length := int(digits)) > max_body_bytes:
            return None, 0
        return known, length

    def remember(self, client: ClientSocket, raw: bytes, known: Known) -> None:
        """Keep what the head `raw` says; not of a form, whose boundary is another one each time."""
        found = LENGTH.search(raw)
        if found is None or len(raw) > MAX_BYTES or known.asked.boundary is not None:
            return
        if len(self._heads) >= MAX_HEADS:
            self._heads.clear()
        known.before, known.after = raw[: found.start(1)], raw[found.end(1) :]
        self._heads[known.before, known.after] = client.known = known
