"""What many cost: waiting requests, idle connections, readers of the status stream, configured models."""

import resource
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs

from benchmarks.machine import resident_bytes, until_quiet, usage
from benchmarks.peers import MODEL, Peer, Place, a_place, ask, trio_router
from benchmarks.programs import Load, compiled
from benchmarks.report import Bar, Report, main
from tests.harness.tiny_gguf import write_header_only

MANY = 10_000
BATCH = 500
ATTEMPTS = 300
BODY = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)
HELD = b'{"model":"m","mock_delay_ms":3600000}'
HOLD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(HELD), HELD)
)


@attrs.frozen(kw_only=True)
class Step:
    """What something changed in the router."""

    resident: int
    cpu_seconds: float


@contextmanager
def sockets() -> Iterator[list[socket.socket]]:
    """Those put in are closed at the end."""
    opened: list[socket.socket] = []
    try:
        yield opened
    finally:
        for sock in opened:
            sock.close()


def connect(peer: Peer, count: int, opened: list[socket.socket]) -> list[socket.socket]:
    host, _, port = peer.target.rpartition(":")
    new = []
    for number in range(count):
        sock = socket.create_connection((host, int(port)), timeout=30)
        new.append(sock)
        opened.append(sock)
        if number % 200 == 199:
            time.sleep(0.02)  # the backlog is not what is measured
    return new


def settle(peer: Peer) -> None:
    """Return when the router has had nothing to do for a while."""
    quiet = 0
    for _ in range(ATTEMPTS):
        before = usage(peer.pids)
        time.sleep(0.1)  # the time over which it is looked at
        quiet = quiet + 1 if usage(peer.pids).since(before).cpu_seconds < 0.004 else 0
        if quiet == 3:
            return
    raise SystemExit(f"{peer.name} does not come to rest")


@contextmanager
def step(peer: Peer) -> Iterator[list[Step]]:
    """What the block does to the router, once that is at rest again: put into the list at the end."""
    settle(peer)
    resident, before = resident_bytes(peer.pids), usage(peer.pids)
    found: list[Step] = []
    yield found
    settle(peer)
    used = usage(peer.pids).since(before)
    found.append(Step(resident=resident_bytes(peer.pids) - resident, cpu_seconds=used.cpu_seconds))


def connections(report: Report, place: Place) -> None:
    """1,000 idle connections."""
    with trio_router(place) as peer, sockets() as opened:
        with step(peer) as found:
            connect(peer, 1000, opened)
        before = usage(peer.pids)
        time.sleep(3.0)  # what is measured
        idle = usage(peer.pids).since(before)
    report.table(
        "1,000 idle connections",
        [
            {
                "bytes each": found[0].resident / 1000,
                "us to accept": found[0].cpu_seconds / 1000 * 1e6,
                "% of a core while idle": idle.cpu_seconds / idle.at * 100,
                "wake-ups/s": idle.wakeups / idle.at,
            }
        ],
    )


def queue(report: Report, place: Place) -> None:
    """10,000 requests behind one slot."""
    many = 2000 if report.options.quick else MANY
    model = write_header_only(place.folder / "one-slot.gguf")
    entry = {"model_path": model, "flags": ["--parallel", "1"]}
    system = {
        "llama_server_path": compiled("mock_backend"),
        "max_queue_size_per_model": MANY * 2,
        "queue_timeout_sec": 3600.0,
        "request_timeout_sec": 3600.0,
    }
    rows: list[dict[str, Any]] = []
    with trio_router(place, models={MODEL: entry}, system=system) as peer, sockets() as opened:
        connect(peer, 1, opened)[0].sendall(HOLD)
        clients = connect(peer, many + 10, opened)
        later = connect(peer, 2 * BATCH, opened)

        def send(some: list[socket.socket], waiting: int) -> Step:
            with step(peer) as found:
                for sock in some:
                    sock.sendall(REQUEST)
            rows.append(
                {
                    "waiting already": waiting,
                    "more": len(some),
                    "bytes each": found[0].resident / len(some),
                    "us each": found[0].cpu_seconds / len(some) * 1e6,
                }
            )
            return found[0]

        send(clients[:10], 0)
        few = send(later[:BATCH], 10)
        crowd = send(clients[10:], 10 + BATCH)
        crowded = send(later[BATCH:], 10 + BATCH + many)
        leave(report, peer, opened)
    report.table("requests that wait behind one slot (their connections were open before)", rows)
    report.bars += [
        Bar(name="a queued request", measured=crowd.resident / many, unit="bytes", at_most=4096 + len(BODY)),
        Bar(
            name=f"one more, with {many:,} waiting over with 10",
            measured=crowded.cpu_seconds / few.cpu_seconds,
            unit="times",
            at_most=1.3,
        ),
    ]


