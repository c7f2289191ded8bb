"""A request's way to a llama-server that answers it: wait for a lease, try, and wait again if the server dies.

Until the first byte of an answer is there, a request survives its backend: it goes back into the queue at its old
place and is tried on the next incarnation. What "try" means, which bytes go where, is the caller's business.

The cases, after a try that ended with a `BackendLost`:

0. We ended the try ourselves, so that a high request has its slot (`system.preempt_low`): queued again as in 6. Whether
   it then goes on or begins anew is the caller's business too.
1. The kept connection was stale (llama-server closes idle ones): once more on the same slot, on a fresh one.
2. The backend lives on: it broke off, or answered what is not HTTP. The client gets 502, nothing is repeated. If
   it could not even be reached (there is no file descriptor left), 503.
3. We ended the backend ourselves, because it was ejected or we are shutting down: 503.
4. The backend died, and so did the one before it under the same request: 502 with the log's last lines. Such a
   request gets no third to kill. But if others were aboard, it may have been one of those: then it is queued again
   (6), and has the next backend for itself.
5. The backend died, and `max_retries` are used up: 503.
6. The backend died: queued again with the old ticket's key, and with what was left of its time to wait.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
import trio

from trio_router.backend.backend import Slot
from trio_router.backend.connection import BackendLost
from trio_router.errors import BackendBroken, BackendCrashed, BackendUnavailable, RouterError, ShuttingDown
from trio_router.fleet.registry import Registry
from trio_router.fleet.scheduler import Lease
from trio_router.fleet.ticket import Ticket

DEATH_SECONDS = 0.25
"""How long a broken connection may precede the first sign that the process that held it has begun to end."""
MAX_DEATHS = 2

log = structlog.get_logger("trio_router.fleet")

T = TypeVar("T")


async def dispatch(
    registry: Registry, ticket: Ticket, attempt: Callable[[Slot], Awaitable[T]], *, request_id: str | None = None
) -> tuple[Lease, T]:
    """Lease a slot and `attempt` the request on it, as often as the cases above say; `request_id` is for the log.

    Returns the lease, which is the caller's to release, and what the attempt returned.

    *Cancellation.* At any await; nothing is left behind: the slot's connection is closed, so that llama-server
    stops computing, and the lease ends; its slot is used again when llama-server has let go of it.
    """
    retries = deaths = 0
    while True:
        lease = await registry.lease(ticket)
        try:
            try:
                return lease, await attempt(lease.slot)
            except BackendLost as error:
                if not error.stale or ticket.yielded:
                    raise
                lease.slot.disconnect()
                return lease, await attempt(lease.slot)  # 1
        except BackendLost as error:
            lease.slot.disconnect()
            backend = lease.slot.backend
            if ticket.yielded:  # 0
                lease.release()
                _queue_again(ticket)
                log.info("queued again", id=request_id, model=ticket.alias, error="a high request has its slot")
                continue
            backend.look_for_its_end()
            try:
                with trio.move_on_after(DEATH_SECONDS):
                    await backend.gone.wait()
            finally:
                lease.release()
            died = backend.lost is not None and not backend.unloaded
            deaths = deaths + 1 if died else 0
            verdict = _verdict(registry, ticket, lease, error, deaths=deaths, retries=retries)
            if verdict is not None:
                raise verdict from error
            retries += 1
            ticket.alone = deaths >= MAX_DEATHS
            _queue_again(ticket)  # 6
            log.info(
                "queued again", id=request_id, model=ticket.alias, incarnation=backend.incarnation, error=str(error)
            )
        except BaseException:
            lease.leave()
            raise


def _queue_again(ticket: Ticket) -> None:
    """Have it wait at its old place, for what was left of its time when it got its slot. Raises what it was told meanwhile."""
    if ticket.refusal is not None:
        raise ticket.refusal
    ticket.requeued, ticket.yielded = True, False
    if ticket.granted_at is not None:
        ticket.deadline = min(ticket.due, ticket.deadline + trio.current_time() - ticket.granted_at)


def _verdict(
    registry: Registry, ticket: Ticket, lease: Lease, error: BackendLost, *, deaths: int, retries: int
) -> RouterError | None:
    """What the client is told, or None: try again."""
    alias = ticket.alias
    backend = lease.slot.backend
    if backend.lost is None:
        return (  # 2
            BackendUnavailable(f"model {alias!r}: {error}", param="model")
            if error.unsent
            else BackendBroken(f"the llama-server of model {alias!r}: {error}", details={"model": alias})
        )
    if backend.unloaded:
        if registry.draining:
            return ShuttingDown("the router is shutting down")  # 3
        return BackendUnavailable(f"model {alias!r} was unloaded while the request ran", param="model")  # 3
    used_up = retries >= registry.config.system.max_retries
    if deaths >= MAX_DEATHS and (used_up or backend.aboard <= 1):
        died = f"the llama-server of model {alias!r} died {deaths} times under this request: {backend.lost}"
        words = backend.tail.last(8)
        return BackendCrashed(f"{died}; its last words:\n{words}" if words else died, details={"model": alias})  # 4
    if used_up:
        return BackendUnavailable(f"the llama-server of model {alias!r} died: {backend.lost}", param="model")  # 5
    return None
