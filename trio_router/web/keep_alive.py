"""`keep_alive` in a request's body: how long its model stays in memory afterwards, as Ollama has it."""

import math
import re
from typing import Final

import msgspec

from trio_router.errors import InvalidKeepAlive, shown

LONGEST_SECONDS: Final = 10 * 365 * 86400.0
_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{0,9})?)(ns|us|µs|ms|s|m|h)")
_WHOLE: Final = re.compile(rf"(-?)((?:{_PART.pattern}){{1,8}})")
_NUMBER: Final = re.compile(r"-?[0-9]{1,12}(?:\.[0-9]{1,9})?")


def keep_alive_seconds(written: msgspec.Raw) -> float | None:
    """Seconds after its last request, infinite for a negative number; None for null. Raises InvalidKeepAlive.

    A number is seconds; a string may have units: `"5m"`, `"1h30m"`.
    """
    seconds: float | None = None
    try:
        value = msgspec.json.decode(written)
    except msgspec.MsgspecError:  # a number beyond all others
        value = False
    match value:
        case None:
            return None
        case bool():
            pass
        case int() | float() if abs(value) <= LONGEST_SECONDS:
            seconds = float(value)
        case str() if _NUMBER.fullmatch(value):
            seconds = float(value)
        case str() if (whole := _WHOLE.fullmatch(value)) is not None:
            parts = _PART.findall(whole[2])
            seconds = sum(float(number) * _UNITS[unit] for number, unit in parts) * (-1 if whole[1] else 1)
    if seconds is None or seconds > LONGEST_SECONDS:
        text = shown(bytes(written)[:100].decode("utf-8", "replace"))
        raise InvalidKeepAlive(
            f'`keep_alive` is {text}; it may be seconds, or a time such as "5m"; -1 is for ever', param="keep_alive"
        )
    return math.inf if seconds < 0 else seconds
