"""Logs: one line an event, on standard error, for people or for machines."""

import logging
import sys

import structlog

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


def configure_logs(log_format: str, level: str) -> None:
    """Set up structlog: `log_format` is text or json, `level` one of `LEVELS`. Libraries speak from warning on."""
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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s [%(levelname)s] %(name)s: %(message)s"
    )
