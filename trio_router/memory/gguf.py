"""The header of a GGUF file: metadata and the list of tensors, without the weights.

Our own reader: PyPI `gguf` makes an object of every token, which takes seconds and 200 MB. This one steps over token
lists and answers in milliseconds. It reads versions 2 and 3, little endian; the format is described in ggml's
`docs/gguf.md` and decided by llama.cpp `ggml/src/gguf.cpp`.

*Error handling*: a file comes from anywhere and is treated as hostile. Every count and length is compared with what
the file still holds, and with the bounds below, before anything is read or allocated. Whatever is wrong (the file is
missing, cut short, garbage) is a `GgufError` that names the file; nothing else is raised.

Reading blocks. In a trio task, call `read_header` in a thread.
"""

import itertools
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

from trio_router.errors import shown
from trio_router.memory import ggml
from trio_router.memory.cursor import Cursor, GgufError

__all__ = ["GgufError", "GgufHeader", "Skipped", "TensorInfo", "Value", "read_header", "split_paths"]

MAX_METADATA: Final = 10_000
MAX_TENSORS: Final = 100_000
MAX_KEY_BYTES: Final = 1024
MAX_NAME_BYTES: Final = 256
MAX_DIMENSIONS: Final = 4
MAX_SPLITS: Final = 1000
MAX_STRINGS: Final = 4_000_000
"""Strings in one array; the largest vocabularies have half a million merges."""
MAX_KEPT: Final = 1024
"""Longest array of numbers that is kept; llama.cpp allows 512 layers."""
MAX_STRING_KEPT_BYTES: Final = 64 * 1024

_SCALARS: Final[Mapping[int, str]] = {number: code for number, code in enumerate("BbHhIif?  Qqd") if code != " "}
"""Value type -> `struct` code."""
_STRING: Final = 8
_ARRAY: Final = 9
_SPLIT_NAME: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@attrs.frozen
class Skipped:
    """Stands for a value that is too long to keep: a token list, a huge string."""

    count: int
    """Elements of the array, or bytes of the string."""


Scalar = int | float | bool | str
Value = Scalar | tuple[int | float | bool, ...] | Skipped


@attrs.frozen(kw_only=True)
class TensorInfo:
    """One tensor, as the header lists it."""

    name: str
    shape: tuple[int, ...]
    """Fastest dimension first, as ggml writes it; at most four."""
    type: int
    """ggml's type number."""
    offset: int
    """Bytes from the start of the tensor data of its own file."""
    bytes: int
    """Size of the weights; for an unknown type, the distance to the next tensor."""


@attrs.frozen(kw_only=True)
class GgufHeader:
    """What the header of a model says. Of a split model: metadata of the first file, tensors of all."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    """All files of the model together."""

    @property
    def architecture(self) -> str | None:
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else None

    def get(self, key: str) -> Value | None:
        """The value of `key` under the architecture's prefix: `get("block_count")` reads `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}")


def _string_value(cursor: Cursor, what: str) -> str | Skipped:
    length = cursor.number("Q", f"length of {what}")
    if length > MAX_STRING_KEPT_BYTES:
        cursor.skip(length, what)
        return Skipped(length)
    return cursor.take(length, what).decode(errors="replace")


def _skip_strings(cursor: Cursor, count: int, what: str) -> Skipped:
    if count > MAX_STRINGS:
        raise cursor.error(f"{what} has {count} strings, at most {MAX_STRINGS} are allowed")
    cursor.skip_strings(count, what)
    return Skipped(count)


def _array_value(cursor: Cursor, what: str) -> Value:
    kind = cursor.number("I", f"element type of {what}")
    count = cursor.number("Q", f"length of {what}")
    if kind == _STRING:
        return _skip_strings(cursor, count, what)
    if kind == _ARRAY:
        raise cursor.error(f"{what} is an array of arrays, which llama.cpp does not read either")
    if kind not in _SCALARS:
        raise cursor.error(f"{what} is an array of unknown type {kind}")
    code = _SCALARS[kind]
    width = struct.calcsize("<" + code)
    if count > MAX_KEPT:
        cursor.skip(width * count, what)
        return Skipped(count)
    return struct.unpack(f"<{count}{code}", cursor.take(width * count, what))


def _value(cursor: Cursor, what: str) -> Value:
    kind = cursor.number("I", f"type of {what}")
    if kind == _STRING:
        return _string_value(cursor, what)
    if kind == _ARRAY:
        return _array_value(cursor, what)
    if kind not in _SCALARS:
        raise cursor.error(f"{what} has unknown type {kind}")
    code = _SCALARS[kind]
    (value,) = struct.unpack("<" + code, cursor.take(struct.calcsize("<" + code), what))
    scalar: Scalar = value
    return scalar


