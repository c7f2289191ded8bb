"""Is a llama-server well: until it is ready, and then for as long as it lives."""

import os
import time
from collections import deque

import attrs
import trio

from trio_router.backend.address import Address
from trio_router.backend.backend import Backend
from trio_router.backend.client import BackendClient, NoAnswer, NoFiles

READY_POLL_SECONDS = 0.02
"""Readiness is noticed within 30 ms: this, and the probe's own 2 ms."""
SOONEST_POLL_SECONDS = 0.003
POLL_SHARE = 40
"""A small model is ready in 0.2 s: at first the pause is this part of the time waited so far."""
MAX_CONSECUTIVE_FAILURES = 3
RETRY_SECONDS = 1.0
"""Pause after a failed probe: a server that is ill is looked at more often than a healthy one."""


@attrs.define(eq=False)
class Health:
    """What the probes of one incarnation found."""

    checks: int = 0
    failures: int = 0
    consecutive_failures: int = 0
    last_check: float | None = None
    """Unix time of the last probe's end."""
    last_error: str | None = None
    response_seconds: deque[float] = attrs.field(factory=lambda: deque(maxlen=20))

    def record(self, seconds: float, error: str | None) -> None:
        """Count one probe that took `seconds` and found `error`, or nothing wrong."""
        self.checks += 1
        self.last_check = time.time()
        self.last_error = error
        if error is None:
            self.consecutive_failures = 0
            self.response_seconds.append(seconds)
        else:
            self.failures += 1
            self.consecutive_failures += 1


async def until_ready(client: BackendClient, address: Address) -> float:
    """Return as soon as `/health` says 200: the seconds that answer took.

    Never fails: a server that is not there yet looks like any other.
    """
    began = trio.current_time()
    while True:
        if address.path is None or os.path.exists(address.path):  # noqa: PTH110, ASYNC240  (a stat of a tmpfs: 2 µs)
            asked = trio.current_time()
            try:
                if await client.healthy():
                    return trio.current_time() - asked
            except NoAnswer:
                pass
        waited = trio.current_time() - began
        await trio.sleep(min(READY_POLL_SECONDS, max(SOONEST_POLL_SECONDS, waited / POLL_SHARE)))


async def watch(client: BackendClient, health: Health, interval_seconds: float) -> str:
    """Probe until the server has failed `MAX_CONSECUTIVE_FAILURES` times in a row; returns what was wrong.

    A probe for which we have no file descriptor is none.
    """
    while True:
        await trio.sleep(min(interval_seconds, RETRY_SECONDS) if health.consecutive_failures else interval_seconds)
        before = trio.current_time()
        try:
            error = await _probe(client)
        except NoFiles:
            continue
        health.record(trio.current_time() - before, error)
        if health.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            return f"failed {health.consecutive_failures} health checks in a row, the last with: {error}"


async def expire_silent(backend: Backend) -> None:
    """End exchanges whose backend says nothing, until cancelled.

    One look at every connection now and then, in the place of a timer around each read: a silence is noticed late by at
    most a tenth of what is allowed.
    """
    while True:
        await trio.sleep(min(1.0, backend.patience_seconds / 20))
        now = trio.current_time()
        for slot in backend.slots:
            if slot.connection is not None:
                slot.connection.expire_silent(now)


async def _probe(client: BackendClient) -> str | None:
    try:
        return None if await client.healthy() else "/health answered 503"
    except NoFiles:
        raise
    except NoAnswer as error:
        return str(error)
