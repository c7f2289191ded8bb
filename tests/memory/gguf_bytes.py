"""Builds GGUF files byte by byte, right ones and wrong ones."""

import struct
from pathlib import Path
from typing import Any

ALIGNMENT = 32


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    data = value.encode()
    return u64(len(data)) + data


def typed(value: Any) -> bytes:
    """A value with its type in front."""
    match value:
        case bytes():  # already encoded
            return value
        case bool():
            return u32(7) + bytes([value])
        case int():
            return u32(4) + u32(value)
        case float():
            return u32(6) + struct.pack("<f", value)
        case str():
            return u32(8) + text(value)
        case [str(), *_]:
            return u32(9) + u32(8) + u64(len(value)) + b"".join(map(text, value))
        case [bool(), *_]:
            return u32(9) + u32(7) + u64(len(value)) + bytes(value)
        case [float(), *_]:
            return u32(9) + u32(6) + u64(len(value)) + struct.pack(f"<{len(value)}f", *value)
        case list():
            return u32(9) + u32(5) + u64(len(value)) + struct.pack(f"<{len(value)}i", *value)
    raise TypeError(value)


def tensor(name: str, shape: tuple[int, ...], type_: int, offset: int) -> bytes:
    return text(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(type_) + u64(offset)


def gguf(
    metadata: dict[str, Any] | None = None, tensors: tuple[bytes, ...] = (), *, data: int = 0, version: int = 3
) -> bytes:
    """A whole file with `data` bytes of weights."""
    metadata = {} if metadata is None else metadata
    head = b"GGUF" + u32(version) + u64(len(tensors)) + u64(len(metadata))
    head += b"".join(text(key) + typed(value) for key, value in metadata.items()) + b"".join(tensors)
    return head + bytes(-len(head) % ALIGNMENT) + bytes(data)


LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": [2, 1],
    "llama.rope.freq_base": 10000.0,
    "llama.rope.scaling.finetuned": False,
    "tokenizer.ggml.tokens": ["a", "b", ""],
    "tokenizer.ggml.scores": [0.5] * 2000,
}
LLAMA_TENSORS = (
    tensor("token_embd.weight", (64, 8), 0, 0),  # f32: 2048 bytes
    tensor("blk.0.attn_k.weight", (64, 32), 8, 2048),  # q8_0: 2176 bytes
    tensor("blk.1.attn_k.weight", (64, 32), 8, 4224),
)
LLAMA_DATA = 6400


def write_llama(path: Path) -> Path:
    path.write_bytes(gguf(LLAMA, LLAMA_TENSORS, data=LLAMA_DATA))
    return path
