"""Whether a llama-server that died while it loaded died of too little memory, by what it wrote."""

import re
from collections.abc import Iterable
from typing import Final

_WORDS: Final = re.compile(
    r"out of memory|failed to allocate|unable to allocate|ErrorOutOf(?:Device|Host)Memory|allocation of size \d+ failed"
    r"|cannot allocate memory|std::bad_alloc|failed to fit params",
    re.IGNORECASE,
)
"""CUDA, HIP and Metal; ggml's allocator; Vulkan; the host."""


def short_of_memory(lines: Iterable[str]) -> bool:
    """Whether one of its last lines says so."""
    return any(_WORDS.search(line) for line in lines)
