"""Policies side by side, in virtual time, on generated traces: `trio-router simulate` without the file.

`first come`: `min_turn_sec = 0`. `until idle`: a model with work keeps its place. `turns`: the default, four
times a load. `short turns`, `long turns`: once, sixteen times. Nothing is started and nothing is waited for: it measures policies, not this machine.

`--only million` (not part of a usual run) plays a million requests for a thousand models.
"""

import random
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import attrs

from benchmarks.report import Bar, Report, main
from trio_router.config.schema import ApiConfig, ModelConfig, RouterConfig, SystemConfig
from trio_router.simulation.report import as_numbers
from trio_router.simulation.run import simulate
from trio_router.simulation.supervisor import LoadTimes
from trio_router.telemetry.logs import configure_logs
from trio_router.telemetry.trace import TracedRequest

SEED = 17
FOR_EVER = 1e6
"""Seconds."""


@attrs.frozen(kw_only=True)
class Traffic:
    """A generated trace."""

    name: str
    requests: int
    models: int
    places: int
    rate: float
    """Requests a second in the mean."""
    load_seconds: float
    service_seconds: float
    """In the mean; times are exponential."""
    skew: float = 0.0
    """0: every model as often; 1: Zipf's law."""
    burst: int = 1
    """Requests of one model that come together."""
    slots: int = 2

    def trace(self) -> list[TracedRequest]:
        chance = random.Random(SEED)
        weights = list(accumulate((number + 1) ** -self.skew for number in range(self.models)))
        names = [f"m{number}" for number in range(self.models)]
        found, at = [], 0.0
        while len(found) < self.requests:
            at += chance.expovariate(self.rate / self.burst)
            (model,) = chance.choices(names, cum_weights=weights)
            found += [
                TracedRequest(
                    at=at,
                    model=model,
                    priority=chance.choices(("high", "normal", "low"), (1, 8, 3))[0],
                    client="",
                    service_seconds=chance.expovariate(1 / self.service_seconds),
                    waited_seconds=None,
                )
                for _ in range(self.burst)
            ]
        return found

    def config(self, min_turn: float | None, max_swap_wait: float) -> RouterConfig:
        models = {
            name: ModelConfig(alias=name, model_path=name, file=Path("/") / name, slots=self.slots)
            for name in (f"m{number}" for number in range(self.models))
        }
        system = SystemConfig(
            base_models_path=Path("/"),
            max_concurrent_models=self.places,
            min_turn_sec=min_turn,
            max_swap_wait_sec=max_swap_wait,
            queue_timeout_sec=FOR_EVER,
            idle_timeout_sec=FOR_EVER,
            max_queue_size_per_model=1_000_000,
        )
        return RouterConfig(path=Path("router.toml"), api=ApiConfig(), system=system, models=models)


Policy = Callable[[Traffic], tuple[float | None, float]]
POLICIES: dict[str, Policy] = {
    "first come": lambda _: (0.0, 30.0),
    "until idle": lambda _: (FOR_EVER, FOR_EVER),
    "turns": lambda _: (None, 30.0),
    "short turns": lambda traffic: (traffic.load_seconds, 30.0),
    "long turns": lambda traffic: (16 * traffic.load_seconds, 30.0),
}


def traffics(scale: int) -> list[Traffic]:
    return [
        Traffic(
            name="three at random, room for one, loads of 2 s",
            requests=scale, models=3, places=1, rate=3, load_seconds=2.0, service_seconds=0.1,
        ),
        Traffic(
            name="30 models by Zipf, room for 4, loads of 10 s",
            requests=scale, models=30, places=4, rate=0.4, load_seconds=10.0, service_seconds=4.0, skew=1.0,
        ),
        Traffic(
            name="4 models, one of them never idle, room for one, loads of 2 s",
            requests=scale, models=4, places=1, rate=6.0, load_seconds=2.0, service_seconds=1.0, skew=3.0, slots=8,
        ),
        Traffic(
            name="10 models in bursts of 20, room for 2, loads of 5 s",
            requests=scale, models=10, places=2, rate=1.0, load_seconds=5.0, service_seconds=1.0, burst=20,
        ),
    ]  # fmt: skip


def row(traffic: Traffic, policy: str) -> dict[str, object]:
    trace = traffic.trace()
    began = time.perf_counter()
    numbers = as_numbers(
        simulate(traffic.config(*POLICIES[policy](traffic)), trace, LoadTimes(usual=traffic.load_seconds))
    )
    took = time.perf_counter() - began
    waits = numbers["waits"]
    if waits["all"]["requests"] != len(trace):
        raise SystemExit(f"{traffic.name}, {policy}: {len(trace) - waits['all']['requests']} requests were lost")
    return {
        "policy": policy,
        "loads": numbers["loads"],
        "p50 s": waits["all"]["p50_sec"],
        "p95 s": waits["all"]["p95_sec"],
        "high p95 s": waits["high"]["p95_sec"],
        "low most s": waits["low"]["max_sec"],
        "took s": took,
    }


def compared(report: Report) -> None:
    for traffic in traffics(1_000 if report.options.quick else 5_000):
        rows = {policy: row(traffic, policy) for policy in POLICIES}
        report.table(f"{traffic.requests:,} requests for {traffic.name}", list(rows.values()))
        first, turns = rows["first come"], rows["turns"]
        report.bars += [
            Bar(
                name=f"{traffic.name[:30]}: {what} over first come's", measured=_ratio(turns[what], first[what]),
                unit="", at_most=1,
            )
            for what in ("loads", "p95 s")
        ]  # fmt: skip


def _ratio(one: object, other: object) -> float | None:
    return one / other if isinstance(one, (int, float)) and isinstance(other, (int, float)) and other else None


def million(report: Report) -> None:
    traffic = Traffic(
        name="a thousand models by Zipf, room for 20, loads of 10 s",
        requests=1_000_000, models=1000, places=20, rate=12, load_seconds=10.0, service_seconds=1.0, skew=1.4, slots=4,
    )  # fmt: skip
    report.table(f"{traffic.requests:,} requests for {traffic.name}", [row(traffic, "turns")])


def run(report: Report) -> None:
    configure_logs("text", "error", sys.stderr)  # of each model's every step, else
    parts = {"compared": compared, "million": million}
    for name in report.options.only or ("compared",):
        parts[name](report)


if __name__ == "__main__":
    main("policies", __doc__ or "", run)
