"""Who runs next: three models of 8 MB, room for one, requests at random; and two clients of one model.

`router`: held against llama-server's own router mode, as it is. That one has no queue: it kills a model that is still being
loaded when another is asked for ("is still loading, force-killing"), and tells those who waited that it "failed to load";
its clients try again as OpenAI's do, and its errors are counted. Beside it the same with a queue of ours in its clients,
which ask for one model at a time, whose oldest request is oldest: then it answers all of them. That is the order of our
own policy where loads take less than a second, so loads and times differ by what a load takes, and no bar is set.
`slow`: a load takes two seconds more, as that of a big model
does; held against our own first-come, that is `min_turn_sec = 0`. `priority`: high and low, with such loads.
`shares`: a client with ten requests at a time beside one with a tenth of its load.
"""

import http.client
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs

from benchmarks.peers import Peer, Place, a_place, ask, llama_server_router, trio_router
from benchmarks.real import what_is_real
from benchmarks.report import Bar, Report, main
from tests.harness.tiny_gguf import write_tiny_llama
from trio_router.config import LlamaServer

FLAGS = ["-t", "1", "--parallel", "1", "-c", "512", "--no-webui"]
PATH = "/v1/completions"
ALIASES = ("one", "two", "three")
SLOW_SECONDS = 2.0
AGAIN_SECONDS = (0.5, 8.0)
"""After an error a request is sent again as OpenAI's clients do: after so long at first, twice that each time, at most."""
PATIENCE_SECONDS = 30.0
"""So long after the last request was sent, none is sent again."""
SEED = 11


@attrs.frozen(kw_only=True)
class Request:
    """One that is to be sent."""

    at: float
    """Seconds from the start."""
    alias: str
    priority: str = "normal"


@attrs.frozen(kw_only=True)
class Answer:
    """What became of it."""

    request: Request
    seconds: float
    """To its answer, which is one token."""
    errors: int = 0
    """How many times it was answered with an error, and sent again."""
    given_up: bool = False
    """There was none."""


@attrs.define(eq=False)
class OneModel:
    """Lets requests for one model through at a time: a queue for a server that has none."""

    current: str = ""
    under_way: int = 0
    waiting: list[object] = attrs.field(factory=list)
    _changed: threading.Condition = attrs.field(factory=threading.Condition)

    @contextmanager
    def through(self, alias: str) -> Iterator[None]:
        """Wait until no other model has requests; then who has waited longest decides which is next."""
        place = object()
        with self._changed:
            self.waiting.append(place)
            while not (self.current == alias if self.under_way else self.waiting[0] is place):
                self._changed.wait()
            self.waiting.remove(place)
            self.current = alias
            self.under_way += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.under_way -= 1
                self._changed.notify_all()


def at_random(count: int, rate: float, aliases: tuple[str, ...], seed: int, priority: str = "normal") -> list[Request]:
    """So many at Poisson times, each for any of the models."""
    chance = random.Random(seed)
    at = 0.0
    requests = []
    for _ in range(count):
        at += chance.expovariate(rate)
        requests.append(Request(at=at, alias=chance.choice(aliases), priority=priority))
    return requests


def body(alias: str, tokens: int = 1) -> dict[str, Any]:
    return {"model": alias, "prompt": "hello", "max_tokens": tokens, "temperature": 0}


def send(
    target: str, what: Mapping[str, Any], *, priority: str = "normal", source: str = "127.0.0.1"
) -> tuple[int, float]:
    """One request: the status of its answer, and how long that took."""
    host, _, port = target.rpartition(":")
    began = time.perf_counter()
    connection = http.client.HTTPConnection(host, int(port), timeout=600, source_address=(source, 0))
    try:
        headers = {"Content-Type": "application/json", "X-Request-Priority": priority}
        connection.request("POST", PATH, json.dumps(what), headers)
        answer = connection.getresponse()
        answer.read()
    finally:
        connection.close()
    return answer.status, time.perf_counter() - began


