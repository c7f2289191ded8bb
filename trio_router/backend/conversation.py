"""What a slot has in its cache, as far as a router can know: the conversation that it was given last.

llama-server chooses a slot by how much of what it holds a prompt begins with, a tenth is enough: a conversation that
shares its instructions with another takes that one's slot, and both are computed anew at each turn. We know better: a
conversation goes on where its messages so far are a prefix of the new ones, byte by byte, as every client sends them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from trio_router.backend.backend import Slot

MOST_SLOTS: Final = 32
"""With more of them, to look at each takes longer than it is worth."""
MOST_TEXT_BYTES: Final = 1024 * 1024
"""Longer ones are not kept: they are known by their session, or not at all."""
ANSWERED: Final = b'"assistant"'
"""What comes behind the first question."""


@attrs.define(eq=False)
class Conversation:
    """What a request says of the one it belongs to."""

    text: bytes
    """JSON of its messages so far, or of its prompt, without what ends it."""
    session: bytes | None = None
    """The client's own name for it."""

    @classmethod
    def of(cls, text: bytes, session: bytes | None) -> "Conversation":
        """`text` is whole JSON."""
        return cls(text[:-1] if len(text) <= MOST_TEXT_BYTES else b"", session)


def choose(free: Sequence["Slot"], conversation: Conversation) -> int:
    """Which of the free slots one goes on in, or, if none holds it, which was not used for longest.

    In this order: the one with its session; the one that holds the most of it; one that holds the same beginning, up to
    the first answer: something was said otherwise than before.
    """
    text, session = conversation.text, conversation.session
    answered = text.find(ANSWERED)
    opening = text[:answered] if answered > 0 else None
    best, best_fit = 0, (-1, 0, 0.0)
    for index, slot in enumerate(free):
        held = slot.holds
        if held is None:
            fit = (0, 0, -slot.since)
        elif session is not None and held.session == session:
            fit = (3, 0, slot.since)
        elif held.text and text.startswith(held.text):
            fit = (2, len(held.text), slot.since)
        elif opening is not None and held.text.startswith(opening):
            fit = (1, 0, slot.since)
        else:
            fit = (0, 0, -slot.since)
        if fit > best_fit:
            best, best_fit = index, fit
    return best
