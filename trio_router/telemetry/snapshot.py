"""What `/metrics/stream` sends: the live numbers of a board, in one object."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from trio_router.telemetry.facts import DeviceFacts, Devices, Fleet, ModelFacts
from trio_router.telemetry.summary import HOUR_SECONDS, Summary
from trio_router.telemetry.window import Counts

MIB = 1024 * 1024


def metrics_snapshot(registry: Fleet, devices: Devices, summary: Summary) -> dict[str, Any]:
    """The payload of one `metrics` event (CONTRACT 5). Sizes in MiB; a number that nobody knows is None."""
    facts = registry.facts()
    whole = Counts()
    models = []
    for model in facts.models:
        minute = summary.minute(model.alias)
        whole.add(minute)
        models.append({"alias": model.alias, "status": model.state, **_numbers([model], minute)})
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "server": {"status": facts.phase, "uptime_seconds": facts.uptime_seconds},
        "gpu": gpu_numbers(devices.snapshot.devices),
        "models": models,
        "totals": _numbers(facts.models, whole),
    }


def _numbers(models: Sequence[ModelFacts], minute: Counts) -> dict[str, Any]:
    return {
        "vram_mb": round(sum(model.vram_bytes for model in models) / MIB),
        "queue_depth": sum(model.waiting for model in models),
        "active_requests": sum(model.slots_busy for model in models),
        "requests_1m": minute.requests,
        "errors_1m": minute.errors,
        "avg_latency_ms": minute.mean_ms,
        "first_token_ms": minute.first_token_ms,
        "tokens_1m": minute.output_tokens,
    }


def gpu_numbers(devices: Sequence[DeviceFacts]) -> dict[str, Any]:
    """All GPUs as one: sums of memory over those that tell theirs, the mean utilisation."""
    told = [device for device in devices if device.total_bytes]
    total = sum(device.total_bytes or 0 for device in told)
    used = sum(device.used_bytes or 0 for device in told)
    free = sum(device.free_bytes or 0 for device in told)
    busy = [device.utilization_percent for device in devices if device.utilization_percent is not None]
    return {
        "vram_total_mb": round(total / MIB) if told else None,
        "vram_used_mb": round(used / MIB) if told else None,
        "vram_free_mb": round(free / MIB) if told else None,
        "vram_used_percent": round(100 * used / total, 2) if told else None,
        "utilization_percent": round(sum(busy) / len(busy), 1) if busy else None,
    }


def telemetry_summary(summary: Summary) -> dict[str, Any]:
    """GET /v1/telemetry/summary: the last hour. Nothing asked is a success rate of 100 % and no latency."""
    report = summary.report()
    counts = report.counts
    return {
        "window_seconds": HOUR_SECONDS,
        "total_requests": counts.requests,
        "success_count": counts.succeeded,
        "error_count": counts.errors,
        "success_rate": round(100 * counts.succeeded / counts.requests, 2) if counts.requests else 100.0,
        "avg_latency_ms": counts.mean_ms or 0.0,
        "p50_latency_ms": _milliseconds(report.p50),
        "p95_latency_ms": _milliseconds(report.p95),
        "p99_latency_ms": _milliseconds(report.p99),
        "tokens_generated": counts.output_tokens,
        "tokens_read": counts.input_tokens,
        "requests_by_model": report.by_model,
        "errors_by_type": dict(counts.errors_by_type),
    }


def _milliseconds(seconds: float | None) -> float:
    return round((seconds or 0.0) * 1000, 3)
