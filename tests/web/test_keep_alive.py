import math

import msgspec
import pytest

from trio_router.errors import InvalidKeepAlive
from trio_router.web.keep_alive import keep_alive_seconds


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("0", 0.0), ("300", 300.0), ("1.5", 1.5), ("-1", math.inf), ("-0.5", math.inf), ('"0"', 0.0), ('"-1"', math.inf),
        ('"300"', 300.0), ('"5m"', 300.0), ('"1h30m"', 5400.0), ('"250ms"', 0.25), ('"-1m"', math.inf), ('"1.5h"', 5400.0),
        ('"24h"', 86400.0), ("null", None),
    ],
)  # fmt: skip
def test_times(written, seconds):
    assert keep_alive_seconds(msgspec.Raw(written.encode())) == seconds


@pytest.mark.parametrize(
    "written",
    [
        '""',
        '"5 m"',
        '"m"',
        '"5d"',
        '"forever"',
        "true",
        "[]",
        "{}",
        "1e99",
        "1e400",
        "-1e400",
        '"999999999999h"',
        '"1m-1s"',
        '"\u0665m"',
    ],
)
def test_no_times(written):
    raw = msgspec.json.decode(f"[{written}]", type=list[msgspec.Raw])[0]
    with pytest.raises(InvalidKeepAlive) as caught:
        keep_alive_seconds(raw)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_keep_alive", "keep_alive")
