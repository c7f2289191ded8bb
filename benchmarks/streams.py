"""What a stream pays for the way through a router: its first byte, each event's delay, and what it costs the router.

Paced, as a model's tokens come (20 events a second each), and as fast as they go.
"""

import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import attrs

from benchmarks.machine import find_nginx, in_quiet, resident_bytes, usage
from benchmarks.peers import MODEL, Peer, a_place, find_llama_swap, llama_swap, mock, nginx, trio_router
from benchmarks.programs import Load, finish
from benchmarks.report import Bar, Report, main, median

EVENTS_PER_SECOND = 20
OURS, OURS_TCP, DIRECT = "trio_router", "trio_router tcp", "direct"
MANY = 1000


@attrs.frozen(kw_only=True)
class Paced:
    """One run of paced streams through one peer, from the second in which all have begun to nearly their end."""

    result: dict[str, Any]
    core: float
    """Share of a core that the server used."""
    cpu_us: float
    """Of the server, for each event."""
    resident: int
    others: float
    """Cores' worth of time that others used."""


def paced(report: Report, peer: Peer, streams: int, seconds: float) -> Paced:
    ramp = 1.0
    load = Load(
        mode="streams", target=peer.target, connections=streams, rate=EVENTS_PER_SECOND, ramp=ramp,
        warmup=0.0,
        chunks=int(seconds * EVENTS_PER_SECOND),
        body={"model": MODEL, "stream": True, "mock_rate": EVENTS_PER_SECOND, "mock_chunks": int(seconds * EVENTS_PER_SECOND)},
    )  # fmt: skip
    process = load.start(report.options.cores.load)
    time.sleep(ramp + 0.4)  # until all have begun
    before = usage(peer.pids)
    time.sleep(seconds - ramp - 0.6)  # what is measured
    used = usage(peer.pids).since(before)
    resident = resident_bytes(peer.pids)
    result = finish(process)
    return Paced(
        result=result,
        core=used.cpu_seconds / used.at,
        cpu_us=used.cpu_seconds / used.at / (streams * EVENTS_PER_SECOND) * 1e6,
        resident=resident,
        others=used.others,
    )


def all_paced(report: Report, peers: list[Peer]) -> None:
    quick = report.options.quick
    seconds = 4.0 if quick else 6.0
    table = []
    runs: dict[tuple[str, int], list[Paced]] = {}
    for streams in (64, 256, MANY):
        for turn in range(2 if quick else 3):
            for peer in peers if turn % 2 == 0 else peers[::-1]:
                run = in_quiet(partial(paced, report, peer, streams, seconds), report.options.patience_seconds)
                runs.setdefault((peer.name, streams), []).append(run)
        for peer in peers:
            these = runs[peer.name, streams]
            direct = peer.name == DIRECT
            table.append(
                {
                    "streams": streams,
                    "via": peer.name,
                    "delivered/offered": median(run.result["events"] / run.result["offered"] for run in these),
                    "first byte +p50 us": added(runs, peer.name, streams, "first_us", "p50"),
                    "+p99 us": added(runs, peer.name, streams, "first_us", "p99"),
                    "event delay +p50 us": added(runs, peer.name, streams, "delay_us", "p50"),
                    "its +p99 us": added(runs, peer.name, streams, "delay_us", "p99"),
                    "delay p99 us": median(run.result["delay_us"]["p99"] for run in these),
                    "core": None if direct else median(run.core for run in these),
                    "cpu us/event": None if direct else median(run.cpu_us for run in these),
                    "RSS MB": None if direct else median(run.resident / 1e6 for run in these),
                    "others": median(run.others for run in these),
                    "errors": sum(run.result["errors"] for run in these),
                }
            )
    report.table(f"streams of {EVENTS_PER_SECOND} events a second; + is over the direct way", table)
    ours = next(row for row in table if row["via"] == OURS and row["streams"] == MANY)

    def thousand(value: float | None) -> float | None:
        return None if value is None else value / 1000

    report.bars += [
        Bar(name="1,000 streams: delivered", measured=ours["delivered/offered"], unit="of offered", at_least=0.999),
        Bar(name="1,000 streams: processor", measured=ours["core"], unit="core", at_most=0.65),
        Bar(
            name="1,000 streams: first byte +p50", measured=thousand(ours["first byte +p50 us"]), unit="ms", at_most=0.5
        ),
        Bar(name="1,000 streams: first byte +p99", measured=thousand(ours["+p99 us"]), unit="ms", at_most=3),
        Bar(
            name="1,000 streams: event delay +p50",
            measured=thousand(ours["event delay +p50 us"]),
            unit="ms",
            at_most=0.1,
        ),
        Bar(name="1,000 streams: event delay p99", measured=thousand(ours["delay p99 us"]), unit="ms", at_most=1.5),
        Bar(name="1,000 streams: RSS", measured=ours["RSS MB"], unit="MB", at_most=75),
    ]


