"""The README this project set out from, promise by promise: each line of its tables, its requests and what they show.

Where it and the contract differ (a JSON file, `python run.py`, 0.0.0.0), the contract stands and the check is on that.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess, clean_environment
from tests.harness.toml import router_toml
from trio_router.config import ApiConfig, LlamaServer, ModelConfig, SystemConfig

pytestmark = pytest.mark.process

HELLO = {
    "model": "qwen-7b",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Hello!"},
    ],
}
STORY = {"model": "qwen-7b", "messages": [{"role": "user", "content": "Tell me a story"}], "stream": True}


@pytest.fixture(scope="module")
def router(start_shared_router: StartRouter) -> RouterProcess:
    """The seed's example configuration."""
    flags = ["-ngl", "99", "--ctx-size", "8192", "--flash-attn", "on", "--mlock", "--jinja"]
    cache = ["--cache-type-k", "q4_0", "--cache-type-v", "q4_0", "--flash-attn", "on"]
    return start_shared_router(
        models={
            "qwen-7b": flags,
            "llama-3b": ["-ngl", "80", "--ctx-size", "4096", *cache],
            "embedding-model": ["-ngl", "99", "--ctx-size", "4096", "--embedding"],
        },
        system={"enable_idle_timeout": False, "default_parallel": 1, "max_concurrent_models": 3},
    )


def series(router: RouterProcess, name: str) -> dict[str, float]:
    lines = [line for line in router.get("/metrics").text.splitlines() if line.startswith(name + "{")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


# --- "Features" -------------------------------------------------------------------------------------


def test_feature_dynamic_model_management(start_router: StartRouter) -> None:
    router = start_router(models={"a": [], "b": []}, system={"max_concurrent_models": 1})
    assert router.chat("a").status_code == router.chat("b").status_code == 200
    assert (router.status("a")["status"], router.status("b")["status"]) == ("off", "ready")
    idle = start_router(models={"a": []}, system={"idle_timeout_sec": 0.3})
    idle.chat("a")
    idle.wait_for_status("a", status="off")


def test_feature_priority_queue_system(router: RouterProcess) -> None:
    for priority in ("high", "normal", "low", "HIGH"):
        answer = router.post("/v1/chat/completions", HELLO, headers={"X-Request-Priority": priority})
        assert answer.status_code == 200
    assert router.get("/v1/queue/stats").json()["per_model"]["qwen-7b"]["by_priority"] == {
        "high": 0,
        "normal": 0,
        "low": 0,
    }


def test_feature_openai_compatible_api(router: RouterProcess) -> None:
    chat = router.post("/v1/chat/completions", HELLO).json()
    assert (chat["object"], chat["choices"][0]["message"]["role"]) == ("chat.completion", "assistant")
    vectors = router.post("/v1/embeddings", {"model": "embedding-model", "input": "The quick brown fox"}).json()
    assert vectors["object"] == "list"
    assert len(vectors["data"][0]["embedding"]) > 1


def test_feature_prometheus_and_grafana(router: RouterProcess) -> None:
    router.post("/v1/chat/completions", HELLO)
    text = router.get("/metrics").text
    board = json.loads(next(Path("deploy/monitoring").rglob("*dashboard*/*.json")).read_text())
    asked = json.dumps(board)
    for name, kind in {
        "router_requests_total": "counter",
        "router_model_vram_bytes": "gauge",
        "router_queue_depth": "gauge",
    }.items():
        assert f"# TYPE {name} {kind}" in text
        assert name in asked


def test_feature_model_preloading(start_router: StartRouter) -> None:
    router = start_router(models={"a": [], "b": []}, system={"preload_models": ["*"]})
    router.wait_for_status("a", status="ready")
    router.wait_for_status("b", status="ready")


def test_feature_vram_management(router: RouterProcess) -> None:
    report = router.get("/vram").json()
    assert report["status"] == "unavailable"  # no GPU is configured here; tests/web has the others
    assert {"gpu_info", "gpus", "models", "loaded_models_count", "can_load_more"} <= set(report)


def test_feature_health_monitoring(start_router: StartRouter) -> None:
    assert attrs.fields(SystemConfig).health_interval_sec.default == 30
    router = start_router(models={"a": []})
    router.chat("a")
    (pid,) = router.servers()
    os.kill(pid, 9)
    wait_until(lambda: router.servers() and pid not in router.servers())
    router.wait_for_status("a", status="ready")


def test_feature_streaming_support(router: RouterProcess) -> None:
    with (
        router.client() as client,
        client.stream("POST", "/v1/chat/completions", json=STORY) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2


# --- "API Reference" --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/v1/models", {"object", "data"}),
        ("/v1/models/qwen-7b/status", {"alias", "status", "port", "vram_mb", "is_alive", "model"}),
        ("/v1/models/failed", {"failed_models", "message"}),
        ("/health", {"status", "checks", "version", "uptime_seconds"}),
        ("/vram", {"status", "gpu_info", "models"}),
        ("/v1/queue/stats", {"summary", "per_model"}),
        (
            "/v1/telemetry/summary",
            {"total_requests", "success_count", "error_count", "success_rate", "avg_latency_ms", "p50_latency_ms"},
        ),
        ("/v1/health/models", {"qwen-7b"}),
        ("/v1/models/status", {"server", "models", "summary"}),
    ],
)
def test_endpoint(router: RouterProcess, path: str, keys: set[str]) -> None:
    router.post("/v1/chat/completions", HELLO)
    answer = router.get(path)
    assert answer.status_code == 200
    assert keys <= set(answer.json())


