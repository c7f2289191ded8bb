"""How a llama-server ended by itself, for those who decide what follows and for those who read of it."""

import signal

import attrs

from trio_router.telemetry.events import ExitKind


@attrs.frozen(kw_only=True)
class Ending:
    """How an incarnation ended by itself."""

    kind: ExitKind | None
    """None when there was no process."""
    code: int
    message: str
    """One sentence, then the last lines of the log."""
    was_ready: bool
    timed_out: bool = False
    short_of_memory: bool = False


def describe_exit(code: int | None, *, was_ready: bool) -> str:
    """A sentence on how a llama-server ended by itself."""
    when = "ended" if was_ready else "ended before it was ready"
    if code is None:
        return f"llama-server {when}"
    if code >= 0:
        return f"llama-server {when} with exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    match name:
        case "SIGILL":
            hint = ": it was compiled for instructions that this CPU does not have"
        case "SIGKILL":
            hint = ": somebody killed it, or the system ran out of memory"
        case _:
            hint = ""
    return f"llama-server {when} by {name}{hint}"
