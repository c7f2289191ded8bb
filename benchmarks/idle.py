"""What it costs when nothing happens, and how long one waits for the program itself."""

import os
import socket
import subprocess
import sys
import time

from benchmarks.machine import resident_bytes, until_quiet, usage
from benchmarks.peers import Place, a_place, ask, serve_command, trio_router, write_config
from benchmarks.programs import compiled
from benchmarks.report import Bar, Report, main, median
from tests.harness.tiny_gguf import write_header_only

COMMANDS = {"--help": ["--help"], "serve --help": ["serve", "--help"]}


def idle(report: Report, place: Place) -> None:
    """A ready model, and nobody who asks."""
    with trio_router(place) as peer:
        time.sleep(2.0)  # what a start leaves to do is done then
        before = usage(peer.pids)
        time.sleep(10.0 if report.options.quick else 60.0)  # what is measured
        used = usage(peer.pids).since(before)
        resident = resident_bytes(peer.pids)
    share = used.cpu_seconds / used.at * 100
    report.table(
        "idle, one model ready",
        [{"% of a core": share, "wake-ups/s": used.wakeups / used.at, "RSS MB": resident / 1e6}],
    )
    report.bars.append(Bar(name="idle", measured=share, unit="% of core", at_most=0.2))


def start(report: Report, place: Place) -> None:
    """From the start of the process to the first connection it accepts, and to its first answer."""
    header = write_header_only(place.folder / "header.gguf")
    rows = []
    for _ in range(4 if report.options.quick else 12):
        config, target = write_config(
            place, "start", {"m": {"model_path": header}}, {"llama_server_path": compiled("mock_backend")}
        )
        until_quiet(report.options.patience_seconds)
        began, before = time.perf_counter(), _children_seconds()
        with place.log("start").open("ab") as log:
            process = subprocess.Popen([str(part) for part in serve_command(config)], stdout=log, stderr=log)
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", int(target.rpartition(":")[2]))).close()
                    break
                except ConnectionRefusedError:
                    if process.poll() is not None:
                        raise SystemExit(place.log("start").read_text()[-2000:]) from None
                    time.sleep(0.002)  # nothing tells of a port that opens
            accepted = time.perf_counter() - began
            ask(target, "/health")
            answered = time.perf_counter() - began
        finally:
            process.terminate()
            process.wait(10)
        rows.append((accepted, answered, _children_seconds() - before))
    accepted, answered, cpu = (median(row[i] for row in rows) for i in range(3))
    report.table("start of serve", [{"accepts after s": accepted, "first answer after s": answered, "cpu s": cpu}])
    report.bars.append(Bar(name="serve accepts after its start", measured=accepted, unit="s", at_most=0.8))


def commands(report: Report) -> None:
    """The command line."""
    rows = []
    for name, arguments in COMMANDS.items():
        times = []
        for _ in range(5 if report.options.quick else 15):
            until_quiet(report.options.patience_seconds)
            began, before = time.perf_counter(), _children_seconds()
            subprocess.run([sys.executable, "-m", "trio_router", *arguments], check=True, stdout=subprocess.DEVNULL)
            times.append((time.perf_counter() - began, _children_seconds() - before))
        wall, cpu = median(each[0] for each in times), median(each[1] for each in times)
        rows.append({"command": f"trio-router {name}", "s": wall, "cpu s": cpu})
        report.bars.append(Bar(name=f"trio-router {name}", measured=wall, unit="s", at_most=0.3))
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    rows.append({"command": "python -c pass", "s": time.perf_counter() - began})
    report.table("commands", rows)


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def run(report: Report) -> None:
    with a_place(report.options.cores) as place:
        commands(report)
        start(report, place)
        idle(report, place)


if __name__ == "__main__":
    main("idle", __doc__ or "", run)
