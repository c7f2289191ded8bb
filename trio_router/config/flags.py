"""What the router reads in a model's llama-server flags, and which of them it owns.

A flag passes unchanged, whatever it is, unless it would let the backend listen elsewhere, ask for another key,
move its URLs or serve another model: then the router would talk to nobody, or to the wrong one.

llama-server's parser (b10434) takes the next argument as a flag's value whatever it looks like, treats `_` like
`-` in long names, does not know `--name=value`, and lets the last of several win. To stay independent of its list of
flags, a value that reads exactly like an owned flag is refused as one.
"""

import itertools
import re
from collections.abc import Collection, Sequence

from trio_router.errors import shown

PARALLEL = frozenset({"-np", "--parallel"})
LONGEST = frozenset({"-n", "--predict", "--n-predict"})

_LISTENS = "the router chooses where llama-server listens"
_KEYS = "the router checks keys itself (API_KEY)"
_URLS = "the router needs llama-server's own paths"
_TLS = "the router speaks plain HTTP to llama-server, over a private socket"
_FILE = "the router passes model_path"
_NAME = "the alias is the table's name"
_MANY = "one llama-server serves one model here; several models are several [models.*] tables"

OWNED = {
    **dict.fromkeys(("--host", "--port", "--reuse-port"), _LISTENS),
    **dict.fromkeys(("--api-key", "--api-key-file"), _KEYS),
    "--api-prefix": _URLS,
    **dict.fromkeys(("--ssl-key-file", "--ssl-cert-file"), _TLS),
    **dict.fromkeys(("-m", "--model", "-mu", "--model-url", "-dr", "--docker-repo"), _FILE),
    **dict.fromkeys(("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file"), _FILE),
    **dict.fromkeys(("-a", "--alias"), _NAME),
    **dict.fromkeys(("--models-dir", "--models-preset", "--models-max"), _MANY),
    **dict.fromkeys(("--models-autoload", "--no-models-autoload"), _MANY),
}
"""Flags a model may not have, each with the reason."""

# Shorthands such as --gpt-oss-20b-default fetch and serve a model of llama-server's own choice.
_SHORTHAND = re.compile(r"--(?:fim|gpt-oss|vision|embd)-.+-(?:default|spec)|--embd-gemma-default")


_TWO = re.compile(r"(-{1,2}[A-Za-z][\w-]*)\s+(\S.*)", re.DOTALL)
"""Written as in a shell: llama-server refuses it."""


class BadSlots(ValueError):
    """Raised when `-np` / `--parallel` is not followed by an int >= 1."""


def flag_name(argument: str) -> str:
    """`argument` as llama-server's parser reads it: `--api_key` is `--api-key`."""
    return argument.replace("_", "-") if argument.startswith("--") else argument


def owned_reason(argument: str) -> str | None:
    """Why the router does not let `argument` through, or None when it does: it is ours, or not one argument."""
    name = flag_name(re.split(r"[=\s]", argument, maxsplit=1)[0])
    if name in OWNED:
        return f"{name} belongs to the router: {OWNED[name]}"
    if _SHORTHAND.fullmatch(name):
        return f"{name} belongs to the router: {_FILE}"
    if (two := _TWO.fullmatch(argument)) is not None:
        return f"{two[1]} and {two[2]} are two arguments to llama-server: make them two entries"
    return None


def last_value(flags: Sequence[str], names: Collection[str]) -> str | None:
    """The argument after the last of `names` in `flags`, the one llama-server goes by; None without one."""
    value = None
    for flag, following in itertools.pairwise(flags):
        if flag_name(flag) in names:
            value = following
    return value


def longest_in(flags: Sequence[str]) -> int | None:
    """How many tokens the flags let an answer have; None when they do not say."""
    written = last_value(flags, LONGEST)
    return int(written) if written is not None and written.isdecimal() and len(written) < 10 else None


def slots_in(flags: Sequence[str]) -> int | None:
    """How many parallel sequences the flags ask for; None when they do not say. Raises BadSlots."""
    if flags and flag_name(flags[-1]) in PARALLEL:
        raise BadSlots(f"{flags[-1]}: expected an int >= 1 after it, got nothing")
    written = last_value(flags, PARALLEL)
    if written is None:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", written) or int(written) < 1:
        raise BadSlots(f"-np/--parallel: expected an int >= 1, got {shown(written)}")
    return int(written)