def leave(report: Report, peer: Peer, opened: list[socket.socket]) -> None:
    """All who wait go away at once: how long does anyone else wait?"""
    before = usage(peer.pids)
    for sock in opened:
        sock.close()
    began = time.perf_counter()
    ask(peer.target, "/health")
    stall = time.perf_counter() - began
    count = len(opened)
    opened.clear()
    settle(peer)
    used = usage(peer.pids).since(before)
    report.table(
        "all of them leave at once",
        [{"clients": count, "GET /health ms meanwhile": stall * 1e3, "us each": used.cpu_seconds / count * 1e6}],
    )


def readers(report: Report, place: Place) -> None:
    """500 readers of the status stream, while a model is loaded and ejected."""
    ask_for = b"GET /v1/models/status/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    count = 500
    with trio_router(place) as peer, sockets() as opened:
        with step(peer) as found:
            clients = connect(peer, count, opened)
            for sock in clients:
                sock.sendall(ask_for)
        poll = select.poll()
        for sock in clients:
            sock.setblocking(False)
            poll.register(sock, select.POLLIN)
        drained(clients)
        began, before = time.perf_counter(), usage(peer.pids)
        ask(peer.target, "/v1/models/eject", {"model": MODEL})
        told: set[int] = set()
        last = began
        while len(told) < count and time.perf_counter() - began < 10:
            for descriptor, _ in poll.poll(100):
                if descriptor not in told:
                    told.add(descriptor)
                    poll.unregister(descriptor)
                    last = time.perf_counter()
        settle(peer)
        used = usage(peer.pids).since(before)
        received = drained(clients)
    report.table(
        "500 readers of the status stream, one eject",
        [
            {
                "readers told": len(told),
                "ms until the last was told": (last - began) * 1e3,
                "cpu ms in all": used.cpu_seconds * 1e3,
                "bytes to each": received / count,
                "RSS bytes each": found[0].resident / count,
                "us to begin": found[0].cpu_seconds / count * 1e6,
            }
        ],
    )


def drained(clients: list[socket.socket]) -> int:
    """Read what has come; how much it was."""
    total = 0
    for sock in clients:
        try:
            while data := sock.recv(65536):
                total += len(data)
        except BlockingIOError:
            continue
    return total


def models(report: Report, place: Place) -> None:
    """200 configured models, one of them in use, beside 1."""
    rows = []
    for count in (1, 200):
        header = write_header_only(place.folder / "header.gguf")
        flags = ["--parallel", "64"]
        entries = {
            MODEL if number == 0 else f"m{number}": {"model_path": header, "flags": flags} for number in range(count)
        }
        began = time.perf_counter()
        with trio_router(place, models=entries, system={"llama_server_path": compiled("mock_backend")}) as peer:
            up = time.perf_counter() - began
            load = Load(mode="closed", target=peer.target, connections=16, body={"model": MODEL}, seconds=1.0)
            run = load.run_in_quiet(report.options.cores, peer.pids, report.options.patience_seconds)
            times = []
            for _ in range(5):
                asked = time.perf_counter()
                ask(peer.target, "/v1/models/status")
                times.append(time.perf_counter() - asked)
            rows.append(
                {
                    "models": count,
                    "start to first answer of a model s": up,
                    "cpu us a request": run.cpu_us,
                    "GET /v1/models/status ms": min(times) * 1e3,
                    "RSS MB": resident_bytes(peer.pids) / 1e6,
                }
            )
    report.table("configured models", rows)


def run(report: Report) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    parts = {"queue": queue, "connections": connections, "readers": readers, "models": models}
    with ExitStack() as stack:
        place = stack.enter_context(a_place(report.options.cores))
        for name, part in parts.items():
            if not report.options.only or name in report.options.only:
                until_quiet(report.options.patience_seconds)
                part(report, place)


if __name__ == "__main__":
    main("scale", __doc__ or "", run)
