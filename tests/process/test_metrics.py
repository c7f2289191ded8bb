"""Every family moves when what it names happens: a router, and llama-servers that do what they are told."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import REQUIRED, StartRouter
from tests.harness.processes import wait_until
from tests.harness.record import Record
from tests.harness.router import RouterProcess, chat_body
from tests.telemetry.samples import families, samples
from tests.telemetry.test_metrics import FAMILIES

pytestmark = pytest.mark.process

CHAT = "/v1/chat/completions"
Samples = dict[tuple[str, ...], float]


def scrape(router: RouterProcess) -> Samples:
    return samples(router.get("/metrics").text)


def requests(told: Samples, outcome: str, *, model: str = "qwen", endpoint: str = CHAT) -> float:
    status = "success" if outcome == "ok" else "error"
    labels = (f"endpoint={endpoint}", f"model={model}", f"outcome={outcome}", f"status={status}")
    return told.get(("router_requests_total", *labels), 0)


def wait_for(router: RouterProcess, value: float, *series: str) -> Samples:
    def reached() -> Samples | None:
        told = scrape(router)
        return told if told.get(series) == value else None

    found = wait_until(reached, timeout_seconds=10, what=f"{series} {value}")
    assert found is not None
    return found


def test_an_answer(start_router: StartRouter) -> None:
    router = start_router(qwen=[], llama=[])
    assert router.chat("qwen").status_code == 200
    assert router.chat("qwen", stream=True).status_code == 200
    assert router.chat("qwen", headers={"X-Request-Priority": "high"}).status_code == 200
    told = wait_for(router, 3, "router_request_duration_seconds_count", "model=qwen")
    assert requests(told, "ok") == 3
    assert told["router_time_to_first_token_seconds_count", "model=qwen"] == 3
    assert told["router_time_per_output_token_seconds_count", "model=qwen"] == 3
    assert told["router_time_per_output_token_seconds_sum", "model=qwen"] == pytest.approx(0.0045)
    assert told["router_queue_wait_seconds_count", "model=qwen", "priority=normal"] == 2
    assert told["router_queue_wait_seconds_count", "model=qwen", "priority=high"] == 1
    assert told["router_tokens_total", "kind=input", "model=qwen"] == 21
    assert told["router_tokens_total", "kind=output", "model=qwen"] == 12
    assert told["router_model_loads_total", "model=qwen", "result=ok"] == 1
    assert told["router_model_load_seconds_count", "model=qwen"] == 1
    assert 0 < told["router_model_load_seconds_sum", "model=qwen"] < 10
    assert told["router_model_state", "model=qwen", "state=ready"] == 1
    assert told["router_model_state", "model=llama", "state=off"] == 1
    assert told["router_slots", "model=qwen", "state=idle"] == 1
    assert told["router_ready",] == 1
    assert told["process_cpu_seconds_total",] > 0
    assert {name for name in families(router.get("/metrics").text) if name.startswith("router_")} == {
        *FAMILIES,
        "router_key_requests_total",
    }


def test_every_dialect_counts_its_tokens(start_router: StartRouter) -> None:
    router = start_router(qwen=["--embedding"])
    before = 0.0
    for path, body in (
        ("/v1/chat/completions", {}),
        ("/v1/completions", {"prompt": "x"}),
        ("/completion", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {}),
    ):
        for stream in (False, True):
            assert router.post(path, {**chat_body("qwen"), **body, "stream": stream}).status_code == 200
            told = wait_for(router, 1 + stream, "router_requests_total", f"endpoint={path}", "model=qwen",
                            "outcome=ok", "status=success")  # fmt: skip
            now = told["router_tokens_total", "kind=output", "model=qwen"]
            assert now - before == 4, (path, stream)
            before = now
    assert router.post("/v1/embeddings", {"model": "qwen", "input": "x"}).status_code == 200
    told = wait_for(router, 77, "router_tokens_total", "kind=input", "model=qwen")
    assert told["router_tokens_total", "kind=output", "model=qwen"] == before


def test_who_waits_and_who_runs(start_router: StartRouter, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    router = start_router(qwen=["-np", "2"], system={"max_queue_size_per_model": 2})
    held = [router.in_background("qwen", fake={"hold_until": str(gate)}) for _ in range(2)]
    told = wait_for(router, 2, "router_active_requests", "model=qwen")
    assert told["router_slots", "model=qwen", "state=busy"] == 2
    assert told["router_slots", "model=qwen", "state=idle"] == 0
    waiting = [router.in_background("qwen", headers={"X-Request-Priority": word}) for word in ("low", "high")]
    told = wait_for(router, 2, "router_queue_depth", "model=qwen")
    for priority, count in (("high", 1), ("normal", 0), ("low", 1)):
        assert told["router_queued_requests", "model=qwen", f"priority={priority}"] == count
    assert router.chat("qwen").status_code == 503
    assert requests(scrape(router), "rejected") == 1
    stats = router.get("/v1/queue/stats").json()
    assert stats["summary"] == {"total_queued": 2, "total_processing": 2, "total_processed": 0, "total_rejected": 1}
    gate.touch()
    assert {each.answer().status_code for each in held + waiting} == {200}
    told = wait_for(router, 0, "router_active_requests", "model=qwen")
    assert told["router_queue_depth", "model=qwen"] == 0
    assert router.get("/v1/queue/stats").json()["summary"]["total_processed"] == 4


def test_how_requests_end(start_router: StartRouter) -> None:
    router = start_router(qwen=[], system={"request_timeout_sec": 0.4}, api={"max_body_mb": 1})
    assert router.chat("typed by a client").status_code == 404
    assert router.post(CHAT, content=b"{").status_code == 400
    assert router.chat("qwen", fake={"status": 422}).status_code == 422
    assert router.chat("qwen", fake={"status": 500}).status_code == 500
    assert router.chat("qwen", fake={"stall": True}).status_code == 504
    assert router.post(CHAT, content=b" " * 1_100_000).status_code == 413
    body = json.dumps(chat_body("qwen", fake={"headers_seconds": 0.3})).encode()
    connection = router.start_raw(body)
    wait_for(router, 1, "router_active_requests", "model=qwen")
    connection.close()
    told = wait_for(router, 0, "router_active_requests", "model=qwen")
    assert requests(told, "client_error", model="unknown") == 3
    assert requests(told, "client_error") == 1
    assert requests(told, "backend_error") == 1
    assert requests(told, "timeout") == 1
    assert requests(told, "cancelled") == 1
    assert "typed by a client" not in router.get("/metrics").text
    summary = router.get("/v1/telemetry/summary").json()
    assert (summary["total_requests"], summary["error_count"], summary["success_rate"]) == (7, 7, 0.0)
    assert summary["errors_by_type"] == {
        "model_not_found": 1,
        "invalid_json": 1,
        "body_too_large": 1,
        "client_error": 1,
        "backend_error": 1,
        "backend_timeout": 1,
        "cancelled": 1,
    }


def test_a_wrong_key_is_counted_too(start_router: StartRouter) -> None:
    router = start_router(qwen=[], environment={"API_KEY": "right"})
    assert router.chat("qwen", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert router.get("/metrics").status_code == 401
    text = router.get("/metrics", headers={"Authorization": "Bearer right"}).text
    assert requests(samples(text), "client_error", model="unknown") == 1
    for path in ("/livez", "/readyz", "/health"):
        assert router.get(path).status_code == 200


def test_loads_exits_and_unloads(start_router: StartRouter, record: Record) -> None:
    router = start_router(
        first=record.flags,
        second=[],
        broken=["--fake-exit-at-start", "3"],
        slow=["--fake-never-ready"],
        system={"max_concurrent_models": 1, "max_load_attempts": 2, "load_timeout_sec": 0.5, "idle_timeout_sec": 1},
    )
    assert router.chat("first").status_code == 200
    assert router.chat("second").status_code == 200  # first has to leave
    told = wait_for(router, 1, "router_model_unloads_total", "model=first", "reason=evicted")
    assert told["router_backend_exits_total", "kind=stopped", "model=first"] == 1
    assert told["router_model_state", "model=first", "state=off"] == 1
    assert router.post("/v1/models/eject", {"model": "second"}).status_code == 200
    assert scrape(router)["router_model_unloads_total", "model=second", "reason=ejected"] == 1
    assert router.chat("broken").status_code == 503
    told = wait_for(router, 1, "router_model_unloads_total", "model=broken", "reason=failed")
    assert told["router_model_loads_total", "model=broken", "result=failed"] == 2
    assert told["router_backend_exits_total", "kind=exited", "model=broken"] == 2
    assert told["router_backend_restarts_total", "model=broken"] == 1
    assert told["router_model_state", "model=broken", "state=failed"] == 1
    assert router.chat("slow").status_code == 504
    wait_for(router, 1, "router_model_loads_total", "model=slow", "result=timeout")
    router.post("/v1/models/eject", {"model": "slow"})
    assert router.chat("second").status_code == 200
    wait_for(router, 1, "router_model_unloads_total", "model=second", "reason=idle")


def test_a_llama_server_that_is_killed(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    assert router.chat("qwen").status_code == 200
    assert router.get("/v1/health/models").json()["qwen"]["status"] == "healthy"
    (pid,) = router.servers()
    os.kill(pid, 9)
    told = wait_for(router, 1, "router_backend_restarts_total", "model=qwen")
    assert told["router_backend_exits_total", "kind=killed", "model=qwen"] == 1
    wait_for(router, 2, "router_model_loads_total", "model=qwen", "result=ok")
    assert router.get("/v1/health/models").json()["qwen"]["uptime_percentage"] < 100


def test_metrics_of_the_llama_servers(start_router: StartRouter) -> None:
    router = start_router(models={"qwen": ["-np", "2"], "with/slash": [], "off": []})
    for alias in ("qwen", "with/slash"):
        assert router.chat(alias).status_code == 200
    text = router.get("/metrics/backends").text
    told = samples(text)
    for alias in ("qwen", "with/slash"):
        assert told["llamacpp:tokens_predicted_total", f"model={alias}"] == 4
        assert told["llamacpp:requests_processing", f"model={alias}"] == 0
    assert text.count("# TYPE llamacpp:tokens_predicted_total counter") == 1
    assert not any("model=off" in series for series in told)
    router.post("/v1/models/eject", {"model": "qwen"})
    assert len(samples(router.get("/metrics/backends").text)) == 2


def test_footprints_are_there_when_it_is_ready(start_router: StartRouter) -> None:
    router = start_router(qwen=[], lost={"model_path": "nowhere.gguf"})
    told = router.get("/v1/models/qwen/footprint").json()
    assert told["total_mb"] > 0
    assert {part["source"] for part in told["parts"]} >= {"header", "formula", "vram_multiplier"}
    assert router.status("qwen")["vram_mb"] == 0  # gpu_devices = []: all of it is on the host
    told = router.get("/v1/models/lost/footprint").json()
    assert (told["parts"], told["vram_mb"]) == ([], None)
    assert "nowhere.gguf" in told["note"]
    assert router.get("/v1/models/nobody/footprint").status_code == 404


def test_draining_is_not_ready(start_router: StartRouter, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    router = start_router(qwen=[])
    held = router.in_background("qwen", fake={"hold_until": str(gate)})
    wait_for(router, 1, "router_active_requests", "model=qwen")
    router.terminate()
    told = wait_for(router, 0, "router_ready")
    assert told["router_active_requests", "model=qwen"] == 1
    assert router.get("/readyz").status_code == 503
    assert router.get("/livez").status_code == 200
    gate.touch()
    assert held.answer().status_code == 200
    assert router.wait() == 0


def test_openmetrics(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    answer = router.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.text.endswith("# EOF\n")
    assert router.get("/metrics").headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_promtool_finds_nothing_to_say(start_router: StartRouter) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        if os.environ.get(REQUIRED):
            pytest.fail(f"no promtool, and {REQUIRED} is set")
        pytest.skip("no promtool: it is in the package `prometheus` of Debian and Ubuntu")
    router = start_router(qwen=[])
    assert router.chat("qwen").status_code == 200
    for path in ("/metrics", "/metrics/backends"):
        found = subprocess.run(
            [promtool, "check", "metrics"], input=router.get(path).content, capture_output=True, check=False, timeout=30
        )
        assert b"error" not in found.stderr, (path, found)
        if path == "/metrics":  # the other's names are llama.cpp's
            assert (found.returncode, found.stdout, found.stderr) == (0, b"", b""), found


def test_a_scrape_of_fifty_models_is_quick(start_router: StartRouter) -> None:
    router = start_router(models={f"model-{number}": [] for number in range(50)})
    router.get("/metrics")
    slowest = []
    pending = router.in_background("model-0", fake={"tokens": 300, "token_seconds": 0.002}, stream=True)
    while not pending.done:
        before = time.monotonic()
        assert router.get("/metrics").status_code == 200
        slowest.append(time.monotonic() - before)
    assert pending.answer().status_code == 200
    assert min(slowest) < 1.0