def test_endpoint_eject_and_reset(start_router: StartRouter) -> None:
    router = start_router(models={"qwen-7b": []})
    router.post("/v1/chat/completions", HELLO)
    ejected = router.post("/v1/models/eject", {"model": "qwen-7b"}).json()
    assert (ejected["status"], ejected["model_ejected"]) == ("success", "qwen-7b")
    reset = router.post("/v1/models/qwen-7b/reset").json()
    assert (reset["status"], reset["model"]) == ("not_found", "qwen-7b")


def test_endpoint_metrics(router: RouterProcess) -> None:
    router.post("/v1/chat/completions", HELLO)
    requests = series(router, "router_requests_total")
    assert any(
        'model="qwen-7b"' in name and 'status="success"' in name and value >= 1 for name, value in requests.items()
    )
    assert any('model="qwen-7b"' in name for name in series(router, "router_model_vram_bytes"))
    assert series(router, "router_queue_depth")['router_queue_depth{model="qwen-7b"}'] == 0


def events(answer: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event:"):
            name = line.partition(":")[2].strip()
        elif line.startswith("data:"):
            yield name, json.loads(line.partition(":")[2])


def test_status_and_its_stream_as_shown(start_router: StartRouter) -> None:
    router = start_router(models={"qwen-7b": [], "llama-3b": []})
    with router.client() as client, client.stream("GET", "/v1/models/status/stream") as answer:
        told = events(answer)
        name, full = next(told)
        assert name == "full_status"
        assert full["models"]["qwen-7b"]["status"] == "off"
        router.post("/v1/models/load", {"model": "qwen-7b"})
        seen = []
        while not seen or seen[-1] != ("qwen-7b", "ready"):
            name, update = next(told)
            if name == "model_update":
                seen.append((update["alias"], update["status"]))
    shown = router.get("/v1/models/status").json()
    assert shown["server"]["status"] == "ready"
    assert shown["models"]["qwen-7b"]["status"] == "ready"
    assert {"port", "vram_mb"} <= set(shown["models"]["qwen-7b"])
    assert shown["models"]["llama-3b"]["status"] == "off"
    assert (shown["summary"]["ready"], shown["summary"]["off"]) == (1, 1)


def test_endpoint_metrics_stream(router: RouterProcess) -> None:
    with router.client() as client, client.stream("GET", "/metrics/stream") as answer:
        name, data = next(event for event in events(answer) if event[0] == "metrics")
    assert name == "metrics"
    assert {"timestamp", "server", "gpu", "models", "totals"} <= set(data)


# --- "Environment Variables" ------------------------------------------------------------------------


def test_environment(start_router: StartRouter, fake_llama: Path, header_gguf: Path, tmp_path: Path) -> None:
    """LLAMA_SERVER_PATH and BASE_MODELS_PATH win over the file; API_KEY turns authentication on."""
    environment = {"LLAMA_SERVER_PATH": str(fake_llama), "BASE_MODELS_PATH": str(header_gguf.parent), "API_KEY": "k-1"}
    router = start_router(
        models={"qwen-7b": {"model_path": header_gguf.name, "flags": []}},
        system={"llama_server_path": str(tmp_path / "none"), "base_models_path": str(tmp_path / "none")},
        environment=environment,
    )
    assert router.post("/v1/chat/completions", HELLO).status_code == 401
    assert router.get("/health").status_code == 200
    keyed = {"Authorization": "Bearer k-1"}
    assert router.post("/v1/chat/completions", HELLO, headers=keyed).status_code == 200


def test_environment_config_path(tmp_path: Path, header_gguf: Path) -> None:
    """Which file is read; a given one wins."""
    models = {"qwen-7b": {"model_path": header_gguf, "flags": []}}
    (tmp_path / "env.toml").write_text(router_toml(models=models, system={"gpu_devices": [-1]}))
    (tmp_path / "given.toml").write_text(router_toml(models=models, system={"default_parallel": 0}))
    for arguments, wrong in (
        ((), "env.toml: system.gpu_devices: "),
        (("--config", "given.toml"), "given.toml: system.default_parallel: "),
    ):
        command = [sys.executable, "-m", "trio_router", "check", *arguments]
        environment = clean_environment({"CONFIG_PATH": "env.toml"})
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr[: len(wrong)]) == (2, wrong)


