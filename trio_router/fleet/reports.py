"""The reports of the monitoring endpoints, as JSON objects: queues, health, memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from trio_router.backend.lifecycle import State
from trio_router.fleet.model import Model
from trio_router.fleet.registry import Registry
from trio_router.fleet.status import MIB, in_mebibytes, timestamp
from trio_router.memory.devices import Device, Snapshot
from trio_router.memory.footprint import Part, Place
from trio_router.memory.room import RAM, Room
from trio_router.telemetry.snapshot import gpu_numbers
from trio_router.telemetry.summary import Summary

WARNING_PERCENT = 80.0
CRITICAL_PERCENT = 95.0


def mebibytes(size: int | None) -> int | None:
    """`size` bytes as people read it; None stays None."""
    return None if size is None else round(size / MIB)


def queue_stats(registry: Registry, summary: Summary) -> dict[str, Any]:
    """GET /v1/queue/stats: what waits and runs now, and what became of the rest since the start."""
    per_model = {}
    for alias, model in registry.models.items():
        queue = model.scheduler.statistics()
        totals = summary.totals(alias)
        per_model[alias] = {
            "queue_length": queue.waiting,
            "total_requests": totals.requests,
            "total_processed": totals.processed,
            "total_rejected": totals.rejected,
            "current_processing": queue.active,
            "processing": queue.active > 0,
            "by_priority": dict(model.facts().waiting_by_priority),
        }
    return {
        "summary": {
            "total_queued": sum(one["queue_length"] for one in per_model.values()),
            "total_processing": sum(one["current_processing"] for one in per_model.values()),
            "total_processed": sum(one["total_processed"] for one in per_model.values()),
            "total_rejected": sum(one["total_rejected"] for one in per_model.values()),
        },
        "per_model": per_model,
    }


def models_health(registry: Registry, summary: Summary) -> dict[str, Any]:
    """GET /v1/health/models: models that are loaded, or were until they died and are being restarted."""
    return {alias: _health(model, summary) for alias, model in registry.models.items() if _is_loaded(model)}


def _is_loaded(model: Model) -> bool:
    return model.state.resident and model.was_ready and model.state is not State.STOPPING


def _health(model: Model, summary: Summary) -> dict[str, Any]:
    health = model.supervisor.health
    times = health.response_seconds
    well = "degraded" if health.consecutive_failures else "healthy"
    return {
        "status": well if model.state is State.READY else "down",
        "uptime_percentage": summary.uptime_percentage(model.alias),
        "consecutive_failures": health.consecutive_failures,
        "avg_response_time_ms": round(1000 * sum(times) / len(times), 3) if times else None,
        "last_check": timestamp(health.last_check),
        "last_error": health.last_error,
    }


def vram_report(registry: Registry, devices: Snapshot) -> dict[str, Any]:
    """GET /vram. `unavailable` without a GPU that tells its memory; everything else is there all the same."""
    gpu = gpu_numbers(devices.devices)
    everyone = [one for model in registry.models.values() for one in (model, *model.replicas)]
    resident = [model for model in everyone if model.state.resident]
    room = registry.room()
    free = {index: max(0, size) for index, size in room.free.items()}
    return {
        "status": vram_status(devices.devices),
        "message": devices.message,
        "stale": devices.stale,
        "gpu_info": {
            "total_mb": gpu["vram_total_mb"],
            "used_mb": gpu["vram_used_mb"],
            "free_mb": gpu["vram_free_mb"],
            "usage_percentage": gpu["vram_used_percent"],
        },
        "gpus": [{**_gpu(device), **_reserved(registry, device.index, free)} for device in devices.devices],
        "ram": _reserved(registry, RAM, free),
        "models": [_model_memory(model, devices.devices) for model in resident],
        "loaded_models_count": sum(model.state is State.READY for model in resident),
        "can_load_more": _can_load_more(registry, resident, room),
        "estimated_free_for_new_model_mb": mebibytes(sum(free[index] for index in free if index != RAM))
        if free.keys() - {RAM}
        else None,
    }


def vram_status(devices: Sequence[Device]) -> str:
    """By the fullest device: healthy below 80 %, warning below 95 %, critical; unavailable when none tells."""
    told = [percent for device in devices if (percent := _percent(device)) is not None]
    if not told:
        return "unavailable"
    fullest = max(told)
    return "healthy" if fullest < WARNING_PERCENT else "warning" if fullest < CRITICAL_PERCENT else "critical"


def _percent(device: Device) -> float | None:
    if not device.total_bytes or device.used_bytes is None:
        return None
    return round(100 * device.used_bytes / device.total_bytes, 2)


def _gpu(device: Device) -> dict[str, Any]:
    return {
        "index": device.index,
        "uuid": device.uuid,
        "name": device.name,
        "total_mb": mebibytes(device.total_bytes),
        "used_mb": mebibytes(device.used_bytes),
        "free_mb": mebibytes(device.free_bytes),
        "usage_percentage": _percent(device),
        "utilization_percent": device.utilization_percent,
        "temperature_celsius": device.temperature_celsius,
        "power_watts": device.power_watts,
    }


def _model_memory(model: Model, devices: Sequence[Device]) -> dict[str, Any]:
    facts = model.facts()
    total = sum(device.total_bytes or 0 for device in devices)
    return {
        "model_alias": model.alias,
        "status": model.state.value,
        "vram_used_mb": mebibytes(facts.vram_bytes),
        "vram_percentage": round(100 * facts.vram_bytes / total, 2) if total else None,
        "vram_source": "measured" if facts.device_bytes else "projected",
        "vram_projected_mb": mebibytes(model.footprint_bytes),
        "reserved_mb": in_mebibytes(model.reserved()),
        "gpus": {str(index): mebibytes(size) for index, size in facts.device_bytes.items()},
        "load_duration_sec": model.supervisor.load_seconds,
    }


def _reserved(registry: Registry, device: int, free: Mapping[int, int]) -> dict[str, Any]:
    """What the ledger says of a device."""
    held = sum(one.spot.bytes.get(device, 0) for one in registry.ledger.held.values())
    return {"reserved_mb": mebibytes(held), "free_for_new_model_mb": mebibytes(free.get(device))}


def _can_load_more(registry: Registry, resident: Sequence[Model], room: Room) -> bool:
    """Whether one of the models that are not in memory could be loaded without another having to leave."""
    if len(resident) >= registry.config.system.max_concurrent_models:
        return False
    others = [model for model in registry.models.values() if model.state is State.OFF]
    return any(room.spot(model.need(room)) is not None for model in others)


def footprint_report(model: Model) -> dict[str, Any]:
    """GET /v1/models/{alias}/footprint: each part of what a model is projected to need, and where it comes from."""
    footprint = model.footprint
    held = model.device_bytes()
    return {
        "model": model.alias,
        "vram_mb": mebibytes(model.footprint_bytes),
        "reserve_mb": None if footprint is None else mebibytes(footprint.device_bytes),
        "source": None if footprint is None else footprint.trust.value,
        "host_mb": None if footprint is None else mebibytes(footprint.host_bytes),
        "total_mb": None if footprint is None else mebibytes(footprint.total_bytes),
        "vram_used_mb": mebibytes(sum(held.values())) if held else None,
        "reserved_mb": in_mebibytes(model.reserved()),
        "parts": [] if footprint is None else [_part(part) for part in footprint.parts],
        "note": model.footprint_problem if footprint is None else footprint.note,
    }


def _part(part: Part) -> dict[str, Any]:
    return {
        "name": part.name,
        "bytes": part.bytes,
        "mb": round(part.bytes / MIB, 2),
        "place": "gpu" if part.place is Place.DEVICE else "host",
        "source": part.source,
    }
