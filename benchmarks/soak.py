"""Half an hour of the same: what a router that runs for months must not do is grow.

Each round is a few seconds of requests, of streams, of clients that leave, of bad requests and of connections that say
nothing; after each, when all are gone, its memory and its open files are looked at. The mock backend answers.
"""

import contextlib
import http.client
import json
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from benchmarks.machine import resident_bytes
from benchmarks.peers import MODEL, Peer, a_place, ask, trio_router
from benchmarks.programs import Load, finish
from benchmarks.report import Bar, Report, main

SECONDS = 1800.0
QUICK_SECONDS = 90.0
STREAM = {"model": MODEL, "stream": True, "mock_rate": 20, "mock_chunks": 20}
SETTLE_SECONDS = 10.0


@attrs.frozen(kw_only=True)
class Look:
    """At a router that has nothing to do."""

    at: float
    resident_bytes: int
    files: int
    threads: int


def look(peer: Peer, since: float) -> Look:
    """Once the connections of the round are gone."""
    files = Path(f"/proc/{peer.pids[0]}/fd")
    give_up, open_files = time.monotonic() + SETTLE_SECONDS, len(list(files.iterdir()))
    while time.monotonic() < give_up:
        time.sleep(0.25)  # between two looks
        before, open_files = open_files, len(list(files.iterdir()))
        if before == open_files:
            break
    return Look(
        at=time.monotonic() - since,
        resident_bytes=resident_bytes(peer.pids),
        files=open_files,
        threads=len(list(Path(f"/proc/{peer.pids[0]}/task").iterdir())),
    )


def leave(peer: Peer) -> None:
    """Clients that go away while they wait, while they read, and before they have asked."""
    host, port = peer.target.split(":")
    raw = json.dumps(STREAM).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
    for cut in (0, len(head) // 2, len(head), len(head) + len(raw) // 2, len(head) + len(raw)):
        clients = [socket.create_connection((host, int(port))) for _ in range(20)]
        for client in clients:
            client.sendall((head + raw)[:cut])
        time.sleep(0.2)  # until the router has read what there is
        for client in clients:
            client.close()


def misbehave(peer: Peer) -> None:
    """Requests that are refused, by both ways in."""
    for _ in range(20):
        for path, body in (
            ("/v1/chat/completions", {"model": "unknown"}),
            ("/v1/chat/completions", {}),
            ("/v1/models/load", {"model": "unknown"}),
            ("/v1/nothing", {"model": MODEL}),
        ):
            with contextlib.suppress(http.client.HTTPException):
                ask(peer.target, path, body)
        ask(peer.target, "/v1/models/status")
        ask(peer.target, "/metrics")


def rounds(peer: Peer, seconds: float, core: int) -> list[Look]:
    """So many as fit."""
    began = time.monotonic()
    target = peer.target
    steps: list[Callable[[], object]] = [
        lambda: finish(Load(mode="closed", target=target, connections=16, body={"model": MODEL}).start(core)),
        lambda: finish(
            Load(mode="streams", target=target, connections=100, body=STREAM, rate=20, chunks=20, ramp=0.5).start(core)
        ),
        lambda: leave(peer),
        lambda: misbehave(peer),
    ]
    looks = []
    while time.monotonic() - began < seconds:
        for step in steps:
            step()
        looks.append(look(peer, began))
    return looks


def run(report: Report) -> None:
    """The whole."""
    seconds = QUICK_SECONDS if report.options.quick else SECONDS
    cores = report.options.cores
    with a_place(cores) as place, trio_router(place) as peer:
        looks = rounds(peer, seconds, cores.load)
    step = max(1, len(looks) // 15)
    report.table(
        "after so many minutes, with nothing to do",
        [
            {
                "minutes": each.at / 60,
                "RSS MB": each.resident_bytes / 1e6,
                "open files": each.files,
                "threads": each.threads,
            }
            for each in [*looks[::step], looks[-1]]
        ],
    )
    third = len(looks) // 3
    middle, last = looks[third : 2 * third], looks[2 * third :]
    grown = statistics.median(each.resident_bytes for each in last) - statistics.median(
        each.resident_bytes for each in middle
    )
    files = statistics.median(each.files for each in last) - statistics.median(each.files for each in middle)
    report.note(f"{len(looks)} rounds; the bars hold the last third of them against the third before")
    report.bars.append(Bar(name="memory grown", measured=grown / 1e6, unit="MB", at_most=0.5))
    report.bars.append(Bar(name="open files more", measured=files, unit="files", at_most=0))


if __name__ == "__main__":
    main("soak", str(__doc__).partition("\n")[0], run)
