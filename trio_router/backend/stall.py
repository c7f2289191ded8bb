"""Notices a llama-server that answers `/health` and computes no more (llama.cpp#13281, llama.cpp#18237).

`/health` is answered by threads that know nothing of the computation. What requests see does tell: while any of them
waits and none of them gets a byte, the server is asked, half way to `stall_timeout_sec` and at its end, for the
counters that it keeps of its computation. If they have not moved, or are not told, it has stalled. A long prompt, of
which no client sees anything either, moves them with every batch.
"""

import math
from typing import Final

import trio

from trio_router.backend.backend import Backend
from trio_router.backend.client import NoAnswer

LOOKS: Final = 20
"""How often the silence is looked at within the time that it may last."""
FIRST_QUESTION: Final = 0.5
LAST_QUESTION: Final = 0.75
"""The parts of that time after which the counters are asked for; an answer may take until the next one."""


async def until_stalled(backend: Backend, seconds: float) -> str:
    """Return, in words, once no request has got a byte for `seconds` and nothing was computed."""
    if math.isinf(seconds):
        await trio.sleep_forever()
    silent_since: float | None = None
    known: tuple[str, ...] | None = None
    while True:
        await trio.sleep(seconds / LOOKS)
        now = trio.current_time()
        if backend.heard():
            silent_since = None
        elif silent_since is None:
            silent_since, known = now, None
        elif now - silent_since >= seconds * LAST_QUESTION and known is not None:
            left = silent_since + seconds - now
            found = await _counters(backend, max(left, seconds / LOOKS))
            if backend.heard():
                silent_since = None
            elif found and found != known:
                silent_since, known = now, None
            elif trio.current_time() - silent_since >= seconds:
                return f"llama-server computed nothing for {seconds:g} s while requests waited"
        elif now - silent_since >= seconds * FIRST_QUESTION and known is None:
            known = await _counters(backend, seconds * (LAST_QUESTION - FIRST_QUESTION))


async def _counters(backend: Backend, seconds: float) -> tuple[str, ...]:
    """What the server says it has done so far; empty when it does not say in time."""
    with trio.move_on_after(seconds):
        while True:  # a batch of a prompt may hold an answer up for longer than a client of ours waits
            try:
                text = await backend.client.metrics()
            except NoAnswer:
                await trio.sleep(seconds / LOOKS)
            else:
                return tuple(line for line in text.splitlines() if "_total" in line and not line.startswith("#"))
    return ()
