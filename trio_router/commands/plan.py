"""`plan`."""

from trio_router.commands.talk import CLEAN, Router, print_json


def plan(router: Router, model: str, *, priority: str, as_json: bool) -> int:
    """What would happen to a request that came now."""
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
