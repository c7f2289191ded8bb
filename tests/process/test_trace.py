"""What happened is exported, and played again in virtual time comes out the same.

For longer: `TRIO_ROUTER_REPLAY_SEC=300`. The short run's tolerance is wider: a single load more is a tenth of all there.
"""

import os
import statistics
import time
from random import Random

import pytest

from tests.conftest import StartRouter
from trio_router.config import load_config
from trio_router.simulation.run import load_times, simulate
from trio_router.telemetry.trace import TracedLoad, TracedRequest, read_line

pytestmark = pytest.mark.process

SECONDS = float(os.environ.get("TRIO_ROUTER_REPLAY_SEC", "12"))
TOLERANCE = 0.15 if SECONDS >= 120 else 0.35
RATE = 2.5
SEED = 3


def test_a_run_is_played_again(start_router: StartRouter) -> None:
    flags = ["--fake-load-seconds", "1", "--parallel", "2"]
    aliases = ("a", "b", "c")
    router = start_router(
        models=dict.fromkeys(aliases, flags), system={"max_concurrent_models": 1, "queue_timeout_sec": 120}
    )
    random = Random(SEED)
    began = time.monotonic()
    pending = []
    at = 0.0
    while (at := at + random.expovariate(RATE)) < SECONDS:
        time.sleep(max(0.0, began + at - time.monotonic()))
        fake = {"tokens": 2, "token_seconds": random.uniform(0.02, 0.3)}
        priority = random.choice(("high", "normal", "normal", "low"))
        options = {"fake": fake, "headers": {"X-Request-Priority": priority}, "timeout": 180.0}
        pending.append(router.in_background(random.choice(aliases), **options))
    assert {each.answer(180).status_code for each in pending} == {200}

    answer = router.get("/v1/router/trace")
    assert answer.headers["content-type"].startswith("application/jsonl")
    happened = [read_line(line) for line in answer.text.splitlines()]
    requests = [each for each in happened if isinstance(each, TracedRequest)]
    loads = [each for each in happened if isinstance(each, TracedLoad)]
    assert len(requests) == len(pending)
    assert all(request.output_tokens == 2 for request in requests)

    outcome = simulate(load_config(router.config_path, {}), requests, load_times(loads))
    assert outcome.errors == {}
    waits = [wait for each in outcome.waits.values() for wait in each]
    before = statistics.median(request.waited_seconds or 0.0 for request in requests)
    print(f"p50 wait {before:.3f} s, simulated {statistics.median(waits):.3f} s")
    loaded = sum(load.kind == "load" for load in loads)
    print(f"loads {loaded}, simulated {outcome.loads.total()}")
    assert statistics.median(waits) == pytest.approx(before, rel=TOLERANCE)
    assert outcome.loads.total() == pytest.approx(loaded, rel=TOLERANCE)