def _metadata(cursor: Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for number in range(count):
        key = cursor.string(MAX_KEY_BYTES, f"key {number}")
        if key in metadata:
            raise cursor.error(f"key {shown(key)} stands there twice")
        metadata[key] = _value(cursor, f"value of {shown(key)}")
    return metadata


def _listed_tensor(cursor: Cursor, number: int) -> TensorInfo:
    """One entry of the list; an unknown type has -1 bytes until all offsets are known."""
    name = cursor.string(MAX_NAME_BYTES, f"name of tensor {number}")
    what = f"tensor {shown(name)}"
    dimensions = cursor.bounded("I", MAX_DIMENSIONS, f"number of dimensions of {what}")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, f"shape of {what}"))
    type_ = cursor.number("I", f"type of {what}")
    offset = cursor.number("Q", f"offset of {what}")
    size = ggml.tensor_bytes(type_, shape)
    return TensorInfo(name=name, shape=shape, type=type_, offset=offset, bytes=-1 if size is None else size)


def _tensors(cursor: Cursor, count: int, alignment: int) -> tuple[TensorInfo, ...]:
    listed = [_listed_tensor(cursor, number) for number in range(count)]
    data_bytes = max(0, cursor.size - -(-cursor.position // alignment) * alignment)
    ends = dict(itertools.pairwise([*sorted({tensor.offset for tensor in listed}), data_bytes]))
    tensors: list[TensorInfo] = []
    for tensor in listed:
        size = tensor.bytes if tensor.bytes >= 0 else max(0, ends[tensor.offset] - tensor.offset)
        if tensor.offset + size > data_bytes:
            raise cursor.error(
                f"tensor {shown(tensor.name)} ends at {tensor.offset + size} of {data_bytes} bytes of tensor data: "
                "an unfinished download?"
            )
        tensors.append(attrs.evolve(tensor, bytes=size))
    return tuple(tensors)


def _alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0 or value & (value - 1):
        raise cursor.error(f"general.alignment is {shown(str(value))}, not a power of two")
    return value


def _version(cursor: Cursor) -> int:
    magic = cursor.take(4, "magic")
    if magic != b"GGUF":
        raise cursor.error(f"not a GGUF file: it starts with {magic!r}")
    version = cursor.number("I", "version")
    if version and not version & 0xFFFF:
        raise cursor.error("a big-endian GGUF file; only little endian is read")
    if version not in {2, 3}:
        raise cursor.error(f"GGUF version {version}; versions 2 and 3 are read")
    return version


def _read_file(path: Path) -> GgufHeader:
    """The header of one file, alone."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a FIFO would block us for good
            raise GgufError(f"{path}: not a regular file")
        with path.open("rb") as file:
            cursor = Cursor(file, path, status.st_size)
            version = _version(cursor)
            tensor_count = cursor.bounded("Q", MAX_TENSORS, "number of tensors")
            metadata = _metadata(cursor, cursor.bounded("Q", MAX_METADATA, "number of metadata keys"))
            tensors = _tensors(cursor, tensor_count, _alignment(cursor, metadata))
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
        raise GgufError(f"{path}: {getattr(exc, 'strerror', None) or exc}") from exc
    return GgufHeader(version=version, metadata=metadata, tensors=tensors, file_bytes=status.st_size)


def split_paths(path: Path) -> list[Path]:
    """The files of the model whose first file is `path`, by its name alone."""
    name = _SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) > MAX_SPLITS:
        return [path]
    count = int(name["count"])
    return [path.with_name(f"{name['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _other_splits(path: Path, header: GgufHeader) -> list[Path]:
    """The files after the first of a split model; empty for a model in one file."""
    count = header.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return []
    if count > MAX_SPLITS:
        raise GgufError(f"{path}: split.count is {count}, at most {MAX_SPLITS} is allowed")
    name = _SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise GgufError(f"{path}: one of {count} files, but not named like ...-00001-of-{count:05d}.gguf")
    if int(name["number"]) != 1:
        raise GgufError(f"{path}: file {int(name['number'])} of {count}; the first is the one to name")
    return split_paths(path)[1:]


def read_header(path: Path) -> GgufHeader:
    """Read the header of a model; of a split one (`-00001-of-0000N.gguf`), of all its files.

    Raises `GgufError` and nothing else. Blocks on the disk.
    """
    first = _read_file(path)
    others = [_read_file(other) for other in _other_splits(path, first)]
    if not others:
        return first
    return attrs.evolve(
        first,
        tensors=tuple(itertools.chain(first.tensors, *(other.tensors for other in others))),
        file_bytes=first.file_bytes + sum(other.file_bytes for other in others),
    )