def added(runs: dict[tuple[str, int], list[Paced]], name: str, streams: int, what: str, which: str) -> float | None:
    """Microseconds over the direct way in the same round, the median of the rounds."""
    if name == DIRECT:
        return None
    pairs = zip(runs[name, streams], runs[DIRECT, streams], strict=True)
    return median(
        through.result[what][which] - direct.result[what][which]
        for through, direct in pairs
        if through.result[what] and direct.result[what]
    )


def full_speed(report: Report, peers: list[Peer]) -> None:
    quick = report.options.quick
    table = []
    for streams in (16, 256):
        found: dict[str, list[tuple[float, float, float]]] = {}
        for turn in range(3 if quick else 5):
            for peer in peers if turn % 2 == 0 else peers[::-1]:
                load = Load(
                    mode="streams", target=peer.target, connections=streams, loop=True,
                    seconds=1.0 if quick else 2.0, warmup=0.3,
                    body={"model": MODEL, "stream": True, "mock_rate": 0, "mock_chunks": 2000},
                )  # fmt: skip
                run = load.run_in_quiet(report.options.cores, peer.pids, report.options.patience_seconds)
                # of the whole run, the warm-up included: events that came, by their bytes
                events = run.result["bytes"] / 275
                cpu = run.used.cpu_seconds / max(events, 1) * 1e6
                found.setdefault(peer.name, []).append((run.result["events_per_second"], cpu, run.others))
        for name, runs in found.items():
            direct = name.startswith(DIRECT)
            table.append(
                {
                    "streams": streams,
                    "via": name,
                    "events/s": median(rate for rate, _, _ in runs),
                    "cpu us/event": None if direct else median(cpu for _, cpu, _ in runs),
                    "others": median(others for _, _, others in runs),
                }
            )
    report.table("streams at full speed", table)

    def events(name: str) -> float:
        return float(next(row["events/s"] for row in table if row["via"] == name and row["streams"] == 16))

    report.bars += [
        Bar(
            name="full speed, 16 streams, backend on TCP", measured=events(OURS_TCP), unit="events/s", at_least=220_000
        ),
        Bar(
            name="full speed, 16 streams, backend on a Unix socket",
            measured=events(OURS),
            unit="events/s",
            at_least=400_000,
        ),
    ]


def run(report: Report) -> None:
    with ExitStack() as stack:
        place = stack.enter_context(a_place(report.options.cores))
        direct = stack.enter_context(mock(place))
        unix = stack.enter_context(mock(place, unix=True))
        ours = stack.enter_context(trio_router(place))
        over_tcp = stack.enter_context(trio_router(place, name=OURS_TCP, system={"backend_transport": "tcp"}))
        others = []
        if find_nginx():
            others.append(stack.enter_context(nginx(place, direct)))
        if find_llama_swap():
            others.append(stack.enter_context(llama_swap(place)))
        only = report.options.only
        if not only or "paced" in only:
            all_paced(report, [direct, ours, *others])
        if not only or "full" in only:
            full_speed(report, [direct, unix, ours, over_tcp, *others])


if __name__ == "__main__":
    main("streams", __doc__ or "", run)
