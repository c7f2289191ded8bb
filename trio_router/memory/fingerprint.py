"""What decides how much memory a model takes, in one word: the same files, flags and llama-server, the same word.

Files are known by name, size and time of change, not by inode: a copy that kept its times is the same. Flags that are
known to take no memory are left out, so that another temperature does not make a model unknown; one that is not in
the list counts.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from trio_router.config.flags import flag_name, last_value
from trio_router.config.schema import ModelConfig
from trio_router.memory.gguf import split_paths
from trio_router.memory.settings import DRAFT, PROJECTOR

_MAX_LIBRARIES: Final = 200

VALUED: Final = frozenset(
    {
        *{"--temp", "--temperature", "--top-k", "--top-p", "--min-p", "--seed", "-s", "--repeat-penalty"},
        *{"--repeat-last-n", "--presence-penalty", "--frequency-penalty", "-n", "--predict", "--n-predict"},
        *{"-t", "--threads", "-tb", "--threads-batch", "--threads-http", "-to", "--timeout"},
        *{"--chat-template", "--chat-template-file", "--chat-template-kwargs", "--reasoning-format"},
        *{"--reasoning-budget", "--cache-reuse", "--slot-save-path", "--log-file", "--log-colors"},
        *{"-lv", "--verbosity", "--log-verbosity", "--sse-ping-interval"},
    }
)
"""Flags with a value that has nothing to do with memory."""
SWITCHES: Final = frozenset(
    {
        *{"--jinja", "--no-jinja", "--metrics", "--slots", "--no-slots", "--props", "--no-webui", "--webui"},
        *{"-v", "--verbose", "--log-disable", "--log-prefix", "--log-timestamps", "--no-perf", "--perf"},
        *{"--ignore-eos", "--prefill-assistant", "--no-prefill-assistant", "--warmup"},
    }
)
"""The same without a value."""


def fingerprint(model: ModelConfig, server: str) -> str:
    """32 hexadecimal digits for the model as it would be loaded by the llama-server `server` (`server_print`).

    Looks at files: blocks. One that is not there is known by that.
    """
    others = [value for names in (PROJECTOR, DRAFT) if (value := last_value(model.flags, names)) is not None]
    files = [_file(path) for path in (*split_paths(model.file), *map(Path, others))]
    return _digest([server, files, list(_relevant(model.flags)), model.slots])


def server_print(path: Path, gpus: Iterable[str]) -> str:
    """The same for a llama-server: itself, the libraries beside it, and the names of the GPUs there are. Blocks."""
    beside = sorted(path.parent.glob("lib*.so*"))[:_MAX_LIBRARIES]
    return _digest([[_file(one) for one in (path, *beside)], sorted(set(gpus))])


def _relevant(flags: Sequence[str]) -> Iterator[str]:
    skip = False
    for flag in flags:
        name = flag_name(flag)
        if skip:
            skip = False
        elif name in VALUED:
            skip = True
        elif name not in SWITCHES:
            yield flag


def _file(path: Path) -> list[object]:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return [path.name]
    return [path.name, status.st_size, status.st_mtime_ns]


def _digest(of: object) -> str:
    return hashlib.sha256(json.dumps(of).encode("utf-8", "surrogatepass")).hexdigest()[:32]
