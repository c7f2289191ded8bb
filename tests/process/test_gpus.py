"""Memory and GPUs through the public port: real routers, fake llama-servers, a fake driver."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess
from tests.telemetry.samples import samples

pytestmark = pytest.mark.process

FAKE_GPUS = Path(__file__).parent / "fake_gpus"
ROOT = Path(__file__).parents[2]


@attrs.define(eq=False)
class Gpus:
    """What the fake driver shows, and routers that see it."""

    path: Path
    start: StartRouter
    model: Path
    world: dict[str, Any] = attrs.field(factory=dict)

    def say(self, **world: Any) -> None:
        """From now on."""
        self.world |= world
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.world))
        new.replace(self.path)

    def router(self, system: dict[str, Any] | None = None, **models: Any) -> RouterProcess:
        """A router over all GPUs; a model is what it takes, in MiB, and keys of its table besides."""
        tables = {}
        for alias, given in models.items():
            table = dict(given) if isinstance(given, dict) else {"vram_mb": given}
            # a server that says nothing is not asked what it would take; by its context each is a model of its own,
            # of which nothing is learned from another's load
            flags = ["--log-disable", "-ngl", "99", "-c", str(table["vram_mb"]), *table.pop("flags", [])]
            tables[alias] = {"model_path": self.model, "flags": flags, **table}
        self.say(models={alias: table["vram_mb"] for alias, table in tables.items()} | self.world.get("models", {}))
        return self.start(
            models=tables,
            system={
                "gpu_devices": list(range(len(self.world["gpus"]))),
                "vram_reserve_mb": 0,
                "min_turn_sec": 0,
                "state_dir": self.path.parent / "state",
                **(system or {}),
            },
            environment={"FAKE_GPUS": str(self.path), "PYTHONPATH": f"{FAKE_GPUS}:{ROOT}"},
        )


@pytest.fixture
def gpus(start_router: StartRouter, header_gguf: Path, tmp_path: Path) -> Gpus:
    made = Gpus(tmp_path / "gpus.json", start_router, header_gguf)
    made.say(gpus={"GPU-aaaa": [24000, 0]}, models={})
    return made


def shown_to(router: RouterProcess, alias: str) -> dict[str, str]:
    """The variables that say which GPUs a llama-server sees."""
    (pid,) = [pid for pid, name in router.servers().items() if name == alias]
    lines = Path("/proc", str(pid), "environ").read_bytes().decode().split("\0")
    found = dict(line.split("=", 1) for line in lines if line)
    return {name: value for name, value in found.items() if name.endswith("VISIBLE_DEVICES")}


def flags_of(router: RouterProcess, alias: str) -> list[str]:
    (pid,) = [pid for pid, name in router.servers().items() if name == alias]
    return Path("/proc", str(pid), "cmdline").read_bytes().decode().split("\0")


def exhausted(router: RouterProcess, alias: str) -> dict[str, Any]:
    answer = router.chat(alias)
    assert answer.status_code == 503, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert (error["type"], error["code"]) == ("insufficient_vram_error", "vram_exhausted")
    assert answer.headers["Retry-After"]
    return error


def test_what_can_never_fit_is_refused(gpus: Gpus) -> None:
    gpus.say(gpus={"GPU-aaaa": [24000, 3000]})
    router = gpus.router(system={"vram_reserve_mb": 1000}, small=8000, huge=20500)
    assert router.chat("small").status_code == 200
    wait_until(lambda: exhausted(router, "huge")["available_mb"] == 20000, timeout_seconds=10)
    error = exhausted(router, "huge")
    assert (error["model"], error["required_mb"], error["loaded_models"]) == ("huge", 20500, ["small"])
    assert "smaller context" in error["message"]
    assert router.post("/v1/models/load", {"model": "huge"}).json()["error"]["code"] == "vram_exhausted"
    assert router.status("huge")["status"] == "off"
    assert list(router.servers().values()) == ["small"]


def test_room_is_made_and_seen(gpus: Gpus) -> None:
    gpus.say(freed_seconds=0.5)
    router = gpus.router(a=10000, b=10000, c=12000)
    assert router.chat("a").status_code == 200
    assert router.chat("b").status_code == 200
    time.sleep(0.6)  # both are idle for long enough
    began = time.monotonic()
    assert router.chat("c", timeout=30).status_code == 200
    assert time.monotonic() - began > 0.5, "it waited until the memory was seen free"
    told = router.get("/vram").json()
    reserved = {model["model_alias"]: model["reserved_mb"]["0"] for model in told["models"]}
    # one of a and b left, that whose load took less of the time since it was used
    assert sorted(router.servers().values()) == sorted(reserved)
    assert reserved.pop("c") == 12000
    # b is a again: the same file and flags. So what a took was known, and 32 are reserved for what it may take in use
    assert reserved in ({"a": 10000}, {"b": 10032})
    assert told["gpus"][0]["reserved_mb"] == 12000 + sum(reserved.values())
    assert told["can_load_more"] is False
    assert router.status("c")["reserved_mb"]["0"] == 12000
    metrics = samples(router.get("/metrics").text)
    assert metrics["router_model_reserved_bytes", "device=0", "model=c"] == 12000 * 1024 * 1024


def test_a_router_that_had_no_turn_looks_again_before_another_leaves(gpus: Gpus) -> None:
    gpus.say(freed_seconds=60)
    router = gpus.router(a=10000, b=10000, c=12000)
    assert router.chat("a").status_code == 200
    assert router.chat("b").status_code == 200
    time.sleep(0.6)  # both are idle for long enough
    waiting = router.in_background("c")
    wait_until(lambda: len(router.servers()) == 1)
    time.sleep(0.2)  # it has looked, and what it saw was not free yet
    router.process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    gpus.say(freed_seconds=0)
    router.process.send_signal(signal.SIGCONT)
    assert waiting.answer().status_code == 200
    assert len(router.servers()) == 2


def test_a_reservation_stands_from_the_start_of_a_load(gpus: Gpus, tmp_path: Path) -> None:
    until = tmp_path / "go"
    router = gpus.router(a={"vram_mb": 14000, "flags": ["--fake-load-until", str(until)]}, b=14000)
    first = router.in_background("a")
    router.wait_for_status("a", status="loading")
    second = router.in_background("b")
    router.wait_for_status("b", queued=1)
    time.sleep(0.5)
    assert set(router.servers().values()) == {"a"}
    until.touch()
    assert first.answer().status_code == 200
    assert second.answer(30).status_code == 200


def test_pinned(gpus: Gpus) -> None:
    router = gpus.router(a={"vram_mb": 14000, "pinned": True}, b=14000)
    assert router.chat("a").status_code == 200
    assert router.status("a")["pinned"] is True
    wait_until(lambda: "unpin 'a'" in exhausted(router, "b")["message"], timeout_seconds=10)
    assert router.post("/v1/models/eject", {"model": "a"}).json()["status"] == "success"
    assert router.chat("b", timeout=30).status_code == 200


def test_a_driver_that_fails(gpus: Gpus) -> None:
    router = gpus.router(a=14000, b=9000, c=9000)
    assert router.chat("a").status_code == 200
    wait_until(lambda: router.get("/vram").json()["gpu_info"]["used_mb"] == 14000, timeout_seconds=10)
    time.sleep(2.5)  # a look at the devices that began when it was ready
    gpus.say(fails=True)
    wait_until(lambda: router.get("/vram").json()["stale"], timeout_seconds=10)
    assert router.chat("b").status_code == 200
    time.sleep(0.6)
    assert router.chat("c", timeout=40).status_code == 200, "what leaves is believed to free its memory"
    assert len(router.servers()) == 2


TWO = {"GPU-aaaa": [24000, 0], "GPU-bbbb": [24000, 12000]}


def test_two_gpus_the_tightest_that_fits(gpus: Gpus) -> None:
    gpus.say(gpus=TWO)
    router = gpus.router(small=10000, large=20000)
    for alias in ("small", "large"):
        assert router.chat(alias).status_code == 200
    assert shown_to(router, "small") == {"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}
    assert shown_to(router, "large") == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa"}
    assert "--tensor-split" not in flags_of(router, "large")
    told = {model["model_alias"]: model["reserved_mb"] for model in router.get("/vram").json()["models"]}
    assert (told["small"]["1"], told["large"]["0"]) == (10000, 20000)
    assert [gpu["reserved_mb"] for gpu in router.get("/vram").json()["gpus"]] == [20000, 10000]


def test_two_gpus_split(gpus: Gpus) -> None:
    gpus.say(gpus=TWO)
    router = gpus.router(huge=30000)
    assert router.chat("huge").status_code == 200
    assert shown_to(router, "huge") == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa,GPU-bbbb"}
    flags = flags_of(router, "huge")
    assert flags[flags.index("--split-mode") + 1] == "layer"
    first, second = map(int, flags[flags.index("--tensor-split") + 1].split(","))
    reserved = router.get("/v1/models/huge/footprint").json()["reserved_mb"]
    each = reserved["0"] - first  # what a GPU has for itself is not dealt out
    assert each == pytest.approx(reserved["1"] - second, abs=2)
    assert each > 400
    assert first / second == pytest.approx((24000 - each) / (12000 - each), rel=0.01)


def test_two_gpus_fixed(gpus: Gpus) -> None:
    gpus.say(gpus=TWO)
    router = gpus.router(
        first={"vram_mb": 5000, "gpu": 0},
        second={"vram_mb": 20000, "gpu": [1]},
        own={"vram_mb": 4000, "flags": ["-ts", "3,1"]},
    )
    assert router.chat("first").status_code == 200
    assert shown_to(router, "first") == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa"}
    error = exhausted(router, "second")
    assert (error["required_mb"], error["available_mb"]) == (20000, 12000)
    assert "on gpu 1" in error["message"]
    assert router.chat("own").status_code == 200
    assert shown_to(router, "own") == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa,GPU-bbbb"}
    told = {model["model_alias"]: model["reserved_mb"] for model in router.get("/vram").json()["models"]}
    parts = router.get("/v1/models/own/footprint").json()["parts"]
    fixed = sum(part["mb"] for part in parts if part["place"] == "gpu" and part["name"] in {"driver", "compute"})
    assert told["own"]["0"] - told["own"]["1"] == pytest.approx((4000 - fixed) * (0.75 - 0.25), abs=4)
    assert told["own"]["1"] > (4000 - fixed) * 0.25 + fixed, "and what each GPU has for itself"


def test_no_gpu_wanted(start_router: StartRouter) -> None:
    router = start_router(a=[])
    assert router.chat("a").status_code == 200
    assert shown_to(router, "a") == {
        "CUDA_VISIBLE_DEVICES": "-1",
        "GGML_VK_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "-1",
        "ROCR_VISIBLE_DEVICES": "-1",
    }


def test_the_hosts_memory(start_router: StartRouter, header_gguf: Path) -> None:
    """A tiny model takes 300 MiB of it by the allowance for what its header does not tell."""
    router = start_router(a=[], b=[], system={"min_turn_sec": 0})
    needs = router.get("/v1/models/a/footprint").json()["host_mb"]
    assert needs > 0
    tight = start_router(a=[], b=[], system={"ram_budget_mb": needs + 1, "min_turn_sec": 0})
    assert tight.chat("a").status_code == 200
    time.sleep(0.6)
    assert tight.chat("b", timeout=30).status_code == 200
    assert list(tight.servers().values()) == ["b"]
    assert tight.get("/vram").json()["ram"]["reserved_mb"] == needs
    too_tight = start_router(a=[], system={"ram_budget_mb": needs - 1})
    error = exhausted(too_tight, "a")
    assert (error["required_mb"], error["available_mb"]) == (needs, needs - 1)
    assert "system.ram_budget_mb" in error["message"]
