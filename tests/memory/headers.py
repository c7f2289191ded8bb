"""Headers of well-known models, as far as memory goes, without their files."""

from typing import Any

from trio_router.memory.gguf import GgufHeader, TensorInfo


def tensors(*names_and_bytes: tuple[str, int]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=name, shape=(1,), type=0, offset=0, bytes=size) for name, size in names_and_bytes)


def header(architecture: str, values: dict[str, Any], *listed: tuple[str, int], file_bytes: int = 0) -> GgufHeader:
    metadata = {"general.architecture": architecture, **{f"{architecture}.{k}": v for k, v in values.items()}}
    return GgufHeader(version=3, metadata=metadata, tensors=tensors(*listed), file_bytes=file_bytes)


SMOLLM2 = header(
    "llama",
    {
        "block_count": 30,
        "context_length": 8192,
        "embedding_length": 576,
        "feed_forward_length": 1536,
        "attention.head_count": 9,
        "attention.head_count_kv": 3,
        "vocab_size": 49152,
    },
    ("token_embd.weight", 30_081_024),
    ("output_norm.weight", 2304),
    *((f"blk.{layer}.ffn_up.weight", 2_216_448) for layer in range(30)),
    file_bytes=98_362_432,
)
GEMMA3_27B = header(
    "gemma3",
    {
        "block_count": 62,
        "context_length": 131072,
        "embedding_length": 5376,
        "attention.head_count": 32,
        "attention.head_count_kv": 16,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.sliding_window": 1024,
    },
)
GPT_OSS_20B = header(
    "gpt-oss",
    {
        "block_count": 24,
        "context_length": 131072,
        "embedding_length": 2880,
        "attention.head_count": 64,
        "attention.head_count_kv": 8,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.sliding_window": 128,
    },
)
DEEPSEEK_V3 = header(
    "deepseek2",
    {
        "block_count": 61,
        "context_length": 163840,
        "embedding_length": 7168,
        "attention.head_count": 128,
        "attention.head_count_kv": 1,
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "attention.kv_lora_rank": 512,
        "rope.dimension_count": 64,
    },
)
QWEN35_9B = header(
    "qwen35",
    {
        "block_count": 32,
        "context_length": 262144,
        "embedding_length": 4096,
        "attention.head_count": 16,
        "attention.head_count_kv": 4,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 4096,
        "ssm.state_size": 128,
        "ssm.group_count": 16,
    },
    *((f"blk.{layer}.{'attn_k' if layer % 4 == 3 else 'ssm_conv1d'}.weight", 1) for layer in range(32)),
)
