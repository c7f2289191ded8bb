"""The last items of an endless sequence, for any number of readers who each keep a position.

Items are counted from 1; a reader's position is the number of the last item it has. What it costs to be read by
many is a position each: nothing is copied, and a reader that is slow holds nothing up and fills nothing.
"""

from collections import deque
from collections.abc import Sized
from typing import Generic, TypeVar

import attrs
import trio

Item = TypeVar("Item", bound=Sized)


@attrs.define(eq=False, kw_only=True)
class Ring(Generic[Item]):
    """Bounded both in items and in their sizes; the newest is always kept."""

    max_items: int
    max_bytes: int
    """Sum of the items' `len`."""
    written: int = 0
    """How many items there ever were, which is the number of the newest."""
    closed: bool = False
    """Whether nobody is to wait for more; items may still come."""
    _items: deque[Item] = attrs.field(factory=deque)
    _bytes: int = 0
    _news: trio.Event | None = None

    def __len__(self) -> int:
        """How many items are kept."""
        return len(self._items)

    @property
    def forgotten(self) -> int:
        """The number of the newest item that is no longer kept: no position below it can be read from."""
        return self.written - len(self._items)

    def append(self, item: Item) -> None:
        """One more; the oldest go as the bounds demand, and who waits is woken."""
        self._items.append(item)
        self._bytes += len(item)
        self.written += 1
        while len(self._items) > self.max_items or (self._bytes > self.max_bytes and len(self._items) > 1):
            self._bytes -= len(self._items.popleft())
        self._wake()

    def close(self) -> None:
        """Let nobody wait any more."""
        self.closed = True
        self._wake()

    def after(self, position: int, max_bytes: int) -> list[Item]:
        """What is kept of the items after `position`, oldest first: at least one if there is any, up to `max_bytes`."""
        found: list[Item] = []
        size = 0
        for index in range(max(position, self.forgotten) - self.written, 0):
            item = self._items[index]
            size += len(item)
            if found and size > max_bytes:
                break
            found.append(item)
        return found

    def last(self, count: int) -> list[Item]:
        """The newest `count`, or as many as are kept."""
        return [self._items[index] for index in range(-min(count, len(self._items)), 0)]

    async def until_after(self, position: int) -> None:
        """Return when there is an item after `position`, or the ring is closed."""
        while self.written <= position and not self.closed:
            if self._news is None:
                self._news = trio.Event()
            await self._news.wait()

    def _wake(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None
