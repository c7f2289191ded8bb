"""Logs: one line an event, on standard error, for people or for machines."""

import functools
import json
import logging
import time
from collections.abc import Sequence
from typing import TextIO

import structlog

from trio_router.telemetry.events import Outcome, RequestFinished, RequestSink

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


# without the values of local variables: those hold what clients sent, and keys
_traceback_as_data = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)


def as_line(_: object, __: str, event: structlog.typing.EventDict) -> str:
    """An event as a line for people; a traceback, if there is one, below it.

    structlog's own renderer for the console takes 40 µs to pad and colour a line, half of what a request may cost.
    """
    exception = event.pop("exception", None)
    first = f"{event.pop('timestamp')} [{event.pop('level'):<7}] {event.pop('event')}"
    line = " ".join([first, *(f"{name}={_shown(value)}" for name, value in event.items() if value is not None)])
    return line if exception is None else f"{line}\n{exception}"


def _shown(value: object) -> str:
    """`value` such that it cannot be taken for the next one, or for another line."""
    text = str(value)
    return text if text.isprintable() and text and " " not in text and "=" not in text else repr(text)


def configure_logs(log_format: str, level: str, out: TextIO) -> None:
    """Set up structlog: `log_format` is text or json, `level` one of `LEVELS`. Libraries speak from warning on.

    `request_log` goes with it; `out` is an `Output`, or a file that may neither raise nor wait.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[structlog.typing.Processor] = (
        [structlog.processors.ExceptionRenderer(_traceback_as_data), structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [structlog.processors.format_exc_info, as_line]
    )
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(out),
    )
    logging.basicConfig(stream=out, level=logging.WARNING, format="%(asctime)s [%(levelname)s] %(name)s: %(message)s")


def request_log(log_format: str, level: str, out: TextIO) -> RequestSink | None:
    """A sink that writes a line for each request that ended, as structlog would; None if `level` says not to.

    All of a batch go out at once: a line that goes through structlog takes 50 µs, half of what a request may cost.
    """
    if LEVELS[level] > logging.INFO:
        return None
    render = _request_as_json if log_format == "json" else _request_as_text

    def write(ended: Sequence[RequestFinished]) -> None:
        out.write("".join([render(event) for event in ended]))

    return write


def _request_as_text(event: RequestFinished) -> str:
    what = _what((event.endpoint, event.alias, event.priority, event.key), event.outcome, event.status)
    incarnation = "" if event.incarnation is None else f" incarnation={event.incarnation}"
    return (
        f"{_iso(event.finished_at)} [info   ] request id={_shown(event.request_id)}{what}"
        f" seconds={round(event.duration_seconds, 4)}{incarnation}\n"
    )


@functools.lru_cache(maxsize=256)
def _what(asked: tuple[str, str | None, str | None, str | None], outcome: Outcome, status: int) -> str:
    """What many requests have in common; `asked` are path, model, priority and key."""
    named = zip(("path", "model", "priority", "key"), asked, strict=True)
    names = [f" {name}={_shown(value)}" for name, value in named if value is not None]
    return f"{''.join(names)} outcome={outcome.word} status={status}"


def _request_as_json(event: RequestFinished) -> str:
    said = {
        "id": event.request_id,
        "path": event.endpoint,
        "model": event.alias,
        "priority": event.priority,
        "key": event.key,
        "outcome": event.outcome.value,
        "status": event.status,
        "seconds": round(event.duration_seconds, 4),
        "incarnation": event.incarnation,
        "event": "request",
        "level": "info",
        "timestamp": _iso(event.finished_at),
    }
    return json.dumps(said) + "\n"


def _iso(seconds: float) -> str:
    """A Unix time as structlog writes it: UTC, with microseconds."""
    whole = int(seconds)
    return f"{_second(whole)}.{int((seconds - whole) * 1e6):06d}Z"


@functools.lru_cache(maxsize=2)
def _second(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))
