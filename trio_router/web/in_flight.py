"""How many requests are being answered, whichever way they came: what the end waits for."""

import attrs
import trio


@attrs.define(eq=False)
class InFlight:
    """Use as `with` around each request; may be entered many times at once."""

    count: int = 0
    _none: trio.Event | None = None

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count and self._none is not None:
            self._none.set()
            self._none = None

    async def until_none(self) -> None:
        """Return when no request is being answered."""
        while self.count:
            if self._none is None:
                self._none = trio.Event()
            await self._none.wait()
