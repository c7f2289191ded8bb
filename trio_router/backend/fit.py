"""llama-server must not shrink what was asked for behind anybody's back.

Its `--fit`, on by default, quietly lowers the context and then the layers on GPUs when memory is short. A model whose flags say
both gets what they say, or fails; where every GPU is hidden, the context is all that can be said. It is left out then also
because it costs half of a small model's start: 70 of 150 ms. For the others llama-server is asked to say what it chose (`-lv 4`), which costs some 25
lines of log per request instead of 7, so that the status can show it.

Both go by environment: a llama-server that knows nothing of them is not disturbed, and the model's own flags stand above.
"""

from collections.abc import Sequence
from typing import Final

from trio_router.config.flags import flag_name
from trio_router.memory.settings import FIT, says_all

VERBOSITY: Final = frozenset({"-lv", "--verbosity", "--log-verbosity", "-v", "--verbose", "--log-disable"})
PROJECTING: Final = ("--fit", "on", "-lv", "4")
"""Flags that have a llama-server say what it would take; they come last, and so stand above all others."""
SILENT: Final = frozenset({"--log-disable", "--log-file"})
"""Flags with which it says nothing where we listen."""


def fit_environment(flags: Sequence[str], *, gpu: bool, hidden: bool = False) -> dict[str, str]:
    """What to put into the environment of a llama-server with these flags.

    `gpu`: it will see one. `hidden`: it will certainly see none, which not `gpu` does not say: NVML tells of NVIDIA's only.
    """
    names = {flag_name(flag) for flag in flags}
    if says_all(flags, gpu=not hidden):
        return {} if names & FIT else {"LLAMA_ARG_FIT": "off"}
    return {"LLAMA_ARG_LOG_VERBOSITY": "4"} if gpu and not names & VERBOSITY else {}
