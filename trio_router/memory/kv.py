"""Bytes of the caches llama-server allocates when it loads a model.

Source: llama.cpp `src/llama-context.cpp` (context per sequence), `src/llama-kv-cache.cpp`,
`src/llama-kv-cache-iswa.cpp` (sliding windows), `src/llama-memory-recurrent.cpp`.
"""

from typing import Final

import attrs

from trio_router.memory import ggml
from trio_router.memory.gguf import GgufHeader
from trio_router.memory.hparams import HeaderLacks, Layer, layers_of, number
from trio_router.memory.settings import MemorySettings

_PAD: Final = 256
_F32: Final = 4


@attrs.frozen(kw_only=True)
class LayerCache:
    """What one layer takes, over all slots."""

    layer: int
    bytes: int


def _padded(cells: int) -> int:
    return -(-cells // _PAD) * _PAD


def cells_per_stream(header: GgufHeader, settings: MemorySettings) -> int:
    """Tokens of cache in one stream: what one slot has, or what all share. Raises HeaderLacks."""
    context = settings.context or number(header, "context_length")
    if not context:
        raise HeaderLacks("context_length")
    context = _padded(context)
    return context if settings.unified else max(_PAD, _padded(context // settings.slots))


def _cells(layer: Layer, full: int, settings: MemorySettings) -> int:
    if layer.window is None or settings.full_windows:
        return full
    sequences = settings.slots if settings.unified else 1
    return _padded(min(full, layer.window * sequences + settings.micro_batch))


def layer_caches(header: GgufHeader, settings: MemorySettings) -> tuple[LayerCache, ...]:
    """The cache of each layer: K and V per token and stream, recurrent states per sequence. Raises HeaderLacks."""
    layers = layers_of(header)
    full = cells_per_stream(header, settings) if any(layer.key_width for layer in layers) else 0
    streams = 1 if settings.unified else settings.slots
    caches = []
    for layer in layers:
        per_token = (
            ggml.row_bytes(settings.type_k, layer.key_width)
            + ggml.row_bytes(settings.type_v, layer.value_width)
            + ggml.row_bytes(settings.type_k, layer.index_width)
        )
        tokens = _cells(layer, full, settings) * streams
        caches.append(
            LayerCache(layer=layer.number, bytes=tokens * per_token + settings.slots * layer.state_width * _F32)
        )
    return tuple(caches)
