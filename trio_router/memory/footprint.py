"""How much memory a model will take, before it was ever loaded: weights, caches, compute buffers, and a margin.

Checked against llama-server's own projection (`-lv 4`) for SmolLM2, on a GPU and without: all layers offloaded or nine
of thirty, f16 and q8_0 caches, one slot and eight, with flash attention and without, embeddings: within 4 MiB of that.
"""

import enum
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import attrs

from trio_router.config.flags import last_value
from trio_router.config.schema import ModelConfig
from trio_router.memory.gguf import GgufError, GgufHeader, read_header
from trio_router.memory.hparams import HeaderLacks, block_count, number
from trio_router.memory.kv import cells_per_stream, layer_caches
from trio_router.memory.settings import DRAFT, PROJECTOR, MemorySettings, draft_settings_of, settings_of
from trio_router.memory.spread import Spread, by_block, copies, grain

MIB: Final = 1024 * 1024
CUDA_DRIVER_BYTES: Final = 400 * MIB
"""What a process costs on a device before it allocates anything, with CUDA: 300 to 500 MiB are usual."""
VULKAN_DRIVER_BYTES: Final = 56 * MIB
"""The same with Vulkan: 48 to 55 MiB, measured on one H100."""
MOST_GROWTH_BYTES: Final = 32 * MIB
"""What a model that was never seen in use may take more than at its load. Seen with Vulkan: 6 to 21 MiB."""
_F32: Final = 4
_LEAST_COMPUTE: Final = 300 * MIB

_ON_EACH: Final = frozenset({"driver", "compute"})
_BLOCK: Final = re.compile(r"blk\.(\d{1,6})\.")
_EXPERT: Final = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch)?exps")
_INPUT: Final = ("token_embd", "per_layer_token_embd", "position_embd", "token_types")


def driver_allowance(server: Path) -> int:
    """What the driver costs a process of `server` where nothing was learned yet: by the libraries beside it. Blocks."""
    names = [path.name for path in server.parent.glob("*ggml-*")]
    vulkan = any("ggml-vulkan" in name for name in names) and not any("ggml-cuda" in name for name in names)
    return VULKAN_DRIVER_BYTES if vulkan else CUDA_DRIVER_BYTES


class Trust(enum.Enum):
    """Where the numbers of a footprint are from, the most trusted first."""

    MEASURED = "measured"
    DECLARED = "declared"
    PROJECTED = "llama-server"
    FORMULA = "formula"
    SIZE = "file size"


class Place(enum.Enum):
    """Where bytes lie."""

    DEVICE = "device"
    HOST = "host"


@attrs.frozen(kw_only=True)
class Part:
    """One thing that takes memory."""

    name: str
    """`weights`, `cache`, `compute`, `driver`, `projector`, `draft weights`, `draft cache`, `other`, `all`, `margin`."""
    bytes: int
    source: str
    """Where the number comes from: `measured`, `router.toml`, `llama-server`, `learned`, `dry run`, `header`, `formula`,
    `allowance`, `file size`, `file missing`, `vram_multiplier`."""
    place: Place


def on_each(parts: Iterable[Part]) -> int:
    """Bytes of these that every device has for itself."""
    return sum(part.bytes for part in parts if part.place is Place.DEVICE and part.name in _ON_EACH)


@attrs.frozen
class Split:
    """What a model took of several devices together."""

    devices: int
    bytes: int


