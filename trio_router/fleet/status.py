"""What users see of a model: the contract's objects, made from what is true now."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from trio_router.backend.lifecycle import State
from trio_router.fleet.model import Model
from trio_router.fleet.registry import Registry
from trio_router.fleet.ticket import Priority
from trio_router.memory.room import RAM

MIB = 1024 * 1024

PRIORITY_LABELS = tuple(priority.label for priority in Priority)
LISTED = {
    State.OFF: "unloaded",
    State.STARTING: "loading",
    State.LOADING: "loading",
    State.READY: "loaded",
    State.STOPPING: "unloaded",
    State.CRASHED: "loading",
    State.FAILED: "failed",
}
"""`status.value` of GET /v1/models: llama-server's own words for our states."""


def timestamp(unix: float | None) -> str | None:
    """ISO 8601 in UTC, with offset; None stays None."""
    return None if unix is None else datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds")


def listing(registry: Registry) -> dict[str, Any]:
    """GET /v1/models: every model, and every variant as one of its own; other names stand with theirs."""
    return {"object": "list", "data": [listed(registry, said) for said in registry.names.listed()]}


def listed(registry: Registry, said: str) -> dict[str, Any]:
    """An entry of GET /v1/models, for what a client calls a model. Raises UnknownModel."""
    model = registry.model(said)
    name = registry.names[said]
    told = {"name": name.policy.name, "description": name.policy.description}
    return {
        "id": said,
        "object": "model",
        "created": model.created,
        "owned_by": "user",
        "n_ctx": model.supervisor.context,
        "path": str(model.config.file),
        "aliases": list(model.config.policy.aliases) if said == model.alias else [],
        **{key: text for key, text in told.items() if text is not None},
        "architecture": {"input_modalities": _reads(model.config.flags), "output_modalities": ["text"]},
        "status": _listed_status(model),
    }


def _reads(flags: Sequence[str]) -> list[str]:
    projector = any(flag.partition("=")[0] in {"--mmproj", "-mm", "--mmproj-url", "-mmu"} for flag in flags)
    return ["text", "image"] if projector else ["text"]


def _listed_status(model: Model) -> dict[str, Any]:
    """As llama-server's router has it; what failed says so besides."""
    told: dict[str, Any] = {"value": LISTED[model.state], "args": ["llama-server", *model.config.flags]}
    if model.state is State.FAILED:
        told |= {"failed": True, "exit_code": 1}
    return told


def status(model: Model) -> dict[str, Any]:
    """A status object."""
    supervisor = model.supervisor
    address = supervisor.address
    queue = model.scheduler.statistics()
    held = model.device_bytes()
    layers = supervisor.weighing.said.layers
    return {
        "alias": model.alias,
        "status": model.state.value,
        "port": None if address is None else address.port,
        "vram_mb": None if model.footprint_bytes is None else round(model.footprint_bytes / MIB),
        "vram_used_mb": round(sum(held.values()) / MIB) if held else None,
        "ram_mb": None if model.footprint is None else round(model.footprint.host_bytes / MIB),
        "reserved_mb": in_mebibytes(model.reserved()),
        "adjusted": list(model.relief.adjusted),
        "pinned": model.config.pinned,
        "load_progress": model.load_progress,
        "started_at": timestamp(supervisor.started_at) if model.state.resident else None,
        "last_used_at": timestamp(model.last_used_at),
        "updated_at": timestamp(supervisor.updated_at),
        "error_message": supervisor.error,
        "pid": supervisor.pid,
        "incarnation": supervisor.incarnation,
        "slots": model.config.slots,
        "active": queue.active,
        "queued": queue.waiting,
        "queued_by_priority": dict(zip(PRIORITY_LABELS, queue.waiting_by_priority, strict=True)),
        "n_ctx": supervisor.context,
        "gpu_layers": None if layers is None else {"on_gpus": layers[0], "of": layers[1]},
        "fitted": list(supervisor.weighing.said.fitted),
        "vram_source": None if model.footprint is None else model.footprint.trust.value,
        "load_duration_sec": supervisor.load_seconds,
        "replicas": [_replica(replica) for replica in model.replicas],
    }


def _replica(model: Model) -> dict[str, Any]:
    """What is its own; the queue and the rest are the model's that it serves."""
    held = model.device_bytes()
    return {
        "name": model.alias,
        "status": model.state.value,
        "pid": model.supervisor.pid,
        "incarnation": model.supervisor.incarnation,
        "active": model.scheduler.active,
        "vram_used_mb": round(sum(held.values()) / MIB) if held else None,
        "load_progress": model.load_progress,
        "error_message": model.supervisor.error,
    }


def in_mebibytes(sizes: Mapping[int, int]) -> dict[str, int]:
    """Bytes by device, as people read and name it."""
    return {"ram" if device == RAM else str(device): round(size / MIB) for device, size in sizes.items()}


def fleet_status(registry: Registry) -> dict[str, Any]:
    """GET /v1/models/status."""
    models = {alias: status(model) for alias, model in registry.models.items()}
    summary: dict[str, int] = {"total": len(models)}
    for one in models.values():
        summary[one["status"]] = summary.get(one["status"], 0) + 1
    return {"server": server_status(registry), "models": models, "summary": summary}


def server_status(registry: Registry) -> dict[str, Any]:
    """The router itself."""
    return {
        "status": registry.phase,
        "started_at": timestamp(registry.started_at),
        "updated_at": timestamp(registry.updated_at),
        "uptime_seconds": registry.uptime_seconds,
    }
