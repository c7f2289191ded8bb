"""A model with flags that take less memory than its own: the steps of `models.<alias>.on_oom`."""

from typing import Final

import attrs

from trio_router.config.schema import ModelConfig, OomStep
from trio_router.memory.gguf import GgufError, GgufHeader, read_header
from trio_router.memory.hparams import HeaderLacks, block_count, number
from trio_router.memory.settings import settings_of

LEAST_CONTEXT: Final = 512
"""Tokens of one slot below which a context is not made smaller."""
CELLS: Final = 256
"""llama-server rounds contexts to a multiple of it."""


@attrs.frozen(kw_only=True)
class Lighter:
    """What became of it."""

    model: ModelConfig
    change: str
    """In words, for the status."""


def lighter(model: ModelConfig, step: OomStep) -> Lighter | None:
    """`model` after one step; None if it cannot get any lighter that way. Reads the header of its file: blocks."""
    try:
        match step:
            case OomStep.SMALLER_CONTEXT:
                return _smaller_context(model)
            case OomStep.FEWER_LAYERS:
                return _fewer_layers(model)
    except (GgufError, HeaderLacks):
        return None


def _smaller_context(model: ModelConfig) -> Lighter | None:
    """Half of it."""
    now = settings_of(model).context or number(_header(model), "context_length")
    unit = CELLS * model.slots
    less = 0 if now is None else now // 2 // unit * unit
    if now is None or less < LEAST_CONTEXT * model.slots:
        return None
    return _with(model, ("-c", str(less)), f"smaller_context: {now} -> {less} tokens")


def _fewer_layers(model: ModelConfig) -> Lighter | None:
    """Three quarters of those on the GPU; the output layer counts as one."""
    there = block_count(_header(model)) + 1
    wanted = settings_of(model).gpu_layers
    now = there if wanted is None else min(wanted, there)
    if now == 0:
        return None
    less = now * 3 // 4
    return _with(model, ("-ngl", str(less)), f"fewer_layers: {now} -> {less} on the GPU")


def _header(model: ModelConfig) -> GgufHeader:
    return read_header(model.file)


def _with(model: ModelConfig, flags: tuple[str, ...], change: str) -> Lighter:
    """The last of several equal flags is the one that llama-server goes by."""
    return Lighter(model=attrs.evolve(model, flags=(*model.flags, *flags)), change=change)
