import os
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.memory import gguf_bytes as b
from trio_router.memory import cursor, ggml, gguf
from trio_router.memory.gguf import GgufError, Skipped, read_header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def refusal(path: Path, content: bytes | None) -> str:
    """The message a file is refused with; it starts with the file's name."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GgufError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_a_header_is_read_without_its_token_lists(path: Path) -> None:
    header = read_header(b.write_llama(path))
    assert header.version == 3
    assert header.architecture == "llama"
    assert header.get("block_count") == 2
    assert header.get("attention.head_count_kv") == (2, 1)
    assert header.get("rope.freq_base") == 10000.0
    assert header.get("rope.scaling.finetuned") is False
    assert header.get("missing") is None
    assert header.metadata["tokenizer.ggml.tokens"] == Skipped(3)
    assert header.metadata["tokenizer.ggml.scores"] == Skipped(2000)
    assert [(t.name, t.shape, t.type, t.offset, t.bytes) for t in header.tensors] == [
        ("token_embd.weight", (64, 8), 0, 0, 2048),
        ("blk.0.attn_k.weight", (64, 32), 8, 2048, 2176),
        ("blk.1.attn_k.weight", (64, 32), 8, 4224, 2176),
    ]
    assert header.file_bytes == path.stat().st_size


def test_version_2_and_every_scalar_type(path: Path) -> None:
    values = {
        "u8": (0, "B", 200),
        "i8": (1, "b", -3),
        "u16": (2, "H", 60000),
        "i16": (3, "h", -300),
        "u32": (4, "I", 2**32 - 1),
        "i32": (5, "i", -70000),
        "u64": (10, "Q", 2**64 - 1),
        "i64": (11, "q", -(2**40)),
        "f64": (12, "d", 0.1),
    }
    content = {key: b.u32(kind) + struct.pack("<" + code, value) for key, (kind, code, value) in values.items()}
    path.write_bytes(b.gguf(content, version=2))
    header = read_header(path)
    assert header.metadata == {key: value for key, (_, _, value) in values.items()}
    assert header.architecture is None


def test_a_huge_string_is_stepped_over(path: Path) -> None:
    path.write_bytes(b.gguf({"template": "x" * 100_000, "words": ["y" * 50_000, "z"], "after": 1}))
    header = read_header(path)
    assert header.metadata == {"template": Skipped(100_000), "words": Skipped(2), "after": 1}


def test_a_tensor_of_an_unknown_type_reaches_to_the_next(path: Path) -> None:
    tensors = (b.tensor("new", (64,), 999, 32), b.tensor("old", (8,), 0, 0), b.tensor("last", (64,), 999, 64))
    path.write_bytes(b.gguf({}, tensors, data=100))
    assert {t.name: t.bytes for t in read_header(path).tensors} == {"new": 32, "old": 32, "last": 36}


def test_split_files_are_added_up(tmp_path: Path) -> None:
    paths = [tmp_path / f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        meta = {"split.no": number, "split.count": 3, **(b.LLAMA if number == 0 else {})}
        path.write_bytes(b.gguf(meta, (b.tensor(f"blk.{number}.attn_k.weight", (8,), 0, 0),), data=32))
    header = read_header(paths[0])
    assert [t.name for t in header.tensors] == [f"blk.{number}.attn_k.weight" for number in range(3)]
    assert header.file_bytes == sum(path.stat().st_size for path in paths)
    assert header.architecture == "llama"

    with pytest.raises(GgufError, match="file 2 of 3; the first is the one to name"):
        read_header(paths[1])
    paths[2].unlink()
    with pytest.raises(GgufError, match=r"big-00003-of-00003\.gguf: No such file"):
        read_header(paths[0])


def test_a_split_file_must_be_named_like_one(path: Path) -> None:
    assert "not named like" in refusal(path, b.gguf({"split.count": 2}))
    assert "at most 1000" in refusal(path, b.gguf({"split.count": 4_000_000_000}))
    path.write_bytes(b.gguf({"split.count": 1}))
    assert read_header(path).file_bytes == path.stat().st_size


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.gguf", None) == "No such file or directory"
    assert refusal(tmp_path, None) == "not a regular file"
    os.mkfifo(tmp_path / "pipe.gguf")  # opening it would wait for a writer
    assert refusal(tmp_path / "pipe.gguf", None) == "not a regular file"
    assert "embedded null" in refusal(tmp_path / "a\0b", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: magic needs 4 bytes at 0, the file has 0"),
        (b"GGML" + bytes(40), "not a GGUF file: it starts with b'GGML'"),
        (b"GGUF" + bytes([0, 0, 0, 3]) + bytes(16), "a big-endian GGUF file; only little endian is read"),
        (b.gguf(version=1), "GGUF version 1; versions 2 and 3 are read"),
        (b.gguf(version=4), "GGUF version 4; versions 2 and 3 are read"),
        (b"GGUF" + b.u32(3) + b.u64(2**63) + b.u64(0), "number of tensors is 9223372036854775808, at most"),
        (b"GGUF" + b.u32(3) + b.u64(0) + b.u64(2**40), "number of metadata keys is 1099511627776, at most"),
        (b"GGUF" + b.u32(3) + b.u64(0) + b.u64(1) + b.u64(2**60), "length of key 0 is 1152921504606846976, at most"),
        (b.gguf({"s": b.u32(8) + b.u64(2**60)}), "truncated: value of 's' needs 1152921504606846976 bytes"),
        (b.gguf({"a": b.u32(9) + b.u32(4) + b.u64(2**61)}), "truncated: value of 'a' needs 9223372036854775808 bytes"),
        (b.gguf({"a": b.u32(9) + b.u32(8) + b.u64(2**61)}), "has 2305843009213693952 strings, at most"),
        (b.gguf({"a": b.u32(9) + b.u32(8) + b.u64(1000)}), "truncated: value of 'a' needs 8000 bytes"),
        (b.gguf({"a": b.u32(9) + b.u32(8) + b.u64(1) + b.u64(2**50)}), "needs 1125899906842624 bytes"),
        (b.gguf({"a": b.u32(9) + b.u32(9) + b.u64(1)}), "value of 'a' is an array of arrays"),
        (b.gguf({"a": b.u32(9) + b.u32(77) + b.u64(1)}), "value of 'a' is an array of unknown type 77"),
        (b.gguf({"a": b.u32(13)}), "value of 'a' has unknown type 13"),
        (b.gguf({"general.alignment": 33}), "general.alignment is '33', not a power of two"),
        (b.gguf({"general.alignment": "x" * 500}), "general.alignment is 'xxx"),
        (b.gguf({}, (b.tensor("t", (1,) * 5, 0, 0),)), "number of dimensions of tensor 't' is 5, at most 4"),
        (b.gguf({}, (b.tensor("t" * 300, (1,), 0, 0),)), "length of name of tensor 0 is 300, at most 256"),
        (b.gguf({}, (b.tensor("t", (100,), 0, 0),), data=399), "tensor 't' ends at 400 of 399 bytes of tensor data"),
        (b.gguf({}, (b.tensor("t", (2**63,) * 4, 0, 0),), data=9), "bytes of tensor data: an unfinished download?"),
        (b.gguf({}, (b.tensor("t", (1,), 999, 2**63),), data=9), "an unfinished download?"),
    ],
)
def test_what_is_wrong_is_said(path: Path, content: bytes, message: str) -> None:
    assert message in refusal(path, content)


def test_a_key_may_stand_there_once(path: Path) -> None:
    one = b.text("k") + b.typed(1)
    assert refusal(path, b"GGUF" + b.u32(3) + b.u64(0) + b.u64(2) + one + one) == "key 'k' stands there twice"


def test_a_header_has_a_cap(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"GGUF" + b.u32(3) + b.u64(0) + b.u64(1) + b.text("k") + b.u32(8) + b.u64(2**27))
        file.truncate(2**28)  # sparse
    assert "beyond the 67108864 bytes a header may have" in refusal(path, None)
    with path.open("wb") as file:
        file.write(
            b"GGUF" + b.u32(3) + b.u64(0) + b.u64(1) + b.text("k") + b.u32(9) + b.u32(8) + b.u64(1) + b.u64(2**27)
        )
        file.truncate(2**28)
    assert "beyond the 67108864 bytes a header may have" in refusal(path, None)


def test_a_file_that_shrinks_while_it_is_read(path: Path) -> None:
    path.write_bytes(b.u64(4))
    with path.open("rb") as file, pytest.raises(GgufError, match="truncated while it was read"):
        cursor.Cursor(file, path, 100).take(20, "something")
    with path.open("rb") as file, pytest.raises(GgufError, match="truncated while it was read"):
        cursor.Cursor(file, path, 100).skip_strings(2, "something")


VALID = b.gguf(b.LLAMA, b.LLAMA_TENSORS, data=b.LLAMA_DATA)
HEAD = len(VALID) - b.LLAMA_DATA
EDITS = st.lists(st.tuples(st.integers(0, HEAD - 1), st.binary(min_size=1, max_size=9)), max_size=4)


@settings(max_examples=400, deadline=2000)
@given(edits=EDITS, cut=st.integers(0, len(VALID)))
@example(edits=[], cut=len(VALID))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, edits, cut) -> None:
    content = bytearray(VALID)
    for at, piece in edits:
        content[at : at + len(piece)] = piece
    read_or_refused(tmp_path_factory, bytes(content[:cut]))


@settings(max_examples=200, deadline=2000)
@given(content=st.binary(max_size=600), counts=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)))
def test_random_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content, counts) -> None:
    read_or_refused(tmp_path_factory, content)
    few = [count % 20 for count in counts]
    for tensors, keys in (counts, few):
        read_or_refused(tmp_path_factory, b"GGUF" + b.u32(3) + b.u64(tensors) + b.u64(keys) + content)


def read_or_refused(factory: pytest.TempPathFactory, content: bytes) -> None:
    path = factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except GgufError:
        return
    assert header.file_bytes == len(content)
    assert all(0 <= tensor.bytes <= len(content) for tensor in header.tensors)


def test_the_type_table() -> None:
    assert ggml.row_bytes(ggml.CACHE_TYPES["q8_0"], 192) == 192 * 34 // 32
    assert ggml.row_bytes(ggml.CACHE_TYPES["q4_0"], 33) == 36
    assert ggml.tensor_bytes(12, (256, 4)) == 4 * 144
    assert ggml.tensor_bytes(0, ()) == 4
    assert ggml.tensor_bytes(5, (32,)) is None
    assert set(ggml.CACHE_TYPES.values()) <= set(ggml.TYPE_SIZES)


def test_public_names() -> None:
    assert all(hasattr(gguf, name) for name in gguf.__all__)
