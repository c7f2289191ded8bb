"""`plan`."""

from typing import Literal

from trio_router.commands.options import AsJson
from trio_router.commands.said import CLEAN, print_json
from trio_router.commands.talk import HERE, Router


def plan(
    model: str,
    /,
    *,
    priority: Literal["high", "normal", "low"] = "normal",
    router: Router = HERE,
    as_json: AsJson = False,
) -> int:
    """Say what would happen to a request for a model that came now.

    Parameters
    ----------
    priority
        Of the request.
    """
    told = router.post("/v1/router/plan", {"model": model, "priority": priority})
    if as_json:
        print_json(told)
        return CLEAN
    print(f"{told['outcome']}: {told['why']}")
    if told["queue_position"]:
        print(f"place in the queue: {told['queue_position']}")
    if told["estimated_wait_ms"] is not None:
        print(f"estimated wait: {told['estimated_wait_ms'] / 1000:.1f} s")
    if told["memory_before_mb"] != told["memory_after_mb"]:
        print(f"memory of models: {told['memory_before_mb']} -> {told['memory_after_mb']} MiB")
    return CLEAN
