"""What a model needs, from whatever is known of it.

In order of trust:

1. measured: what the devices showed at its last load with these flags, these files and this llama-server;
2. declared: `models.<alias>.vram_mb`;
3. what llama-server itself said it would take (`memory.projection`), and the driver's own besides;
4. the formula over the header of its file;
5. the size of its file.

A number that stands for the whole (1, 2) keeps the parts of the next best one, as far as they go, so that people see what it
is made of. `system.vram_multiplier` is a margin on 3 to 5: it is a part by itself, and no part of what is projected. The
margin on 1 is what the model took in use besides, when that was seen.
"""

from collections.abc import Sequence
from typing import Final

import attrs

from trio_router.config.schema import ModelConfig
from trio_router.memory.footprint import MIB, MOST_GROWTH_BYTES, Footprint, Part, Place, Split, Trust, margin, on_each
from trio_router.memory.learned import DriverFacts, Load, ModelFacts
from trio_router.memory.projection import HOST, Projection, Share
from trio_router.memory.spread import Spread

LLAMA_SERVER: Final = "llama-server"
LEAST_GROWTH_BYTES: Final = 8 * MIB
"""The same of one that was seen, and may have done little."""
_OURS: Final = frozenset({"weights", "cache", "compute", "driver"})
"""Parts of the formula for which llama-server's own words stand."""


def best(
    model: ModelConfig, formula: Footprint, facts: ModelFacts, driver: DriverFacts | None, *, multiplier: float
) -> Footprint:
    """What `model` needs; `formula` is the estimate from its file, without a margin."""
    parts, trust = list(formula.parts), formula.trust
    if facts.projection is not None:
        parts, trust = _projected(formula, facts.projection), Trust.PROJECTED
    if driver is not None and driver.bytes is not None:
        known = Part(name="driver", bytes=driver.bytes, source=driver.source, place=Place.DEVICE)
        parts = [known if part.name == "driver" else part for part in parts]
    if facts.split is not None:
        formula = attrs.evolve(formula, split=Split(len(facts.split.held), _first(facts.split, driver)))
    total = _weighed(facts, parts, formula.spread, driver)
    if total is not None and any(part.place is Place.DEVICE for part in parts):
        whole = _whole(parts, total, "measured")
        return attrs.evolve(formula, parts=(*whole, _growth(whole, facts.grown, multiplier)), trust=Trust.MEASURED)
    if model.vram_mb is not None and any(part.place is Place.DEVICE for part in parts):
        parts = _whole(parts, model.vram_mb * MIB, "router.toml")
        return attrs.evolve(formula, parts=tuple(parts), trust=Trust.DECLARED)
    return attrs.evolve(formula, parts=(*parts, *margin(parts, multiplier)), trust=trust)


def _projected(formula: Footprint, projection: Projection) -> list[Part]:
    """llama-server's parts, and those of the formula that it says nothing of: projector, draft model, driver."""
    if projection.draft:
        beside = [part for part in formula.parts if part.name not in _OURS and not part.name.startswith("draft")]
    else:
        beside = [part for part in formula.parts if part.name not in _OURS]
    parts = _parts(projection.devices, Place.DEVICE)
    parts += _parts(() if projection.host is None else (projection.host,), Place.HOST)
    parts += _parts([share for share in projection.draft if share.name != HOST], Place.DEVICE, "draft ")
    parts += _parts([share for share in projection.draft if share.name == HOST], Place.HOST, "draft ")
    if projection.devices:
        parts += [part for part in formula.parts if part.name == "driver"]
    return [*parts, *beside]


def _parts(shares: Sequence[Share], place: Place, before: str = "") -> list[Part]:
    """Of several devices: weights and cache are dealt out, compute buffers each has for itself."""
    sizes = {
        "weights": sum(share.model for share in shares),
        "cache": sum(share.context for share in shares),
        "compute": max((share.compute for share in shares), default=0),
    }
    return [
        Part(name=f"{before}{name}", bytes=size, source=LLAMA_SERVER, place=place)
        for name, size in sizes.items()
        if size
    ]


def _growth(parts: Sequence[Part], grown: int | None, multiplier: float) -> Part:
    """What is reserved besides for what it takes in use: as seen, else a little."""
    if grown is not None:
        return Part(name="margin", bytes=max(grown, LEAST_GROWTH_BYTES), source="measured", place=Place.DEVICE)
    (first, *_) = [part.bytes for part in margin(parts, multiplier) if part.place is Place.DEVICE] or [0]
    return Part(name="margin", bytes=min(first, MOST_GROWTH_BYTES), source="vram_multiplier", place=Place.DEVICE)


def _weighed(facts: ModelFacts, parts: Sequence[Part], spread: Spread | None, driver: DriverFacts | None) -> int | None:
    """What the model would take of one device, first there; None if it was never seen."""
    if facts.load is not None:
        return _first(facts.load, driver)
    if facts.split is None:
        return None
    devices, copies = len(facts.split.held), 0 if spread is None else spread.copies
    return max(0, _first(facts.split, driver) - (devices - 1) * on_each(parts) - devices * copies)


def _first(load: Load, driver: DriverFacts | None) -> int:
    """What it would have taken with nobody else there."""
    return load.bytes if load.alone else load.bytes + shared(driver)


def shared(driver: DriverFacts | None) -> int:
    """What only the first process on a device pays."""
    if driver is None or driver.alone is None or driver.beside is None:
        return 0
    return max(0, driver.alone - driver.beside)


def _whole(parts: Sequence[Part], total: int, source: str) -> list[Part]:
    """`parts` with `total` on the device: what they leave of it is the driver's and others'; or it is one part."""
    host = [part for part in parts if part.place is Place.HOST]
    device = [part for part in parts if part.place is Place.DEVICE]
    driver = next((part for part in device if part.name == "driver"), None)
    rest = [part for part in device if part is not driver]
    left = total - sum(part.bytes for part in rest)
    if left < 0:
        return [Part(name="all", bytes=total, source=source, place=Place.DEVICE), *host]
    if driver is not None and driver.bytes <= left:
        rest.append(driver)
        left -= driver.bytes
        name = "other"
    else:
        name = "driver"
    if left:
        rest.append(Part(name=name, bytes=left, source=source, place=Place.DEVICE))
    return [*rest, *host]
