"""Processes and the cores they run on: pinning, processor time, memory, and what this machine is."""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol, TypeVar

import attrs

from trio_router import __version__

PROC = Path("/proc")
MAX_OTHERS = 0.1
"""A run in which others used more than this of a core is tried again, as long as there is patience."""


class Disturbed(Protocol):
    """What was measured, and how far others were in the way."""

    @property
    def others(self) -> float: ...


Run = TypeVar("Run", bound=Disturbed)


@attrs.frozen(kw_only=True)
class Cores:
    """Who runs where: the server that is measured has a core of its own."""

    server: int
    load: int
    """The load generator and the backend."""

    @classmethod
    def default(cls) -> "Cores":
        """The first two we may use."""
        first, second, *_ = *sorted(os.sched_getaffinity(0)), -1, -1
        if second < 0:
            raise SystemExit("a benchmark needs two cores: one for the server, one for load and backend")
        return cls(server=first, load=second)


@attrs.frozen(kw_only=True)
class Usage:
    """What some processes have used so far."""

    cpu_seconds: float
    switches: dict[int, int]
    """Voluntary switches of context by thread: how often it slept and was woken."""
    busy_seconds: float
    """Of every core we may use, whoever used it."""
    own_seconds: float
    """Of everything that this benchmark started, and itself."""
    at: float = attrs.field(factory=time.monotonic)
    """When; in a difference, how long."""

    @property
    def wakeups(self) -> int:
        """Of all threads."""
        return sum(self.switches.values())

    def since(self, before: "Usage") -> "Usage":
        """The difference."""
        return Usage(
            cpu_seconds=self.cpu_seconds - before.cpu_seconds,
            switches={thread: count - before.switches.get(thread, 0) for thread, count in self.switches.items()},
            busy_seconds=self.busy_seconds - before.busy_seconds,
            own_seconds=self.own_seconds - before.own_seconds,
            at=self.at - before.at,
        )

    @property
    def others(self) -> float:
        """In a difference: how many cores' worth of time was used by who has nothing to do with us."""
        return max(0.0, self.busy_seconds - self.own_seconds) / self.at


def start_pinned(command: Sequence[str | Path], core: int | None, *, log: Path, **options: object) -> subprocess.Popen:
    """Start `command` on `core` (None: anywhere); what it says goes to `log`."""
    arguments = [str(part) for part in command]
    if core is not None:
        arguments = ["taskset", "-c", str(core), *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **options)


def stop(process: subprocess.Popen, seconds: float = 10.0) -> None:
    """SIGTERM, and SIGKILL if that does not help."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def descendants(pid: int) -> list[int]:
    """Every living child of `pid`, and theirs."""
    found: list[int] = []
    for task in _tasks(pid):
        try:
            children = [int(word) for word in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def pin(pids: Iterable[int], core: int) -> None:
    """Move every thread of `pids` to `core`: a child starts on its parent's."""
    for pid in pids:
        for task in _tasks(pid):
            try:
                os.sched_setaffinity(int(task.name), {core})
            except OSError:  # it ended meanwhile
                continue


def _tasks(pid: int) -> list[Path]:
    try:
        return list((PROC / str(pid) / "task").iterdir())
    except OSError:
        return []


def usage(pids: Iterable[int]) -> Usage:
    """What `pids` have used since they started, the threads that have ended included."""
    switches: dict[int, int] = {}
    for pid in pids:
        for task in _tasks(pid):
            try:
                status = (task / "status").read_text()
            except OSError:
                continue
            switches[int(task.name)] = int(status.partition("\nvoluntary_ctxt_switches:")[2].split(maxsplit=1)[0])
    ended = os.times()
    own = _cpu_seconds(descendants(os.getpid())) + ended.children_user + ended.children_system + time.process_time()
    return Usage(cpu_seconds=_cpu_seconds(pids), switches=switches, busy_seconds=_busy(), own_seconds=own)


def _cpu_seconds(pids: Iterable[int]) -> float:
    seconds = 0.0
    for pid in pids:
        try:
            seconds += time.clock_gettime((~pid << 3) | 2)  # the process's clock, as clock_getcpuclockid(3) makes it
        except OSError:  # it ended
            continue
    return seconds


def _busy() -> float:
    tick, ours = os.sysconf("SC_CLK_TCK"), os.sched_getaffinity(0)
    busy = 0
    for line in (PROC / "stat").read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in ours:
            user, nice, system, _, _, hard, soft, *_ = (int(field) for field in fields)
            busy += user + nice + system + hard + soft
    return busy / tick


def until_quiet(seconds: float, *, others: float = 0.15, look: float = 0.2) -> None:
    """Return when nobody else uses the machine, or after `seconds`."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        before = usage([])
        time.sleep(look)  # the time over which others are looked at
        if usage([]).since(before).others <= others:
            return


def in_quiet(run: Callable[[], Run], patience_seconds: float) -> Run:
    """What `run` measures while nobody else uses the machine; until then it is tried again, as long as there is patience."""
    give_up = time.monotonic() + patience_seconds
    until_quiet(patience_seconds)
    best = run()
    while best.others > MAX_OTHERS and (left := give_up - time.monotonic()) > 0:
        until_quiet(left)
        best = min(best, run(), key=lambda measured: measured.others)
    return best


def resident_bytes(pids: Iterable[int]) -> int:
    """The sum of their resident sets."""
    total = 0
    for pid in pids:
        try:
            total += int((PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total


def hardware() -> dict[str, object]:
    """What a figure without it means nothing."""
    model = "unknown"
    for line in (PROC / "cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"model name", "Model"}:
            model = value.strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
    }


def versions(llama_server: Path | None = None) -> dict[str, str]:
    """Of everything that takes part."""
    found = {"python": platform.python_version(), "trio_router": __version__}
    for package in ("trio", "hypercorn", "quart-trio", "httptools", "httpx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if nginx := find_nginx():
        found["nginx"] = _first_line([nginx, "-v"])
    if llama_server is not None:
        found["llama_server"] = _first_line([llama_server, "--version"])
    if swap := shutil.which("llama-swap"):
        found["llama_swap"] = _first_line([swap, "--version"])
    return found


def find_nginx() -> str | None:
    """Debian has it where only root looks."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin:/usr/local/sbin")


def _first_line(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "version" in line.lower()]
    return lines[0].strip() if lines else "unknown"
