import json
from datetime import datetime

from tests.telemetry.facts import GIB, Fleet, Gpu, Gpus, fleet, model
from tests.telemetry.test_summary import Clock, finished
from trio_router.telemetry.events import Outcome
from trio_router.telemetry.snapshot import metrics_snapshot
from trio_router.telemetry.summary import Summary

TOLD = fleet(model("qwen", slots_busy=1, waiting=2, vram_bytes=4 * GIB), model("llama", state="off"), phase="draining")


def test_the_contracts_keys() -> None:
    summary = Summary(["qwen", "llama"], Clock())
    summary.requests([finished("qwen", seconds=0.5, output_tokens=7, first_token_seconds=0.25)])
    summary.requests([finished("qwen", seconds=1.5, output_tokens=3)])
    summary.requests([finished("llama", Outcome.REJECTED)])
    told = metrics_snapshot(Fleet(TOLD), Gpus((Gpu(), Gpu(index=1, utilization_percent=8))), summary)
    assert datetime.fromisoformat(told.pop("timestamp")).utcoffset() is not None
    assert told["server"].pop("uptime_seconds") > 0
    numbers = {
        "vram_mb": 4096, "queue_depth": 2, "active_requests": 1, "tokens_1m": 10, "avg_latency_ms": 1000.0,
        "first_token_ms": 250.0,
    }  # fmt: skip
    assert told == {
        "server": {"status": "draining"},
        "gpu": {
            "vram_total_mb": 163840,
            "vram_used_mb": 40960,
            "vram_free_mb": 122880,
            "vram_used_percent": 25.0,
            "utilization_percent": 25.0,
        },
        "models": [
            {"alias": "qwen", "status": "ready", **numbers, "requests_1m": 2, "errors_1m": 0},
            {
                "alias": "llama",
                "status": "off",
                "vram_mb": 0,
                "queue_depth": 0,
                "active_requests": 0,
                "requests_1m": 1,
                "errors_1m": 1,
                "avg_latency_ms": None,
                "first_token_ms": None,
                "tokens_1m": 0,
            },
        ],
        "totals": {**numbers, "requests_1m": 3, "errors_1m": 1},
    }


def test_without_a_gpu() -> None:
    unified = Gpu(total_bytes=None, used_bytes=None, free_bytes=None, utilization_percent=None)
    for gpus in (Gpus(), Gpus((unified,))):
        told = metrics_snapshot(Fleet(fleet()), gpus, Summary([]))
        assert set(told["gpu"].values()) == {None}
        assert json.loads(json.dumps(told)) == told
