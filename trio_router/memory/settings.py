"""The flags of a model that decide how much memory it takes.

Source: llama.cpp `common/arg.cpp` (names, defaults), `src/llama-context.cpp` (how they act on each other). What
llama-server would refuse is read as if it were not there: it never gets as far as memory.
"""

import re
from collections.abc import Sequence
from typing import Final

import attrs

from trio_router.config.flags import flag_name, last_value
from trio_router.config.schema import ModelConfig
from trio_router.memory import ggml

_F16: Final = ggml.CACHE_TYPES["f16"]
_BATCH: Final = 2048
_MICRO_BATCH: Final = 512

CONTEXT: Final = frozenset({"-c", "--ctx-size"})
GPU_LAYERS: Final = frozenset({"-ngl", "--gpu-layers", "--n-gpu-layers"})
DEVICE: Final = frozenset({"-dev", "--device"})
TYPE_K: Final = frozenset({"-ctk", "--cache-type-k"})
TYPE_V: Final = frozenset({"-ctv", "--cache-type-v"})
BATCH: Final = frozenset({"-b", "--batch-size"})
MICRO_BATCH: Final = frozenset({"-ub", "--ubatch-size"})
FLASH_ATTENTION: Final = frozenset({"-fa", "--flash-attn"})
CPU_EXPERT_LAYERS: Final = frozenset({"-ncmoe", "--n-cpu-moe"})
DRAFT_GPU_LAYERS: Final = frozenset({"-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft", "--spec-draft-ngl"})
DRAFT_DEVICE: Final = frozenset({"-devd", "--device-draft", "--spec-draft-device"})
DRAFT_TYPE_K: Final = frozenset({"-ctkd", "--cache-type-k-draft", "--spec-draft-type-k"})
DRAFT_TYPE_V: Final = frozenset({"-ctvd", "--cache-type-v-draft", "--spec-draft-type-v"})
EMBEDDING: Final = frozenset({"--embedding", "--embeddings", "--rerank", "--reranking"})
PROJECTOR: Final = frozenset({"-mm", "--mmproj"})
DRAFT: Final = frozenset({"-md", "--model-draft", "--spec-draft-model"})


FIT: Final = frozenset({"-fit", "--fit"})


def says_all(flags: Sequence[str], *, gpu: bool = True) -> bool:
    """Whether context and, where there may be a `gpu`, layers are said, so that nothing is left to llama-server's `--fit`."""
    if not gpu:
        return last_value(flags, CONTEXT) is not None
    layers = last_value(flags, GPU_LAYERS)
    return last_value(flags, CONTEXT) is not None and layers is not None and layers != "auto" and layers[:1] != "-"


def may_shrink(flags: Sequence[str]) -> bool:
    """Whether llama-server makes the model smaller when memory is short: by `--fit`, which we turn off if all is said."""
    fit = last_value(flags, FIT)
    return not says_all(flags) if fit is None else fit != "off"


@attrs.frozen(kw_only=True)
class MemorySettings:
    """How one model is loaded, as far as memory goes."""

    context: int | None = None
    """Tokens over all slots; None: the model's own context length."""
    slots: int = 1
    unified: bool = False
    """One cache shared by all slots, instead of one stream each."""
    gpu_layers: int | None = None
    """Layers on the device, counted from the output layer down; None: all."""
    type_k: int = _F16
    """ggml type of the K cache."""
    type_v: int = _F16
    micro_batch: int = _MICRO_BATCH
    """Tokens computed at once."""
    outputs: int = 1
    """Tokens of a batch that logits are computed for: one per slot, or all of them for embeddings."""
    full_windows: bool = False
    """Sliding-window layers get a cache of full size."""
    cache_on_device: bool = True
    """Whether the cache of an offloaded layer is on the device too."""
    flash_attention: bool = True
    """`auto` counts as on: devices that cannot do it are rare."""
    cpu_expert_layers: int = 0
    """The experts of so many first layers stay on the host."""
    projector_on_device: bool = True


def _int(flags: Sequence[str], names: frozenset[str]) -> int | None:
    value = last_value(flags, names)
    return int(value) if value is not None and re.fullmatch(r"-?[0-9]{1,12}", value) else None


def _switch(flags: Sequence[str], on: frozenset[str], off: frozenset[str], *, default: bool) -> bool:
    """The last of a pair of flags without value."""
    state = default
    for name in map(flag_name, flags):
        state = (state or name in on) and name not in off
    return state


def _layers(flags: Sequence[str], layers: frozenset[str], device: frozenset[str]) -> int | None:
    if last_value(flags, device) == "none":
        return 0
    count = _int(flags, layers)
    return None if count is None or count < 0 else count


def _cache_type(flags: Sequence[str], names: frozenset[str]) -> int:
    return ggml.CACHE_TYPES.get(last_value(flags, names) or "f16", _F16)


def settings_of(model: ModelConfig) -> MemorySettings:
    """What the model's flags and slots say about memory."""
    flags = model.flags
    batch = max(1, _int(flags, BATCH) or _BATCH)
    all_experts = _switch(flags, frozenset({"-cmoe", "--cpu-moe"}), frozenset(), default=False)
    micro_batch = min(batch, max(1, _int(flags, MICRO_BATCH) or _MICRO_BATCH))
    embeds = _switch(flags, EMBEDDING, frozenset(), default=False)
    return MemorySettings(
        context=max(0, _int(flags, CONTEXT) or 0) or None,
        slots=model.slots,
        unified=_switch(
            flags, frozenset({"-kvu", "--kv-unified"}), frozenset({"-no-kvu", "--no-kv-unified"}), default=False
        ),
        gpu_layers=_layers(flags, GPU_LAYERS, DEVICE),
        type_k=_cache_type(flags, TYPE_K),
        type_v=_cache_type(flags, TYPE_V),
        micro_batch=micro_batch,
        outputs=micro_batch if embeds else model.slots,
        full_windows=_switch(flags, frozenset({"--swa-full"}), frozenset(), default=False),
        cache_on_device=_switch(
            flags, frozenset({"-kvo", "--kv-offload"}), frozenset({"-nkvo", "--no-kv-offload"}), default=True
        ),
        flash_attention=last_value(flags, FLASH_ATTENTION) not in {"off", "0", "false", "disabled"},
        cpu_expert_layers=2**31 if all_experts else max(0, _int(flags, CPU_EXPERT_LAYERS) or 0),
        projector_on_device=_switch(
            flags, frozenset({"--mmproj-offload"}), frozenset({"--no-mmproj-offload"}), default=True
        ),
    )


def draft_settings_of(model: ModelConfig) -> MemorySettings:
    """The same for the model that drafts: its own layers and cache types, the rest of the main model."""
    return attrs.evolve(
        settings_of(model),
        gpu_layers=_layers(model.flags, DRAFT_GPU_LAYERS, DRAFT_DEVICE),
        type_k=_cache_type(model.flags, DRAFT_TYPE_K),
        type_v=_cache_type(model.flags, DRAFT_TYPE_V),
        cpu_expert_layers=0,
    )