@attrs.frozen(kw_only=True)
class Footprint:
    """What one model needs."""

    parts: tuple[Part, ...]
    trust: Trust = Trust.FORMULA
    note: str | None = None
    """Why the formula could not be used."""
    spread: Spread | None = None
    """What it costs to split it over several devices; None: its header does not say."""
    split: Split | None = None
    """What it took when it was split over several devices; None: not known yet."""

    @property
    def total_bytes(self) -> int:
        return self.device_bytes + self.host_bytes

    @property
    def device_bytes(self) -> int:
        return self._bytes(Place.DEVICE)

    @property
    def host_bytes(self) -> int:
        return self._bytes(Place.HOST)

    @property
    def projected_device_bytes(self) -> int:
        """What the device is expected to show; `device_bytes`, which is reserved, has the margin besides."""
        return self._bytes(Place.DEVICE) - self._bytes(Place.DEVICE, "margin")

    @property
    def growth_bytes(self) -> int:
        """What it may take in use beyond its load: of a margin on an estimate, a little."""
        margin = self._bytes(Place.DEVICE, "margin")
        return margin if self.trust is Trust.MEASURED else min(margin, MOST_GROWTH_BYTES)

    @property
    def each_bytes(self) -> int:
        """What each of several devices takes for itself: its driver, its compute buffers, copies of their inputs."""
        each = on_each(self.parts)
        if self.split is not None:
            return max(each, (self.split.bytes - self.projected_device_bytes + each) // self.split.devices)
        return each if self.spread is None else each + self.spread.copies

    def over(self, devices: int) -> int:
        """What so many devices are expected to show together, the model split over them."""
        if devices < 2:
            return self.projected_device_bytes
        if self.split is not None and self.split.devices == devices:
            return self.split.bytes
        return self.projected_device_bytes - on_each(self.parts) + devices * self.each_bytes

    def _bytes(self, place: Place, name: str | None = None) -> int:
        return sum(part.bytes for part in self.parts if part.place is place and name in {None, part.name})


@attrs.frozen(kw_only=True)
class _Sizes:
    """Bytes by place, on their way to parts."""

    device: int = 0
    host: int = 0

    def parts(self, name: str, source: str) -> list[Part]:
        return [
            Part(name=name, bytes=size, source=source, place=place)
            for size, place in ((self.device, Place.DEVICE), (self.host, Place.HOST))
            if size
        ]


@attrs.frozen(kw_only=True)
class _Offload:
    """Which layers are on the device: the last ones, the output layer counting as one (`llama_model::load_tensors`)."""

    first: int
    """The first block on the device."""
    output: bool

    @classmethod
    def of(cls, blocks: int, settings: MemorySettings, *, gpu: bool) -> "_Offload":
        layers = blocks + 1 if settings.gpu_layers is None else settings.gpu_layers
        if not gpu or not layers:
            return cls(first=blocks + 1, output=False)
        return cls(first=max(0, blocks + 1 - layers), output=True)


def _weights(header: GgufHeader, settings: MemorySettings, offload: _Offload) -> _Sizes:
    """Every tensor where llama-server puts it; a model without output weights has its embeddings in both places."""
    device = host = 0
    tied = not any(tensor.name.startswith("output.") for tensor in header.tensors)
    for tensor in header.tensors:
        if block := _BLOCK.match(tensor.name):
            kept = int(block[1]) < settings.cpu_expert_layers and _EXPERT.search(tensor.name) is not None
            on_device, on_host = int(block[1]) >= offload.first and not kept, None
        elif tensor.name.startswith(_INPUT):
            on_device, on_host = offload.output and tied and tensor.name.startswith("token_embd."), True
        else:
            on_device, on_host = offload.output, None
        device += tensor.bytes if on_device else 0
        host += tensor.bytes if on_host or not on_device else 0
    return _Sizes(device=device, host=host)


def _caches(header: GgufHeader, settings: MemorySettings, offload: _Offload) -> _Sizes:
    device = host = 0
    for cache in layer_caches(header, settings):
        if cache.layer >= offload.first and settings.cache_on_device:
            device += cache.bytes
        else:
            host += cache.bytes
    return _Sizes(device=device, host=host)


def _largest(header: GgufHeader, key: str) -> int:
    value = header.get(key)
    if isinstance(value, tuple):
        return max((int(item) for item in value if isinstance(item, int)), default=0)
    return number(header, key) or 0


def _compute(header: GgufHeader, settings: MemorySettings) -> int | None:
    """Bytes of the compute buffer; None if the header lacks the widths.

    There is no closed form: the graph decides. For a plain transformer it is the attention mask and the greediest
    of three phases, whose tensors share their memory: attention (without flash attention, the scores of every head),
    feed-forward, and the logits of one token per slot, or of every token. The factors are fitted to SmolLM2.
    """
    embedding, forward = number(header, "embedding_length"), _largest(header, "feed_forward_length")
    experts = _largest(header, "expert_used_count") * _largest(header, "expert_feed_forward_length")
    if not embedding or not (forward or experts):
        return None
    batch, cells = settings.micro_batch, cells_per_stream(header, settings)
    scores = 0 if settings.flash_attention else cells * _largest(header, "attention.head_count")
    mask = batch * cells * (2 if settings.flash_attention else _F32)
    attention = batch * (6 * embedding + scores)
    feed_forward = batch * (4 * embedding + 3 * max(forward, experts))
    logits = settings.outputs * _largest(header, "vocab_size")
    return mask + max(attention, feed_forward, logits) * _F32


def _model_parts(header: GgufHeader, settings: MemorySettings, *, gpu: bool) -> list[Part]:
    """Weights, caches and compute buffers of the main model. Raises HeaderLacks."""
    blocks = block_count(header)
    offload = _Offload.of(blocks, settings, gpu=gpu)
    weights, caches = _weights(header, settings, offload), _caches(header, settings, offload)
    compute, source = _compute(header, settings), "formula"
    if compute is None:
        held = weights.device + weights.host + caches.device + caches.host
        compute, source = max(_LEAST_COMPUTE, held // 10), "allowance"
    # A device works on large batches even for layers that are not on it.
    buffers = _Sizes(device=compute if gpu else 0, host=compute if offload.first > 0 else 0)
    return [*weights.parts("weights", "header"), *caches.parts("cache", "formula"), *buffers.parts("compute", source)]


def _spread(header: GgufHeader, settings: MemorySettings) -> Spread:
    """What splitting the main model over several devices costs. Raises HeaderLacks."""
    named = [(_BLOCK.match(tensor.name), tensor) for tensor in header.tensors]
    caches = layer_caches(header, settings) if settings.cache_on_device else ()
    blocks = by_block(
        [(int(block[1]), tensor.bytes) for block, tensor in named if block] + [(one.layer, one.bytes) for one in caches]
    )
    outputs = [tensor.bytes for block, tensor in named if not block and not tensor.name.startswith(_INPUT)]
    tied = not any(tensor.name.startswith("output.") for _, tensor in named)
    inputs = [tensor.bytes for _, tensor in named if tied and tensor.name.startswith("token_embd.")]
    whole = settings.gpu_layers is None or settings.gpu_layers > block_count(header)
    return Spread(
        grain=grain(blocks.values(), sum(outputs) + sum(inputs)),
        copies=copies(
            batch=settings.micro_batch,
            cells=cells_per_stream(header, settings),
            embedding=number(header, "embedding_length") or 0,
            flash_attention=settings.flash_attention,
        )
        if whole and settings.cache_on_device
        else 0,
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return None


def _whole_file(name: str, size: int | None, *, on_device: bool) -> Part:
    place = Place.DEVICE if on_device else Place.HOST
    source = "file missing" if size is None else "file size"
    return Part(name=name, bytes=size or 0, source=source, place=place)


def _draft_parts(model: ModelConfig, path: Path, *, gpu: bool) -> list[Part]:
    settings = draft_settings_of(model)
    gpu = gpu and settings.gpu_layers != 0
    try:
        header = read_header(path)
        offload = _Offload.of(block_count(header), settings, gpu=gpu)
        weights = _weights(header, settings, offload).parts("draft weights", "header")
        return [*weights, *_caches(header, settings, offload).parts("draft cache", "formula")]
    except (GgufError, HeaderLacks):
        return [_whole_file("draft weights", _size(path), on_device=gpu)]


def _beside(model: ModelConfig, *, gpu: bool) -> list[Part]:
    """What the flags load next to the model: a projector, a draft model."""
    parts: list[Part] = []
    projector, draft = last_value(model.flags, PROJECTOR), last_value(model.flags, DRAFT)
    if projector is not None:
        on_device = gpu and settings_of(model).projector_on_device
        parts.append(_whole_file("projector", _size(Path(projector)), on_device=on_device))
    if draft is not None:
        parts += _draft_parts(model, Path(draft), gpu=gpu)
    return parts


def margin(parts: Sequence[Part], multiplier: float) -> list[Part]:
    """What `system.vram_multiplier` adds, by place."""
    extra = {
        place: round(sum(part.bytes for part in parts if part.place is place) * (multiplier - 1)) for place in Place
    }
    return _Sizes(device=extra[Place.DEVICE], host=extra[Place.HOST]).parts("margin", "vram_multiplier")


def estimate(
    model: ModelConfig, *, multiplier: float, gpu: bool = True, driver_bytes: int = CUDA_DRIVER_BYTES
) -> Footprint:
    """What `model` needs when llama-server loads it with its flags and `--parallel model.slots`.

    `gpu`: whether llama-server sees one device; without, everything is on the host. `driver_bytes` is what the
    process itself costs there. `multiplier` is a margin on the whole sum.

    Not seen: `--override-tensor`, several devices, and what `--fit` takes away when memory is short. So the
    estimate errs to the large side there.

    Reads the headers of the files: blocks on the disk. If a header lacks what the formula needs, the file's size
    stands for the model and `note` says why. Raises GgufError only if there is no file at all.
    """
    settings = settings_of(model)
    on_device = gpu and last_value(model.flags, frozenset({"-dev", "--device"})) != "none"
    note, trust, spread = None, Trust.FORMULA, None
    file_bytes = _size(model.file)
    try:
        header = read_header(model.file)
        file_bytes = header.file_bytes
        parts = _model_parts(header, settings, gpu=on_device)
        if on_device:
            with suppress(HeaderLacks):  # then nobody knows what a split costs
                spread = _spread(header, settings)
            parts.append(Part(name="driver", bytes=driver_bytes, source="allowance", place=Place.DEVICE))
    except (GgufError, HeaderLacks) as exc:
        if file_bytes is None:
            raise
        note, trust = str(exc), Trust.SIZE
        parts = [_whole_file("weights", file_bytes, on_device=on_device and settings.gpu_layers != 0)]
    parts += _beside(model, gpu=on_device)
    return Footprint(parts=(*parts, *margin(parts, multiplier)), trust=trust, note=note, spread=spread)
