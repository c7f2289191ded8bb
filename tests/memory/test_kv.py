import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.memory.headers import DEEPSEEK_V3, GEMMA3_27B, GPT_OSS_20B, QWEN35_9B, SMOLLM2, header
from trio_router.memory.ggml import CACHE_TYPES
from trio_router.memory.gguf import GgufHeader, Skipped
from trio_router.memory.hparams import HeaderLacks, layers_of
from trio_router.memory.kv import cells_per_stream, layer_caches
from trio_router.memory.settings import MemorySettings

MIB = 1024 * 1024
Q8 = CACHE_TYPES["q8_0"]


def cache_mib(of: GgufHeader, **settings) -> float:
    return sum(cache.bytes for cache in layer_caches(of, MemorySettings(**settings))) / MIB


@pytest.mark.parametrize(
    ("settings", "mib"),
    [
        # What llama-server logged: `llama_kv_cache: size = ...`.
        ({"context": 8192, "slots": 2, "type_k": Q8, "type_v": Q8}, 95.625),
        ({"context": 2048}, 45.0),
        ({"context": 8192, "slots": 4}, 180.0),
        ({"context": 65536, "slots": 8}, 1440.0),
        ({"context": 1000, "slots": 3}, 33.75),
        ({"context": 8192, "slots": 4, "unified": True}, 180.0),
        ({"context": None}, 180.0),
    ],
)
def test_the_cache_llama_server_logged(settings, mib: float) -> None:
    assert cache_mib(SMOLLM2, **settings) == mib


@pytest.mark.parametrize(
    ("settings", "cells"),
    [
        ({"context": 1000, "slots": 3}, 512),
        ({"context": 1000, "unified": True, "slots": 3}, 1024),
        ({"context": 100, "slots": 8}, 256),
        ({}, 8192),
    ],
)
def test_cells_are_padded_per_stream(settings, cells: int) -> None:
    assert cells_per_stream(SMOLLM2, MemorySettings(**settings)) == cells


def test_sliding_windows() -> None:
    full, window = 32768 * 16 * 128 * 2 * 2, 1536 * 16 * 128 * 2 * 2
    assert cache_mib(GEMMA3_27B, context=32768) == (10 * full + 52 * window) / MIB
    assert cache_mib(GEMMA3_27B, context=32768, full_windows=True) == 62 * full / MIB
    # Shared by four slots, the window is there four times; the padding once.
    assert cache_mib(GEMMA3_27B, context=32768, slots=4, unified=True) == (10 * full + 52 * window * 4608 / 1536) / MIB
    # A context shorter than the window has no more cells than that.
    assert cache_mib(GEMMA3_27B, context=512) == 62 * 512 * 8192 / MIB
    assert cache_mib(GPT_OSS_20B, context=8192) == 192.0 + 18.0


@pytest.mark.parametrize(
    ("architecture", "values", "slides"),
    [
        ("gemma3", {"attention.sliding_window": 512}, "sssss.ss"),
        ("gemma3", {}, "........"),
        ("gemma2", {}, "s.s.s.s."),
        ("llama4", {}, "sss.sss."),
        ("llama4", {"attention.sliding_window": 0}, "........"),
        ("smallthinker", {"attention.sliding_window": 512}, ".sss.sss"),
        ("gemma3", {"attention.sliding_window": 512, "attention.sliding_window_pattern": 3}, "ss.ss.ss"),
        (
            "gemma4",
            {"attention.sliding_window": 512, "attention.sliding_window_pattern": (True, True, False, True) * 2},
            "ss.sss.s",
        ),
        ("gemma4", {"attention.sliding_window": 512, "attention.sliding_window_pattern": (True,)}, "........"),
        ("qwen2", {"attention.sliding_window": 512}, "........"),  # llama.cpp does not look
        ("phi3", {"attention.sliding_window": 512}, "........"),
    ],
)
def test_which_layers_slide(architecture: str, values, slides: str) -> None:
    found = layers_of(header(architecture, {**PLAIN, **values}))
    assert "".join("s" if layer.window else "." for layer in found) == slides


PLAIN = {"block_count": 8, "context_length": 4096, "embedding_length": 64, "attention.head_count": 4}


def test_mla_has_no_v() -> None:
    assert cache_mib(DEEPSEEK_V3, context=4096) == 274.5
    computed = {k: v for k, v in DEEPSEEK_V3.metadata.items() if not k.endswith("attention.key_length")}
    assert cache_mib(attrs.evolve(DEEPSEEK_V3, metadata=computed), context=4096) == 274.5


def test_an_index_is_kept_beside_it() -> None:
    metadata = {k.replace("deepseek2", "deepseek32"): v for k, v in DEEPSEEK_V3.metadata.items()}
    metadata |= {"general.architecture": "deepseek32", "deepseek32.attention.indexer.key_length": 128}
    indexed = attrs.evolve(DEEPSEEK_V3, metadata=metadata)
    assert cache_mib(indexed, context=4096) == 274.5 * (576 + 128) / 576


