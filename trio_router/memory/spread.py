"""What a model costs more when it is split over several devices.

Source: llama.cpp `src/llama-model.cpp` (`load_tensors`: each layer goes whole to the first device whose part of
`--tensor-split`, summed up, is above its place among the layers; the output layer is the last one), `src/llama-context.cpp`
(pipeline parallelism, where every layer is on a device) and `ggml-backend.cpp` (`GGML_SCHED_MAX_COPIES`: so many copies of
what goes into the graph). Measured on two H200 with SmolLM2: 10.5 MiB more compute buffer on each for 2,048 tokens a
stream, 34.5 for 8,192.
"""

from collections.abc import Iterable, Mapping
from typing import Final

import attrs

COPIES: Final = 4
_F16: Final = 2
_F32: Final = 4


@attrs.frozen(kw_only=True)
class Spread:
    """Bytes on each of several devices."""

    grain: int
    """The most that a device's part may be larger than its share, since layers are not cut."""
    copies: int
    """What the copies take that several devices work on at once."""


def grain(blocks: Iterable[int], output: int) -> int:
    """From the sizes of all blocks, caches included, and of the output layer.

    Every device gets a layer more than its share at most. The output layer counts as one, and may be larger or smaller:
    larger, it is all on the last device, beside that one's share of it; smaller, who has none of it has more of the rest.
    """
    largest = max(blocks, default=0)
    return max(output, 2 * largest - output)


def copies(*, batch: int, cells: int, embedding: int, flash_attention: bool) -> int:
    """What all but one take, from micro-batch, tokens of cache in a stream, width of an embedding: masks and embeddings."""
    mask = batch * cells * (_F16 if flash_attention else _F32)
    return (COPIES - 1) * (mask + batch * embedding * _F32)


def by_block(sizes: Iterable[tuple[int, int]]) -> Mapping[int, int]:
    """Sums by block of (block, bytes)."""
    found: dict[int, int] = {}
    for block, size in sizes:
        found[block] = found.get(block, 0) + size
    return found
