"""What a model needs, in the terms of `memory.room`: from its footprint, its flags and its entry of router.toml.

Flags that say on which GPUs a model lies (`--device`, `--tensor-split`, `--split-mode`, `--main-gpu`) stand: such a model
sees every GPU of `system.gpu_devices`, in that order, and what it takes of each is only accounted, as far as the flags
tell. llama-server's own default, to split by free memory, counts as equal shares.
"""

import math
import re
from collections.abc import Sequence
from typing import Final

from trio_router.config.flags import flag_name, last_value
from trio_router.config.schema import ModelConfig
from trio_router.memory.footprint import Footprint, on_each
from trio_router.memory.room import Need
from trio_router.memory.settings import DEVICE, may_shrink

TENSOR_SPLIT: Final = frozenset({"-ts", "--tensor-split"})
SPLIT_MODE: Final = frozenset({"-sm", "--split-mode"})
MAIN_GPU: Final = frozenset({"-mg", "--main-gpu"})
PLACING: Final = DEVICE | TENSOR_SPLIT | SPLIT_MODE | MAIN_GPU


def need_of(
    model: ModelConfig, footprint: Footprint | None, gpu_devices: Sequence[int], factor: float = 1.0
) -> Need | None:
    """What `model` takes, `factor` times what its footprint says; None if that is not known."""
    if footprint is None:
        return None
    return Need(
        device_bytes=math.ceil(footprint.device_bytes * factor),
        fixed_bytes=math.ceil(min(on_each(footprint.parts), footprint.device_bytes) * factor),
        each_bytes=math.ceil(footprint.each_bytes * factor),
        grain_bytes=None if footprint.spread is None else math.ceil(footprint.spread.grain * factor),
        host_bytes=math.ceil(footprint.host_bytes * factor),
        devices=model.gpu,
        shrinks=may_shrink(model.flags),
        shares=_shares(model.flags, model.gpu or gpu_devices),
    )


def places_itself(flags: Sequence[str]) -> bool:
    """Whether the flags say on which GPUs the model lies."""
    return any(flag_name(flag) in PLACING for flag in flags)


def _shares(flags: Sequence[str], devices: Sequence[int]) -> dict[int, float] | None:
    if not devices or not places_itself(flags):
        return None
    seen = list(devices)
    if (named := last_value(flags, DEVICE)) is not None:
        numbers = [int(found[0]) for name in named.split(",") if (found := re.search(r"[0-9]{1,4}$", name.strip()))]
        seen = [devices[number] for number in dict.fromkeys(numbers) if number < len(devices)] or seen
    if last_value(flags, SPLIT_MODE) == "none":
        main = last_value(flags, MAIN_GPU) or "0"
        return {seen[int(main)] if main.isdecimal() and int(main) < len(seen) else seen[0]: 1.0}
    weights = [1.0] * len(seen)
    if (split := last_value(flags, TENSOR_SPLIT)) is not None:
        given = [float(part) for part in re.split(r"[,/]", split) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?", part)]
        weights = (given + [0.0] * len(seen))[: len(seen)]
    total = sum(weights)
    if not total:
        return dict.fromkeys(seen, 1 / len(seen))
    return {device: weight / total for device, weight in zip(seen, weights, strict=True) if weight}