def test_hybrid_models_keep_a_state_per_sequence() -> None:
    layers = layers_of(QWEN35_9B)
    assert [layer.number for layer in layers if layer.key_width] == [3, 7, 11, 15, 19, 23, 27, 31]
    states = 52_690_944
    attention = 8 * 32768 * 2 * 4 * 256 * 2
    assert cache_mib(QWEN35_9B, context=32768) == (states + attention) / MIB
    assert cache_mib(QWEN35_9B, context=32768, slots=2) == (2 * states + attention) / MIB


def test_recurrent_models_have_nothing_else() -> None:
    mamba = header(
        "mamba",
        {"block_count": 24, "ssm.conv_kernel": 4, "ssm.inner_size": 1536, "ssm.state_size": 16},
        *((f"blk.{layer}.ssm_in.weight", 1) for layer in range(24)),
    )
    assert cache_mib(mamba, slots=2) == 2 * 24 * (3 * 1536 + 16 * 1536) * 4 / MIB
    rwkv = header(
        "rwkv6",
        {"block_count": 2, "embedding_length": 2048, "wkv.head_size": 64, "attention.head_count": 0},
        ("blk.0.time_mix_key.weight", 1),
        ("blk.1.time_mix_key.weight", 1),
    )
    assert cache_mib(rwkv) == 2 * (2 * 2048 + 64 * 2048) * 4 / MIB


def test_other_recurrent_states() -> None:
    short = header(
        "lfm2",
        {**PLAIN, "block_count": 2, "attention.head_count_kv": (0, 2), "shortconv.l_cache": 3},
        ("blk.0.shortconv.conv.weight", 1),
        ("blk.1.attn_k.weight", 1),
    )
    assert [(layer.state_width, layer.key_width) for layer in layers_of(short)] == [(128, 0), (0, 32)]
    kimi = header(
        "kimi-linear",
        {**PLAIN, "block_count": 1, "attention.head_count_kv": (0,), "kda.head_dim": 16},
        ("blk.0.ssm_a", 1),
        ("blk.0.attn_k.weight", 1),
    )
    assert layers_of(kimi)[0].state_width == 3 * 3 * 64 + 16 * 16 * 4
    falcon = header("falcon-h1", {**PLAIN, "block_count": 1}, ("blk.0.ssm_in.weight", 1), ("blk.0.attn_k.weight", 1))
    assert layers_of(falcon)[0].key_width == 64


def test_layers_without_a_cache_of_their_own() -> None:
    shared = layers_of(header("gemma4", {**PLAIN, "attention.shared_kv_layers": 3}))
    assert [bool(layer.key_width) for layer in shared] == [True] * 5 + [False] * 3
    predicting = layers_of(header("glm4moe", {**PLAIN, "nextn_predict_layers": 1}))
    assert len(predicting) == 7
    assert not any(layer.key_width for layer in layers_of(header("bert", PLAIN)))


def test_heads_and_widths_per_layer() -> None:
    values = {**PLAIN, "block_count": 2, "attention.head_count_kv": (4, 2), "attention.sliding_window": 512}
    values |= {"attention.sliding_window_pattern": (False, True)}
    values |= {"attention.key_length": 32, "attention.key_length_swa": 16, "attention.value_length_swa": 8}
    full, slides = layers_of(header("gemma4", values))
    assert (full.key_width, full.value_width) == (4 * 32, 4 * 16)
    assert (slides.key_width, slides.value_width) == (2 * 16, 2 * 8)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {**PLAIN, "block_count": 0},
        {**PLAIN, "block_count": 10_000_000},
        {**PLAIN, "block_count": "two"},
        {**PLAIN, "block_count": Skipped(5)},
        {**PLAIN, "attention.head_count": None},
        {**PLAIN, "attention.head_count": 2**63},
        {**PLAIN, "embedding_length": None},
        {**PLAIN, "context_length": None},
        {**PLAIN, "context_length": True},
    ],
)
def test_a_header_that_lacks_something(values) -> None:
    with pytest.raises(HeaderLacks):
        layer_caches(header("llama", values), MemorySettings())


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 8, 100, 2**31, 2**40, 2**64, True, False, 0.5, float("nan")])
VALUES = NUMBERS | st.sampled_from(["", "8", Skipped(3)]) | st.lists(NUMBERS, max_size=9).map(tuple)
KEYS = [
    key.split(".", 1)[1] for of in (GEMMA3_27B, DEEPSEEK_V3, QWEN35_9B) for key in of.metadata if "general" not in key
]
KEYS += ["attention.sliding_window_pattern", "nextn_predict_layers", "attention.shared_kv_layers", "wkv.head_size"]


@given(
    architecture=st.sampled_from(["llama", "gemma3", "llama4", "deepseek32", "bert", "rwkv6"]),
    values=st.dictionaries(st.sampled_from(sorted(set(KEYS))), VALUES, max_size=5),
    names=st.lists(
        st.sampled_from(["blk.0.ssm_in", "blk.1.attn_k", "blk.1.ssm_a", "output", "blk.99999.x"]), max_size=3
    ),
)
def test_any_header_gives_a_number_or_says_what_is_missing(architecture, values, names) -> None:
    hostile = header(architecture, {**PLAIN, **values}, *((name, 1) for name in names))
    try:
        caches = layer_caches(hostile, MemorySettings(slots=3))
    except HeaderLacks:
        return
    assert all(cache.bytes >= 0 for cache in caches)