# --- "Configuration Reference" ----------------------------------------------------------------------

SYSTEM = {
    "llama_server_path": None,
    "base_models_path": attrs.NOTHING,  # the file's folder
    "max_concurrent_models": 3,
    "preload_models": (),
    "enable_idle_timeout": True,
    "idle_timeout_sec": 300,
    "request_timeout_sec": 120,
    "gpu_devices": (0,),
    "default_parallel": 1,
    "max_queue_size_per_model": 500,
    "vram_multiplier": 1.1,
}


@pytest.mark.parametrize(("key", "default"), SYSTEM.items())
def test_system_key_and_its_default(key: str, default: Any) -> None:
    assert attrs.fields_dict(SystemConfig)[key].default == default


def test_model_keys_and_api_keys() -> None:
    assert {"model_path", "flags"} <= set(attrs.fields_dict(ModelConfig))
    assert attrs.fields(ModelConfig).flags.default == ()
    assert attrs.fields(ApiConfig).port.default == 8000
    assert attrs.fields(ApiConfig).host.default == "127.0.0.1"  # the seed's 0.0.0.0: the contract differs
    assert "path" in attrs.fields_dict(LlamaServer)


@pytest.mark.parametrize(
    ("alias", "flags"),
    [
        ("qwen-7b", ["-ngl", "99"]),
        ("qwen-7b", ["--ctx-size", "8192"]),
        ("qwen-7b", ["--flash-attn", "on"]),
        ("qwen-7b", ["--mlock"]),
        ("embedding-model", ["--embedding"]),
        ("llama-3b", ["--cache-type-k", "q4_0", "--cache-type-v", "q4_0"]),
        ("qwen-7b", ["--jinja"]),
        ("qwen-7b", ["--parallel", "1"]),  # system.default_parallel
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_common_flag_reaches_llama_server(router: RouterProcess, alias: str, flags: list[str]) -> None:
    router.post("/v1/models/load", {"model": alias})
    command = Path(f"/proc/{router.status(alias)['pid']}/cmdline").read_bytes().decode().split("\0")
    assert any(command[at : at + len(flags)] == flags for at in range(len(command)))


def test_default_parallel_and_vram_multiplier(start_router: StartRouter) -> None:
    router = start_router(
        models={"qwen-7b": [], "llama-3b": ["--parallel", "5"]},
        system={"default_parallel": 3, "vram_multiplier": 1.5},
    )
    assert [router.status(alias)["slots"] for alias in ("qwen-7b", "llama-3b")] == [3, 5]
    parts = wait_until(lambda: router.get("/v1/models/qwen-7b/footprint").json()["parts"])
    sizes = {part["name"]: part["bytes"] for part in parts}
    margin = sizes.pop("margin")
    assert margin == pytest.approx(0.5 * sum(sizes.values()), rel=0.01)


def test_preload_models_by_name_without_idle_timeout(start_router: StartRouter) -> None:
    router = start_router(
        models={"qwen-7b": [], "llama-3b": []},
        system={"preload_models": ["llama-3b"], "enable_idle_timeout": False, "idle_timeout_sec": 0.05},
    )
    router.wait_for_status("llama-3b", status="ready")
    pid = router.status("llama-3b")["pid"]
    time.sleep(0.5)  # ten times what would unload it
    assert router.status("llama-3b")["pid"] == pid
    assert router.status("qwen-7b")["status"] == "off"


def test_max_queue_size_per_model(start_router: StartRouter) -> None:
    router = start_router(models={"a": ["--fake-token-seconds", "0.2"]}, system={"max_queue_size_per_model": 0})
    router.post("/v1/models/load", {"model": "a"})
    running = router.in_background("a", fake={"tokens": 10, "token_seconds": 0.1})
    wait_until(lambda: router.status("a")["active"] == 1)
    refused = router.chat("a")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
    assert running.answer().status_code == 200


def test_request_timeout_sec(start_router: StartRouter) -> None:
    router = start_router(models={"a": ["--fake-stall"]}, system={"request_timeout_sec": 0.5})
    began = time.monotonic()
    late = router.chat("a")
    assert (late.status_code, late.json()["error"]["code"]) == (504, "backend_timeout")
    assert time.monotonic() - began < 5
