"""Makes small GGUF models at test time: no numpy, no `gguf` package, nothing downloaded.

`write_tiny_llama` makes a llama of about 8 MB with random weights that the real llama-server has ready in 0.3 s. Its
tokenizer (vocabulary, merges, chat template) is copied byte for byte from another GGUF, SmolLM2's. `output.weight` is zero
except in the rows of plain alphabetic tokens, so that whatever it says is ASCII words. `write_header_only` makes
a valid GGUF of a few hundred bytes that names an architecture and holds one small tensor: enough for whoever reads headers.

The format is described in ggml's docs/gguf.md: little endian; magic, version, counts, key/values, tensor infos, padding
to 32 bytes, tensor data.
"""

import mmap
import random
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

ALIGNMENT = 32
UINT16, UINT32, INT32, FLOAT32, STRING, ARRAY = 2, 4, 5, 6, 8, 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
F32, F16 = 0, 1
NORMAL_TOKEN = 1
SPACE = "Ġ".encode()
"""How byte-level BPE writes a leading space."""

WIDTH, FEED_FORWARD, LAYERS, HEADS = 32, 64, 2, 2


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _uint32(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", UINT32, value)


def _float32(key: str, value: float) -> bytes:
    return _string(key) + struct.pack("<If", FLOAT32, value)


def _text(key: str, value: str) -> bytes:
    return _string(key) + struct.pack("<I", STRING) + _string(value)


def _value_end(data: mmap.mmap, at: int, kind: int) -> int:
    """Where the value of `kind` that starts at `at` ends."""
    if kind in SCALAR_BYTES:
        return at + SCALAR_BYTES[kind]
    if kind == STRING:
        return at + 8 + struct.unpack_from("<Q", data, at)[0]
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item in SCALAR_BYTES:
        return at + count * SCALAR_BYTES[item]
    for _ in range(count):
        at = _value_end(data, at, item)
    return at


def _entries(data: mmap.mmap) -> Iterator[tuple[str, int, int, int]]:
    """Every key of a GGUF: (key, where its entry starts, where its value starts, where it ends)."""
    magic, version, _, count = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in {2, 3}:
        raise ValueError(f"not a GGUF of version 2 or 3: {magic!r} {version}")
    at = 24
    for _ in range(count):
        start = at
        (length,) = struct.unpack_from("<Q", data, at)
        key = data[at + 8 : at + 8 + length].decode()
        at += 8 + length
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        end = _value_end(data, at, kind)
        yield key, start, at, end
        at = end


def _tokenizer(source: Path) -> tuple[list[bytes], list[bytes], list[int]]:
    """The `tokenizer.*` entries of `source` as they stand in it, its tokens, and their types."""
    entries: list[bytes] = []
    tokens: list[bytes] = []
    types: list[int] = []
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for key, start, value, end in _entries(data):
            if not key.startswith("tokenizer."):
                continue
            entries.append(data[start:end])
            if key == "tokenizer.ggml.tokens":
                (count,) = struct.unpack_from("<Q", data, value + 4)
                at = value + 12
                for _ in range(count):
                    (length,) = struct.unpack_from("<Q", data, at)
                    tokens.append(data[at + 8 : at + 8 + length])
                    at += 8 + length
            elif key == "tokenizer.ggml.token_type":
                (count,) = struct.unpack_from("<Q", data, value + 4)
                types = list(struct.unpack_from(f"<{count}i", data, value + 12))
    if not tokens:
        raise ValueError(f"no tokenizer in {source}")
    return entries, tokens, types


def _noise(rng: random.Random, count: int, deviation: float) -> bytes:
    """`count` half-precision numbers around 0. A table of values and random indices: a million take 0.1 s."""
    table = [struct.pack("<e", rng.gauss(0.0, deviation)) for _ in range(256)]
    return b"".join(map(table.__getitem__, rng.randbytes(count)))


def _ones(count: int) -> bytes:
    return array("f", [1.0] * count).tobytes()


def _is_word(token: bytes, kind: int) -> bool:
    bare = token.removeprefix(SPACE)
    return kind == NORMAL_TOKEN and bare.isalpha() and bare.isascii()


Tensor = tuple[str, tuple[int, ...], int, bytes]
"""Name, dimensions (fastest first, as GGUF has them), type, data."""


def _write(path: Path, entries: list[bytes], tensors: list[Tensor]) -> Path:
    infos = bytearray()
    offset = 0
    for name, dimensions, kind, data in tensors:
        infos += _string(name) + struct.pack("<I", len(dimensions)) + struct.pack(f"<{len(dimensions)}Q", *dimensions)
        infos += struct.pack("<IQ", kind, offset)
        offset += -(-len(data) // ALIGNMENT) * ALIGNMENT
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries)) + b"".join(entries) + infos
    with path.open("wb") as file:
        file.write(head.ljust(-(-len(head) // ALIGNMENT) * ALIGNMENT, b"\0"))
        for *_, data in tensors:
            file.write(data.ljust(-(-len(data) // ALIGNMENT) * ALIGNMENT, b"\0"))
    return path


def _architecture(name: str) -> list[bytes]:
    return [
        _text("general.architecture", "llama"),
        _text("general.name", name),
        _uint32("general.file_type", 1),  # mostly F16
        _uint32("llama.context_length", 8192),
        _uint32("llama.embedding_length", WIDTH),
        _uint32("llama.feed_forward_length", FEED_FORWARD),
        _uint32("llama.block_count", LAYERS),
        _uint32("llama.attention.head_count", HEADS),
        _uint32("llama.attention.head_count_kv", HEADS),
        _uint32("llama.rope.dimension_count", WIDTH // HEADS),
        _float32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        _float32("llama.rope.freq_base", 10000.0),
    ]


def write_tiny_llama(path: Path, *, tokenizer_from: Path, seed: int = 0) -> Path:
    """A llama with random weights at `path`; another seed is another model."""
    return _write(path, *_tiny_llama(tokenizer_from, seed))


def write_split_llama(folder: Path, stem: str, *, tokenizer_from: Path, parts: int) -> list[Path]:
    """The same in `parts` files, as llama-gguf-split makes them: the first has the metadata, each says which it is."""
    entries, tensors = _tiny_llama(tokenizer_from, 0)
    files = []
    for number in range(parts):
        numbers = [_number(f"split.{key}", value) for key, value in (("no", number), ("count", parts))]
        numbers.append(_string("split.tensors.count") + struct.pack("<Ii", INT32, len(tensors)))
        path = folder / f"{stem}-{number + 1:05d}-of-{parts:05d}.gguf"
        files.append(_write(path, [*(entries if number == 0 else []), *numbers], tensors[number::parts]))
    return files


def _number(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<IH", UINT16, value)


def _tiny_llama(tokenizer_from: Path, seed: int) -> tuple[list[bytes], list[Tensor]]:
    rng = random.Random(seed)
    copied, tokens, types = _tokenizer(tokenizer_from)
    vocabulary = len(tokens)
    zeros = bytes(2 * WIDTH)
    words = _noise(rng, vocabulary * WIDTH, 2.0)
    output = b"".join(
        words[row * 2 * WIDTH : (row + 1) * 2 * WIDTH] if _is_word(token, kind) else zeros
        for row, (token, kind) in enumerate(zip(tokens, types, strict=True))
    )

    def matrix(name: str, columns: int, rows: int) -> Tensor:
        return name, (columns, rows), F16, _noise(rng, columns * rows, 0.05)

    def norm(name: str) -> Tensor:
        return name, (WIDTH,), F32, _ones(WIDTH)

    tensors = [
        matrix("token_embd.weight", WIDTH, vocabulary),
        ("output.weight", (WIDTH, vocabulary), F16, output),
        norm("output_norm.weight"),
    ]
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        tensors += [norm(block + "attn_norm.weight"), norm(block + "ffn_norm.weight")]
        tensors += [matrix(f"{block}attn_{part}.weight", WIDTH, WIDTH) for part in ("q", "k", "v", "output")]
        tensors += [matrix(f"{block}ffn_{part}.weight", WIDTH, FEED_FORWARD) for part in ("gate", "up")]
        tensors.append(matrix(f"{block}ffn_down.weight", FEED_FORWARD, WIDTH))
    entries = [*_architecture(f"tiny-{seed}"), _uint32("llama.vocab_size", vocabulary), *copied]
    return entries, tensors


def write_header_only(path: Path, *, seed: int = 0) -> Path:
    """A GGUF that can be read but not run, for the fake llama-server, which looks at its first four bytes."""
    tensor = ("output_norm.weight", (WIDTH,), F32, _ones(WIDTH))
    return _write(path, _architecture(f"header-{seed}"), [tensor])
