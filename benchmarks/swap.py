"""Two real models in turn with room for one: what a request that needs a swap waits for.

Held against llama-server itself: how long one takes to stop when told to, and the other from its spawn to its first
200 on `/health`. Nothing is pinned: a real swap has the machine's cores.
"""

import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs

from benchmarks.machine import until_quiet
from benchmarks.peers import Place, a_place, ask, environment, free_port, llama_server_router, trio_router
from benchmarks.real import what_is_real
from benchmarks.report import Bar, Report, main, median
from tests.harness.tiny_gguf import write_tiny_llama
from trio_router.config import LlamaServer

FLAGS = ["-t", "1", "--parallel", "1", "-c", "512", "--no-webui"]
LOOK_SECONDS = 0.001


@attrs.frozen(kw_only=True)
class Own:
    """What llama-server takes by itself, seconds."""

    ready: float
    stop: float


def own_times(server: LlamaServer, model: Path, place: Place) -> Own:
    """Start one as a router does, look at it every millisecond, stop it."""
    where = place.folder / f"own-{free_port()}.sock"
    command = [server.path, "--host", where, "--model", model, "--alias", "own", "--metrics", *FLAGS]
    began = time.perf_counter()
    with place.log("own").open("ab") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, env=environment(server))
    try:
        while True:
            try:
                if where.exists() and ask(str(where), "/health", seconds=5)[0] == 200:
                    break
            except OSError:
                pass
            if process.poll() is not None:
                raise SystemExit(
                    f"llama-server ended with {process.returncode}: {place.log('own').read_text()[-1000:]}"
                )
            time.sleep(LOOK_SECONDS)  # llama-server has to be asked
        ready = time.perf_counter() - began
        told = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        return Own(ready=ready, stop=time.perf_counter() - told)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def request_seconds(target: str, alias: str) -> float:
    began = time.perf_counter()
    status, body = ask(target, "/tokenize", {"model": alias, "content": "hello"})
    if status != 200:
        raise SystemExit(f"{target} answered {status}: {body[:300]!r}")
    return time.perf_counter() - began


def run(report: Report) -> None:
    real = what_is_real(report)
    if real is None:
        return
    server, tokenizer = real
    aliases = ("one", "two")
    with ExitStack() as stack:
        place = stack.enter_context(a_place(None))
        models = {
            alias: write_tiny_llama(place.folder / f"{alias}.gguf", tokenizer_from=tokenizer, seed=seed)
            for seed, alias in enumerate(aliases)
        }
        first: dict[str, Any] = {"model": "two", "content": "hello"}
        ours = stack.enter_context(
            trio_router(
                place,
                models={alias: {"model_path": model, "flags": FLAGS} for alias, model in models.items()},
                system={"llama_server_path": server.path, "max_concurrent_models": 1},
                body=first,
                path="/tokenize",
            )
        )
        theirs = stack.enter_context(
            llama_server_router(place, server, models, FLAGS, most=1, body=first, path="/tokenize")
        )
        own: list[Own] = []
        swaps: dict[str, list[float]] = {ours.name: [], theirs.name: []}
        over: list[float] = []
        for number in range(6 if report.options.quick else 20):
            alias = aliases[number % 2]
            until_quiet(report.options.patience_seconds)
            own.append(own_times(server, models[alias], place))
            for peer in (ours, theirs) if number % 2 else (theirs, ours):
                swaps[peer.name].append(request_seconds(peer.target, alias))
            over.append(swaps[ours.name][-1] - own[-1].ready - own[-1].stop)
    ready, stopped = median(each.ready for each in own), median(each.stop for each in own)
    assert ready is not None
    assert stopped is not None
    table = [
        {"what": "llama-server: SIGTERM to exit", "median ms": stopped * 1e3},
        {"what": "llama-server: spawn to ready", "median ms": ready * 1e3},
    ]
    for name, seconds in swaps.items():
        middle = median(seconds)
        assert middle is not None
        table.append(
            {
                "what": f"a request that swaps: {name}",
                "median ms": middle * 1e3,
                "least ms": min(seconds) * 1e3,
                "most ms": max(seconds) * 1e3,
                "over stop + ready ms": (middle - ready - stopped) * 1e3,
            }
        )
    report.table("two models of 8 MB in turn, room for one", table)
    swap, its = median(swaps[ours.name]), median(swaps[theirs.name])
    middle_over = median(over)
    report.bars += [
        Bar(
            name="a swap over llama-server's own stop + spawn to ready",
            measured=None if middle_over is None else middle_over * 1e3,
            unit="ms",
            at_most=50,
        ),
        Bar(
            name="a swap over llama-server's router's",
            measured=swap / its if swap and its else None,
            unit="",
            at_most=1.0,
        ),
    ]


if __name__ == "__main__":
    main("swap", __doc__ or "", run)
