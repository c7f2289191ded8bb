"""What a simulation found: as numbers, and as a table."""

import bisect
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from trio_router.simulation.run import Outcome

MIB = 1024 * 1024


def share(ordered: Sequence[float], part: float) -> float | None:
    """The value that `part` of all are at most; `ordered` is."""
    return ordered[max(0, round(part * len(ordered)) - 1)] if ordered else None


def as_numbers(outcome: Outcome) -> dict[str, Any]:
    """For programs. Seconds."""
    waits = {name: sorted(each) for name, each in outcome.waits.items()}
    waits["all"] = sorted(wait for each in outcome.waits.values() for wait in each)
    stayed: dict[str, float] = {}
    for stay in outcome.stays:
        stayed[stay.model] = stayed.get(stay.model, 0.0) + stay.ended - stay.began
    used = sorted(set(stayed) | set(outcome.busy_seconds))
    return {
        "requests": outcome.requests,
        "seconds": outcome.seconds,
        "errors": dict(outcome.errors),
        "loads": sum(outcome.loads.values()),
        "waits": {
            name: {
                "requests": len(each),
                "p50_sec": share(each, 0.5),
                "p95_sec": share(each, 0.95),
                "p99_sec": share(each, 0.99),
                "max_sec": each[-1] if each else None,
            }
            for name, each in waits.items()
        },
        "models": {
            alias: {
                "loads": outcome.loads[alias],
                "in_memory": _part(stayed.get(alias, 0.0), outcome.seconds),
                "slots_busy": _part(outcome.busy_seconds[alias], stayed.get(alias, 0.0) * outcome.slots[alias]),
            }
            for alias in used
        },
        "memory_mb": _memory(outcome),
    }


def _part(some: float, whole: float) -> float:
    return some / whole if whole else 0.0


def _memory(outcome: Outcome) -> dict[str, float]:
    """The mean over time, and the most, of what models in memory are projected to hold."""
    changes = sorted(
        [(stay.began, outcome.memory[stay.model]) for stay in outcome.stays]
        + [(stay.ended, -outcome.memory[stay.model]) for stay in outcome.stays]
    )
    held = most = 0
    summed = before = 0.0
    for at, change in changes:
        summed += held * (at - before)
        held, before = held + change, at
        most = max(most, held)
    return {"mean": _part(summed, outcome.seconds) / MIB, "most": most / MIB}


def in_words(outcome: Outcome) -> Iterator[str]:
    """For people, line by line."""
    numbers = as_numbers(outcome)
    yield f"{numbers['requests']} requests in {numbers['seconds']:.0f} s, {numbers['loads']} loads"
    for code, count in sorted(outcome.errors.items()):
        yield f"{count} x {code}"
    yield ""
    yield f"{'WAIT FOR A SLOT':<24}{'REQUESTS':>10}{'P50':>10}{'P95':>10}{'P99':>10}{'MOST':>10}"
    for name, each in numbers["waits"].items():
        times = "".join(_seconds(each[key]) for key in ("p50_sec", "p95_sec", "p99_sec", "max_sec"))
        yield f"{name:<24}{each['requests']:>10}{times}"
    yield ""
    yield f"{'MODEL':<24}{'LOADS':>10}{'IN MEMORY':>12}{'SLOTS BUSY':>12}"
    for alias, each in numbers["models"].items():
        yield f"{alias:<24}{each['loads']:>10}{each['in_memory']:>12.1%}{each['slots_busy']:>12.1%}"
    memory = numbers["memory_mb"]
    if memory["most"]:
        yield ""
        yield f"memory of models: {memory['mean']:.0f} MiB in the mean, {memory['most']:.0f} at most"


def _seconds(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2f} s':>10}"


def queue_over_time(outcome: Outcome, points: int) -> list[int]:
    """How many waited, at so many moments of equal distance."""
    came = sorted(at for at, _ in outcome.waiting)
    left = sorted(at + wait for at, wait in outcome.waiting)
    moments = [outcome.seconds * (index + 0.5) / points for index in range(points)]
    return [bisect.bisect_right(came, at) - bisect.bisect_right(left, at) for at in moments]


def mean_wait(outcome: Outcome) -> float:
    """Of all who got a slot."""
    waits = [wait for each in outcome.waits.values() for wait in each]
    return statistics.fmean(waits) if waits else 0.0
