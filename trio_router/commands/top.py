"""`top`."""

import sys

from trio_router.commands.options import AsJson
from trio_router.commands.said import CLEAN, print_json
from trio_router.commands.talk import HERE, Router


def top(*, router: Router = HERE, as_json: AsJson = False) -> int:
    """Show requests, queues and tokens, live; once, where nobody looks on."""
    told = (data for name, data in router.events("/metrics/stream") if name == "metrics")
    if as_json:
        print_json(next(told))
        return CLEAN
    from trio_router.commands.board import show, watch  # noqa: PLC0415  (programs need not wait for rich)

    if sys.stdout.isatty():
        watch(told)
    else:
        show(next(told))
    return CLEAN
