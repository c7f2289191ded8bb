"""How long a request is said to wait, and how long it then does: a real llama-server, a little less than it can do.

Requests come when they like (a Poisson process). What none of them can know is how long the answers before theirs will
be, and who comes later with a better priority.

The error of an estimate is |estimate - wait| / wait, over all requests that waited for at least `LEAST_WAIT_MS`: shorter
waits are of the size of one answer, whose length nobody knows. The bar is for the median over all traffic; the table
has each kind of it. In virtual time, where nothing else is in the way, the three have 0, 8 and 25 %: a low request at
such a load is overtaken for as long as it waits, by how many is chance, and no estimate does better.
"""

import http.client
import json
import random
import statistics
import threading
import time
from contextlib import ExitStack
from typing import Final

import attrs

from benchmarks.peers import Peer, a_place, ask, trio_router
from benchmarks.real import what_is_real
from benchmarks.report import Bar, Report, main, median
from tests.harness.tiny_gguf import write_tiny_llama

SLOTS: Final = 2
LOAD: Final = 0.95
"""Of what the slots can do."""
LEAST_WAIT_MS: Final = 500
LEARNED: Final = 20
"""So many requests are not judged."""
PATIENT_MS: Final = 3_600_000


@attrs.frozen(kw_only=True)
class Traffic:
    """What is asked for."""

    title: str
    tokens: tuple[int, int]
    """Least and most of an answer."""
    priorities: tuple[str, ...] = ("normal",)


TRAFFIC: Final = (
    Traffic(title="answers all alike", tokens=(200, 200)),
    Traffic(title="answers of 100 to 300 tokens", tokens=(100, 300)),
    Traffic(title="the same, in three priorities", tokens=(100, 300), priorities=("high", "normal", "normal", "low")),
)


@attrs.frozen(kw_only=True)
class Wait:
    """One request's."""

    number: int
    estimate_ms: float | None
    actual_ms: float


def one(peer: Peer, number: int, tokens: int, priority: str) -> Wait:
    """Ask, and read what was said of the wait."""
    connection = http.client.HTTPConnection(peer.target, timeout=300)
    body = {"model": "tiny", "prompt": f"{number}", "max_tokens": tokens, "ignore_eos": True}
    headers = {"x-request-deadline-ms": str(PATIENT_MS), "x-request-priority": priority}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json", **headers})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit(f"{peer.target} answered {answer.status}")
        estimate = answer.headers.get("x-queue-estimate-ms")
        return Wait(
            number=number,
            estimate_ms=None if estimate is None else float(estimate),
            actual_ms=float(answer.headers["x-queue-time-ms"]),
        )
    finally:
        connection.close()


def service_seconds(peer: Peer, tokens: int) -> float:
    """What an answer takes when all slots are at work."""
    began = time.perf_counter()
    rounds = 5
    threads = [
        threading.Thread(target=lambda: [one(peer, 0, tokens, "normal") for _ in range(rounds)]) for _ in range(SLOTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - began) / rounds


def waits(peer: Peer, traffic: Traffic, seconds: float) -> list[Wait]:
    """Those of all requests that came in so many seconds."""
    chance = random.Random(3)
    rate = LOAD * SLOTS / service_seconds(peer, sum(traffic.tokens) // 2)
    found: list[Wait] = []
    threads = []
    over = time.monotonic() + seconds
    number = 0
    while time.monotonic() < over:
        tokens, priority = chance.randint(*traffic.tokens), chance.choice(traffic.priorities)
        thread = threading.Thread(
            target=lambda n=number, t=tokens, p=priority: found.append(one(peer, n, t, p))  # type: ignore[misc]
        )
        thread.start()
        threads.append(thread)
        number += 1
        time.sleep(chance.expovariate(rate))  # arrivals; each request has a thread
    for thread in threads:
        thread.join()
    return found


def run(report: Report) -> None:
    real = what_is_real(report)
    if real is None:
        return
    server, tokenizer = real
    rows = []
    errors: list[float] = []
    with ExitStack() as stack:
        place = stack.enter_context(a_place(report.options.cores))
        model = write_tiny_llama(place.folder / "tiny.gguf", tokenizer_from=tokenizer)
        flags = ["-t", "1", "-np", str(SLOTS), "-c", str(SLOTS * 1024), "--no-webui"]
        peer = stack.enter_context(
            trio_router(
                place,
                models={"tiny": {"model_path": model, "flags": flags}},
                system={"llama_server_path": server.path},
                body={"model": "tiny", "prompt": "x", "max_tokens": 1},
                path="/v1/completions",
            )
        )
        for traffic in TRAFFIC:
            ask(peer.target, "/v1/models/eject", {"model": "tiny"})
            ask(peer.target, "/v1/models/load", {"model": "tiny"})
            found = waits(peer, traffic, 20 if report.options.quick else 90)
            judged = [
                (wait.estimate_ms, wait.actual_ms)
                for wait in found
                if wait.estimate_ms is not None and wait.actual_ms >= LEAST_WAIT_MS and wait.number > LEARNED
            ]
            found_errors = [abs(estimate - actual) / actual for estimate, actual in judged]
            errors += found_errors
            error = median(found_errors)
            rows.append(
                {
                    "what": traffic.title,
                    "requests": len(found),
                    "waited": len(judged),
                    "median wait ms": median(actual for _, actual in judged),
                    "median error %": None if error is None else 100 * error,
                    "estimate over wait, median": median(estimate / actual for estimate, actual in judged),
                }
            )
    report.bars.append(
        Bar(
            name="median error of an estimate",
            measured=None if not errors else 100 * statistics.median(errors),
            unit="%",
            at_most=25,
        )
    )
    report.table(f"expected and real waits, {SLOTS} slots, {LOAD:.0%} of what they can do", rows)


if __name__ == "__main__":
    main("estimates", __doc__ or "", run)
