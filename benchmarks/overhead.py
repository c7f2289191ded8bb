"""What a request pays for the way through a router: latency, requests a second, processor time.

On the mock backend (nothing is computed, so nothing hides the way), and on a real llama-server's `/tokenize`.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks.machine import find_nginx
from benchmarks.peers import (
    MODEL,
    Peer,
    Place,
    a_place,
    bare_trio,
    find_llama_swap,
    llama_server,
    llama_server_router,
    llama_swap,
    mock,
    nginx,
    trio_router,
)
from benchmarks.programs import Load, Measured, finish
from benchmarks.real import what_is_real
from benchmarks.report import Bar, Report, main, median
from tests.harness.tiny_gguf import write_tiny_llama

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "How much does the way through a router cost?"}]}
TOKENIZE = {"model": MODEL, "content": "How much does the way through a router cost?"}
CHILD_FLAGS = ["-t", "1", "--parallel", "64", "-c", "8192", "--no-webui"]
OURS, DIRECT, CPP, SWAP = "trio_router", "direct", "llama-server router", "llama-swap"

Runs = dict[tuple[str, int], list[Measured]]


def rounds(report: Report, peers: list[Peer], load: Load, connections: list[int], count: int) -> Runs:
    """Every peer with every number of connections, in turn, `count` times over."""
    runs: Runs = {}
    for turn in range(count):
        order = peers if turn % 2 == 0 else peers[::-1]
        for number in connections:
            for peer in order:
                this = Load(
                    mode="closed", target=peer.target, connections=number, body=load.body, path=load.path,
                    seconds=load.seconds, warmup=load.warmup,
                )  # fmt: skip
                runs.setdefault((peer.name, number), []).append(
                    this.run_in_quiet(report.options.cores, peer.pids, report.options.patience_seconds)
                )
    return runs


def added(runs: Runs, name: str, number: int, which: str = "p50") -> float | None:
    """Microseconds over the direct way in the same round, the median of the rounds."""
    pairs = zip(runs.get((name, number), []), runs.get((DIRECT, number), []), strict=False)
    return median(
        through.result["latency_us"][which] - direct.result["latency_us"][which]
        for through, direct in pairs
        if through.result["latency_us"] and direct.result["latency_us"]
    )


def rate(runs: Runs, name: str, number: int) -> float | None:
    return median(run.result["per_second"] for run in runs.get((name, number), []))


def rows(runs: Runs, peers: list[Peer], connections: list[int]) -> list[dict[str, Any]]:
    found = []
    for number in connections:
        ours = rate(runs, OURS, number)
        for peer in peers:
            these = runs[peer.name, number]
            here = rate(runs, peer.name, number)
            latencies = [run.result["latency_us"] for run in these if run.result["latency_us"]]
            cpu = median(run.cpu_us for run in these)
            direct = peer.name.startswith(DIRECT)
            found.append(
                {
                    "at once": number,
                    "via": peer.name,
                    "requests/s": here,
                    "ours/its": ours / here if ours and here else None,
                    "p50 us": median(each["p50"] for each in latencies),
                    "p99 us": median(each["p99"] for each in latencies),
                    "added p50 us": None if direct else added(runs, peer.name, number),
                    "added p99 us": None if direct else added(runs, peer.name, number, "p99"),
                    "cpu us": None if direct else cpu,
                    "others": median(run.others for run in these),
                    "errors": sum(run.result["errors"] for run in these),
                }
            )
    return found


def on_mock(report: Report) -> None:
    quick = report.options.quick
    connections = [1, 16, 64, 256]
    with ExitStack() as stack:
        place = stack.enter_context(a_place(report.options.cores))
        direct = stack.enter_context(mock(place))
        peers = [
            direct,
            stack.enter_context(trio_router(place)),
            stack.enter_context(trio_router(place, name="trio_router tcp", system={"backend_transport": "tcp"})),
        ]
        if find_nginx():
            unix = stack.enter_context(mock(place, unix=True))
            peers += [
                stack.enter_context(nginx(place, direct)),
                stack.enter_context(nginx(place, unix, name="nginx unix")),
            ]
        else:
            report.note("no nginx here")
        if find_llama_swap():
            peers.append(stack.enter_context(llama_swap(place)))
        load = Load(mode="closed", target="", connections=0, body=CHAT, seconds=0.8 if quick else 2.0, warmup=0.2)
        runs = rounds(report, peers, load, connections, 3 if quick else 5)
        report.table("mock backend", rows(runs, peers, connections))
        big_body(report, [peer for peer in peers if peer.name in {DIRECT, OURS, "nginx", SWAP}])
    first = added(runs, OURS, 1)
    report.bars += [
        Bar(name="added p50, one at a time, mock", measured=first, unit="us", at_most=150),
        Bar(name="requests/s, 16 at once, mock", measured=rate(runs, OURS, 16), unit="/s", at_least=9000),
        Bar(name="requests/s, 256 at once, mock", measured=rate(runs, OURS, 256), unit="/s", at_least=8000),
    ]
    if find_nginx():
        # figures drift between machines, their ratios hardly: the same bars over nginx's 75,000 where they were set
        for number, least in ((16, 9 / 75), (256, 8 / 75)):
            report.bars.append(times(runs, number, "nginx", least, "mock"))
    if find_llama_swap():
        for number in (16, 64, 256):
            report.bars.append(times(runs, number, SWAP, 2.0, "mock"))
        theirs = added(runs, SWAP, 1)
        ratio = first / theirs if first and theirs else None
        report.bars.append(Bar(name="added p50 over llama-swap's", measured=ratio, unit="", at_most=0.5))


def times(runs: Runs, number: int, other: str, least: float, what: str) -> Bar:
    ours, its = rate(runs, OURS, number), rate(runs, other, number)
    ratio = ours / its if ours and its else None
    return Bar(
        name=f"requests/s over {other}'s, {number} at once, {what}", measured=ratio, unit="times", at_least=least
    )


def big_body(report: Report, peers: list[Peer]) -> None:
    """Small requests on 64 connections, 1,000 a second in all, while one client sends 5 MB after 5 MB."""
    quick, cores = report.options.quick, report.options.cores
    seconds = 1.5 if quick else 4.0
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(3 if quick else 5):
        for peer in peers:
            large = Load(
                mode="closed", target=peer.target, connections=1, body=CHAT, seconds=seconds + 0.5, warmup=0.1,
                padding_bytes=5_000_000,
            ).start(cores.load)  # fmt: skip
            small = Load(
                mode="closed", target=peer.target, connections=64, body=CHAT, seconds=seconds, warmup=0.3, rate=1000
            ).start(cores.load)
            result = finish(small)
            found.setdefault(peer.name, []).append({"small": result["latency_us"], "large": finish(large)})
    table = [
        {
            "via": name,
            "small p50 us": median(run["small"]["p50"] for run in runs),
            "small p99 us": median(run["small"]["p99"] for run in runs),
            "5 MB bodies/s": median(run["large"]["per_second"] for run in runs),
        }
        for name, runs in found.items()
    ]
    report.table("5 MB bodies beside 1,000 small requests a second on 64 connections", table)
    ours = next(row["small p99 us"] for row in table if row["via"] == OURS)
    report.bars.append(Bar(name="p99 of small requests beside a 5 MB body", measured=ours / 1000, unit="ms", at_most=6))


def on_tokenize(report: Report) -> None:
    """A real llama-server, asked for what costs it little."""
    quick = report.options.quick
    connections = [1, 16, 64]
    real = what_is_real(report)
    if real is None:
        return
    server, tokenizer = real
    with ExitStack() as stack:
        place: Place = stack.enter_context(a_place(report.options.cores))
        model = write_tiny_llama(place.folder / "tiny.gguf", tokenizer_from=tokenizer)
        direct = stack.enter_context(llama_server(place, server, model, CHILD_FLAGS))
        ours = partial(
            trio_router,
            place,
            models={MODEL: {"model_path": model, "flags": CHILD_FLAGS}},
            system={"llama_server_path": server.path},
            body=TOKENIZE,
            path="/tokenize",
        )
        peers = [
            direct,
            stack.enter_context(ours()),
            stack.enter_context(
                llama_server_router(place, server, {MODEL: model}, CHILD_FLAGS, most=1, body=TOKENIZE, path="/tokenize")
            ),
        ]
        if find_nginx():
            peers.append(stack.enter_context(nginx(place, direct)))
        peers.append(stack.enter_context(bare_trio(place, direct)))
        load = Load(
            mode="closed", target="", connections=0, body=TOKENIZE, path="/tokenize",
            seconds=0.8 if quick else 2.0, warmup=0.2,
        )  # fmt: skip
        runs = rounds(report, peers, load, connections, 3 if quick else 5)
        report.table("real llama-server, /tokenize", rows(runs, peers, connections))
    first, theirs = added(runs, OURS, 1), added(runs, CPP, 1)
    report.bars += [
        Bar(
            name=f"added p50 over {CPP}'s, one at a time, /tokenize",
            measured=first / theirs if first and theirs else None,
            unit="",
            at_most=0.25,
        ),
        times(runs, 16, CPP, 2.5, "/tokenize"),
        times(runs, 64, CPP, 2.5, "/tokenize"),
    ]


def run(report: Report) -> None:
    parts = {"mock": on_mock, "tokenize": on_tokenize}
    for name, part in parts.items():
        if not report.options.only or name in report.options.only:
            part(report)


if __name__ == "__main__":
    main("overhead", __doc__ or "", run)
