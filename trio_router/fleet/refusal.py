"""What those are told who wait for a model that can never be loaded, and what would have to change."""

from collections.abc import Sequence

from trio_router.config.schema import SystemConfig
from trio_router.errors import InsufficientMemory
from trio_router.fleet.model import Model
from trio_router.memory.ledger import MIB
from trio_router.memory.room import Shortage

_GIB = 1024 * MIB


def no_room(
    model: Model, shortage: Shortage | None, models: Sequence[Model], system: SystemConfig
) -> InsufficientMemory:
    """The error, with the numbers; `shortage` None: it is places that are short, not memory."""
    pinned = [one.alias for one in models if one.pinned and one.state.resident]
    unpin = [f"unpin {' or '.join(map(repr, pinned[:3]))}"] if pinned else []
    if shortage is None:
        found = f"pinned models have every place that there is ({system.max_concurrent_models})"
        changes = [*unpin, "raise system.max_concurrent_models"]
    elif shortage.ram:
        found = f"needs {_gib(shortage.required_bytes)} of the host's memory, of which models may take {_gib(shortage.available_bytes)}"
        changes = ["a smaller context (-c)", *unpin, "raise system.ram_budget_mb"]
    else:
        found = f"needs {_gib(shortage.required_bytes)} on {_where(model)}, where at most {_gib(shortage.available_bytes)} can be free"
        changes = ["a smaller context (-c)", "fewer layers on the GPU (-ngl)", *unpin]
    return InsufficientMemory(
        f"model {model.alias!r}: {found}; what would help: {', '.join(changes)}",
        param="model",
        details={
            "model": model.alias,
            "required_mb": None if shortage is None else _mib(shortage.required_bytes),
            "available_mb": None if shortage is None else _mib(shortage.available_bytes),
            "loaded_models": [one.alias for one in models if one.state.resident],
        },
    )


def _where(model: Model) -> str:
    need = model.need()
    seen = [device.index for device in model.seen.devices]
    allowed = seen if need is None or need.devices is None else need.devices
    return "gpu " + " and ".join(map(str, allowed))


def _mib(size: int) -> int:
    return round(size / MIB)


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{_mib(size)} MiB"
