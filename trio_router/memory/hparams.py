"""A model's layers, as far as its caches go: what each keeps per token, per window or per sequence.

The header is read the way llama.cpp reads it: `src/llama-model.cpp` (`load_hparams`), `src/models/*.cpp` (what an
architecture sets by itself), `src/llama-hparams.cpp` (widths), `src/llama-kv-cache-dsa.cpp` (the indexer).
"""

import re
from collections.abc import Mapping
from typing import Final

import attrs

from trio_router.memory.gguf import GgufHeader

MAX_LAYERS: Final = 2048
_MAX_NUMBER: Final = 2**40
_BLOCK: Final = re.compile(r"blk\.(\d{1,6})\.([^.]+)")

NO_CACHE: Final = frozenset(
    {
        *{
            "bert",
            "modern-bert",
            "nomic-bert",
            "nomic-bert-moe",
            "neo-bert",
            "jina-bert-v2",
            "jina-bert-v3",
            "eurobert",
        },
        *{"gemma-embedding", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1"},
    }
)
"""Architectures that see all tokens at once and remember none (`llama_model::create_memory`)."""

_INDEXED: Final = frozenset({"deepseek32", "glm-dsa"})


class HeaderLacks(Exception):
    """Raised when the header does not have, or not within reason, what the formula needs."""


@attrs.frozen
class _Windows:
    """Which layers of an architecture slide, where the header does not list them (`set_swa_pattern`)."""

    period: int
    """One layer of so many sees everything: the last one,"""
    dense_first: bool = False
    """or the first one."""
    tokens: int | None = None
    """Width of the window where the header has none; None: then nothing slides."""


_WINDOWS: Final[Mapping[str, _Windows]] = {
    "gpt-oss": _Windows(2),
    "gemma2": _Windows(2, tokens=4096),
    "gemma3": _Windows(6),
    "gemma3n": _Windows(5),
    "cohere2": _Windows(4),
    "exaone4": _Windows(4),
    "olmo2": _Windows(4),
    "mellum": _Windows(4),
    "exaone-moe": _Windows(4, tokens=128),
    "afmoe": _Windows(4),
    "plamo3": _Windows(8),
    "llama4": _Windows(4, tokens=8192),
    "smallthinker": _Windows(4, dense_first=True),
    "laguna": _Windows(4, dense_first=True),
    "cohere2moe": _Windows(4, dense_first=True),
}


@attrs.frozen(kw_only=True)
class Layer:
    """What one layer keeps. Zeros: nothing."""

    number: int
    key_width: int = 0
    """Numbers of K per token."""
    value_width: int = 0
    window: int | None = None
    """Tokens it looks back; None: all."""
    index_width: int = 0
    """Numbers per token of the sparse attention's index, of K's type."""
    state_width: int = 0
    """Numbers (f32) per sequence, of a recurrent layer."""


def number(header: GgufHeader, key: str) -> int | None:
    """A count in the header; None if it is missing, not a count, or absurd."""
    value = header.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_NUMBER:
        return value
    return None


def block_count(header: GgufHeader) -> int:
    """Blocks in the file, those that only predict further tokens included."""
    blocks = number(header, "block_count")
    if not blocks or blocks > MAX_LAYERS:
        raise HeaderLacks(f"block_count is {header.get('block_count')!r:.40}")
    return blocks


def _per_layer(header: GgufHeader, key: str, layers: int) -> list[int] | None:
    """A count that may be one for all layers or one for each."""
    value = header.get(key)
    if isinstance(value, tuple) and len(value) >= layers:
        counts = [int(item) for item in value[:layers] if isinstance(item, int) and 0 <= item <= _MAX_NUMBER]
        return counts if len(counts) == layers else None
    single = number(header, key)
    return None if single is None else [single] * layers


def _tensor_kinds(header: GgufHeader) -> Mapping[int, set[str]]:
    """Block number -> the first words of its tensors' names, `attn_k` or `ssm_in`."""
    kinds: dict[int, set[str]] = {}
    for tensor in header.tensors:
        if match := _BLOCK.match(tensor.name):
            kinds.setdefault(int(match[1]), set()).add(match[2])
    return kinds


def _windows(header: GgufHeader, layers: int) -> list[int | None]:
    """The window of every layer, None where it sees everything."""
    seeded = _WINDOWS.get(header.architecture or "")
    tokens = number(header, "attention.sliding_window")
    if tokens is None and seeded is not None:
        tokens = seeded.tokens
    if not tokens:
        return [None] * layers
    pattern = header.get("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        listed = _per_layer(header, "attention.sliding_window_pattern", layers)
        return [tokens if slides else None for slides in listed or [0] * layers]
    period = number(header, "attention.sliding_window_pattern") or (seeded.period if seeded else 1)
    dense = 0 if seeded is not None and seeded.dense_first else period - 1
    return [None if layer % period == dense else tokens for layer in range(layers)]


def _state_width(header: GgufHeader, heads: int) -> int:
    """Numbers a recurrent layer keeps per sequence: `n_embd_r() + n_embd_s()`."""
    embedding = number(header, "embedding_length") or 0
    convolution = number(header, "ssm.conv_kernel") or 0
    if wkv := number(header, "wkv.head_size"):
        shifts = number(header, "token_shift_count")
        return (2 if shifts is None else shifts) * embedding + embedding * wkv
    if short := number(header, "shortconv.l_cache"):
        return embedding * (short - 1)
    if head := number(header, "kda.head_dim"):
        return 3 * (convolution - 1 if convolution else 3) * heads * head + head * head * heads
    inner, state = number(header, "ssm.inner_size") or 0, number(header, "ssm.state_size") or 0
    groups = number(header, "ssm.group_count") or 0
    return max(0, convolution - 1) * (inner + 2 * groups * state) + state * inner


@attrs.frozen(kw_only=True)
class _Widths:
    """Numbers per head."""

    key: int
    value: int
    window_key: int
    window_value: int


def _widths(header: GgufHeader, heads: int) -> _Widths:
    embedding = number(header, "embedding_length")
    guess = embedding // heads if embedding and heads else None
    key, value = number(header, "attention.key_length"), number(header, "attention.value_length")
    if number(header, "attention.key_length_mla"):  # MLA: one compressed row, from which V is computed too
        if key is None:
            key = (number(header, "attention.kv_lora_rank") or 0) + (number(header, "rope.dimension_count") or 0)
        return _Widths(key=key, value=0, window_key=key, window_value=0)
    key, value = key or guess, value or guess
    if key is None or value is None:
        raise HeaderLacks("neither attention.key_length nor embedding_length with attention.head_count")
    window_key = number(header, "attention.key_length_swa") or key
    window_value = number(header, "attention.value_length_swa") or value
    return _Widths(key=key, value=value, window_key=window_key, window_value=window_value)


def layers_of(header: GgufHeader) -> tuple[Layer, ...]:
    """What every layer of the model keeps. Raises HeaderLacks.

    A layer is recurrent when it has the tensors of one; it has attention when it has KV heads, and, if it is
    recurrent, K weights of its own too (Falcon-H1 does both in every layer).
    """
    blocks = block_count(header)
    if header.architecture in NO_CACHE:
        return tuple(Layer(number=layer) for layer in range(blocks))
    count = max(1, blocks - (number(header, "nextn_predict_layers") or 0))
    kinds = _tensor_kinds(header)
    heads = _per_layer(header, "attention.head_count", count) or [0] * count
    kv_heads = _per_layer(header, "attention.head_count_kv", count) or heads
    with_cache = count - (number(header, "attention.shared_kv_layers") or 0)
    most_heads = max(heads)
    windows = _windows(header, count)
    index = number(header, "attention.indexer.key_length") or 0 if header.architecture in _INDEXED else 0
    layers = []
    for layer in range(count):
        names = kinds.get(layer, set())
        recurrent = any(name.startswith(("ssm_", "shortconv", "time_mix")) for name in names)
        attends = kv_heads[layer] > 0 and layer < with_cache and (not recurrent or "attn_k" in names)
        found = Layer(number=layer, state_width=_state_width(header, most_heads) if recurrent else 0)
        if attends:
            widths = _widths(header, heads[0] or most_heads)
            slides = windows[layer] is not None
            found = attrs.evolve(
                found,
                key_width=kv_heads[layer] * (widths.window_key if slides else widths.key),
                value_width=kv_heads[layer] * (widths.window_value if slides else widths.value),
                window=windows[layer],
                index_width=index,
            )
        layers.append(found)
    if not any(layer.key_width or layer.state_width for layer in layers):
        raise HeaderLacks("no attention.head_count, no recurrent layers")
    return tuple(layers)