def play(target: str, requests: list[Request], gate: OneModel | None = None) -> list[Answer]:
    """Send each at its time, whatever became of those before, and again until it is answered or patience ends."""
    answers: list[Answer] = []
    began = time.perf_counter()
    chance = random.Random(SEED)

    def one(request: Request) -> None:
        time.sleep(max(0.0, began + request.at - time.perf_counter()))  # arrivals; each request has a thread
        sent, errors = time.perf_counter(), 0
        with gate.through(request.alias) if gate is not None else nullcontext():
            while not (answered := send(target, body(request.alias), priority=request.priority)[0] == 200):
                first, most = AGAIN_SECONDS
                pause = min(most, first * 2**errors) * chance.uniform(0.75, 1.0)
                errors += 1
                if time.perf_counter() + pause > began + requests[-1].at + PATIENCE_SECONDS:
                    break
                time.sleep(pause)
        seconds = time.perf_counter() - sent
        answers.append(Answer(request=request, seconds=seconds, errors=errors, given_up=not answered))

    threads = [threading.Thread(target=one, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def share(values: list[float], part: float) -> float:
    """The value that `part` of all are at most."""
    ordered = sorted(values)
    return ordered[max(0, round(part * len(ordered)) - 1)]


# --- how often models were loaded -------------------------------------------------------------------


def our_loads(peer: Peer) -> int:
    _, text = ask(peer.target, "/metrics")
    lines = [line for line in text.decode().splitlines() if line.startswith("router_model_loads_total{")]
    return round(sum(float(line.rpartition(" ")[2]) for line in lines))


def router_loads(place: Place) -> Callable[[Peer], int]:
    """By the log of llama-server's router, which says so of each child."""
    return lambda peer: place.log(peer.name).read_text(errors="replace").count("spawning server instance")


# --- the parts --------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Bench:
    """What every part needs."""

    report: Report
    server: LlamaServer
    place: Place
    models: Mapping[str, Path]

    @property
    def requests(self) -> int:
        return 30 if self.report.options.quick else 100

    @property
    def few_requests(self) -> int:
        """Where each may cost a load that takes seconds."""
        return 30 if self.report.options.quick else 50

    def slow_server(self) -> Path:
        """A llama-server whose loads take two seconds more."""
        path = self.place.folder / "slow-llama-server"
        path.write_text(f'#!/bin/sh\nsleep {SLOW_SECONDS}\nexec "{self.server.path}" "$@"\n')
        path.chmod(0o755)
        return path

    def ours(self, name: str, path: Path, **system: Any) -> Any:
        return trio_router(
            self.place,
            name=name,
            models={alias: {"model_path": model, "flags": FLAGS} for alias, model in self.models.items()},
            system={"llama_server_path": path, "max_concurrent_models": 1, "queue_timeout_sec": 600, **system},
            body=body(ALIASES[0]),
            path=PATH,
        )


@attrs.frozen(kw_only=True)
class Run:
    """What one server did with one load."""

    loads: int
    answers: list[Answer]

    def p(self, part: float) -> float:
        """Of the times to an answer; who has none counts with the time it took to see that."""
        return share([answer.seconds for answer in self.answers], part)

    def row(self, name: str) -> dict[str, Any]:
        errors = sum(answer.errors for answer in self.answers)
        times = {"p50 s": self.p(0.5), "p95 s": self.p(0.95), "most s": self.p(1.0)}
        unanswered = sum(answer.given_up for answer in self.answers)
        return {"": name, "loads": self.loads, **times, "errors": errors, "never answered": unanswered}


def measured(peer: Peer, loads: Callable[[Peer], int], requests: list[Request], gate: OneModel | None = None) -> Run:
    before = loads(peer)
    answers = play(peer.target, requests, gate)
    return Run(loads=loads(peer) - before, answers=answers)


def beside_router(bench: Bench) -> None:
    loads = router_loads(bench.place)
    for rate in (3.0, 10.0):
        requests = at_random(bench.requests, rate, ALIASES, SEED)
        with bench.ours("trio_router", bench.server.path) as peer:
            ours = measured(peer, our_loads, requests)
        rows = [ours.row("trio_router")]
        for name, gate in (("llama-server router", None), ("the same, asked for one model at a time", OneModel())):
            start = llama_server_router(
                bench.place, bench.server, bench.models, FLAGS, most=1, body=body(ALIASES[0]), path=PATH
            )
            with start as peer:
                theirs = measured(peer, loads, requests, gate)
            rows.append(theirs.row(name))
            if gate is None:
                bench.report.bars += [
                    Bar(
                        name=f"{rate:g}/s: loads over its router's",
                        measured=ours.loads / theirs.loads,
                        unit="",
                        at_most=0.6,
                    ),
                    Bar(
                        name=f"{rate:g}/s: p95 over its router's",
                        measured=ours.p(0.95) / theirs.p(0.95),
                        unit="",
                        at_most=1,
                    ),
                ]
        bench.report.table(f"{len(requests)} requests, {rate:g}/s, three models, room for one", rows)


def slow_loads(bench: Bench) -> None:
    requests = at_random(bench.few_requests, 3.0, ALIASES, SEED)
    runs = {}
    for name, system in (("turns", {}), ("first come", {"min_turn_sec": 0})):
        with bench.ours(name, bench.slow_server(), **system) as peer:
            runs[name] = measured(peer, our_loads, requests)
    bench.report.table(
        f"{len(requests)} requests, 3/s, three models whose loads take 2 s more, room for one",
        [run.row(name) for name, run in runs.items()],
    )
    turns, first = runs["turns"], runs["first come"]
    bench.report.bars += [
        Bar(name="slow loads: first come's loads over ours", measured=first.loads / turns.loads, unit="", at_least=3),
        Bar(name="slow loads: p95 over first come's", measured=turns.p(0.95) / first.p(0.95), unit="", at_most=0.5),
    ]


def priorities(bench: Bench) -> None:
    aging = 5.0
    low = at_random(bench.few_requests, 2.0, ALIASES[1:], SEED, "low")
    high = [
        attrs.evolve(request, at=request.at + 3.0)
        for request in at_random(max(8, bench.few_requests // 4), 0.25, ALIASES[:1], SEED + 1, "high")
    ]
    end = low[-1].at
    with bench.ours("priority", bench.slow_server(), aging_sec=aging) as peer:
        run = measured(peer, our_loads, sorted([*low, *(each for each in high if each.at < end)], key=lambda r: r.at))
        load = bench_load_seconds(peer)
    seconds = {
        name: [answer.seconds for answer in run.answers if answer.request.priority == name] for name in ("high", "low")
    }
    # until it is as good as any high: two agings; then one turn and load of each model, its own load too
    bound = 2 * aging + len(ALIASES) * 2 * load + load
    bench.report.table(
        "low at random over two models, high for a third, loads take 2 s more",
        [
            {
                "": name,
                "requests": len(each),
                "p50 s": share(each, 0.5),
                "p95 s": share(each, 0.95),
                "most s": max(each),
            }
            for name, each in seconds.items()
        ]
        + [{"": "one load", "p50 s": load}],
    )
    bench.report.bars += [
        Bar(name="high: p95 first token, in loads", measured=share(seconds["high"], 0.95) / load, unit="", at_most=1.5),
        Bar(name="low: longest wait over its bound", measured=max(seconds["low"]) / bound, unit="", at_most=1),
    ]


def bench_load_seconds(peer: Peer) -> float:
    """The median of what loads took, as the router has it."""
    _, text = ask(peer.target, "/v1/models/status")
    found = [one["load_duration_sec"] for one in json.loads(text)["models"].values()]
    return statistics.median(seconds for seconds in found if seconds is not None)


@contextmanager
def crowd(target: str, what: Mapping[str, Any], size: int) -> Iterator[None]:
    """So many requests at a time, of one client at another address."""
    over = threading.Event()

    def ask_again() -> None:
        while not over.is_set():
            send(target, what, source="127.0.0.2")

    threads = [threading.Thread(target=ask_again) for _ in range(size)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def now_and_then(target: str, what: Mapping[str, Any], count: int, pause: float) -> list[float]:
    """What so many requests take that come at random, about so many seconds after the last."""
    chance = random.Random(SEED)
    found = []
    for _ in range(count):
        time.sleep(chance.expovariate(1 / pause))
        found.append(send(target, what)[1])
    return found


def shares(bench: Bench) -> None:
    what = body(ALIASES[0], tokens=48)
    count = 20 if bench.report.options.quick else 60
    with bench.ours("shares", bench.server.path) as peer:
        usual = statistics.median(send(peer.target, what)[1] for _ in range(10))
        # a tenth of what the other has: it would have half of it if it asked again at once
        alone = now_and_then(peer.target, what, count, 9 * usual)
        with crowd(peer.target, what, 10):
            beside = now_and_then(peer.target, what, count, 9 * usual)
    bench.report.table(
        "one client with a request now and then, one slot",
        [
            {"": name, "p50 ms": share(each, 0.5) * 1e3, "p95 ms": share(each, 0.95) * 1e3}
            for name, each in (("alone", alone), ("beside one with ten at a time", beside))
        ],
    )
    ratio = share(beside, 0.95) / share(alone, 0.95)
    bench.report.bars.append(Bar(name="the light client's p95 over its own alone", measured=ratio, unit="", at_most=2))


PARTS = {"router": beside_router, "slow": slow_loads, "priority": priorities, "shares": shares}


def run(report: Report) -> None:
    real = what_is_real(report)
    if real is None:
        return
    server, tokenizer = real
    with ExitStack() as stack:
        place = stack.enter_context(a_place(None))
        models = {
            alias: write_tiny_llama(place.folder / f"{alias}.gguf", tokenizer_from=tokenizer, seed=seed)
            for seed, alias in enumerate(ALIASES)
        }
        bench = Bench(report=report, server=server, place=place, models=models)
        for name, part in PARTS.items():
            if not report.options.only or name in report.options.only:
                part(bench)


if __name__ == "__main__":
    main("turns", __doc__ or "", run)
