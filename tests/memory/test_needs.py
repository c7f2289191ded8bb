"""Which of several numbers is believed."""

from pathlib import Path

import attrs

from trio_router.config.schema import ModelConfig
from trio_router.memory.footprint import Footprint, Part, Place, Trust
from trio_router.memory.learned import DriverFacts, Held, Load, ModelFacts
from trio_router.memory.needs import best, shared
from trio_router.memory.projection import MIB, Projection, Share
from trio_router.memory.spread import Spread

MODEL = ModelConfig(alias="m", model_path="m", file=Path("m"))
DECLARED = attrs.evolve(MODEL, vram_mb=400)


def part(name: str, mib: int, source: str, place: Place = Place.DEVICE) -> Part:
    return Part(name=name, bytes=mib * MIB, source=source, place=place)


FORMULA = Footprint(
    parts=(
        part("weights", 90, "header"),
        part("weights", 28, "header", Place.HOST),
        part("cache", 100, "formula"),
        part("compute", 20, "formula"),
        part("driver", 56, "allowance"),
        part("projector", 30, "file size"),
    )
)
SAID = Projection(
    devices=(Share(name="CUDA0", model=92 * MIB, context=180 * MIB, compute=13 * MIB),),
    host=Share(name="Host", model=28 * MIB, context=0, compute=4 * MIB),
)
DRIVER = DriverFacts(device="H100", alone=54 * MIB, beside=46 * MIB)


def rows(of: Footprint) -> list[tuple[str, int, str, str]]:
    return [(one.name, round(one.bytes / MIB), one.source, one.place.value) for one in of.parts]


def held(*mib: int, alone: bool = True) -> ModelFacts:
    devices = [Held(uuid=f"GPU-{number}", device="H100", bytes=size * MIB) for number, size in enumerate(mib)]
    load = Load(held=tuple(devices), alone=alone)
    return ModelFacts(load=load) if len(mib) == 1 else ModelFacts(split=load)


def needs(
    facts: ModelFacts | None = None,
    driver: DriverFacts | None = None,
    *,
    model: ModelConfig = MODEL,
    formula: Footprint = FORMULA,
    multiplier: float = 1.5,
) -> Footprint:
    return best(model, formula, facts or ModelFacts(), driver, multiplier=multiplier)


def test_the_formula_stands_if_nothing_else_is_known() -> None:
    found = needs()
    assert found.trust is Trust.FORMULA
    assert found.parts[: len(FORMULA.parts)] == FORMULA.parts
    assert rows(found)[-2:] == [("margin", 148, "vram_multiplier", "device"), ("margin", 14, "vram_multiplier", "host")]
    assert found.projected_device_bytes == 296 * MIB
    assert found.device_bytes == (296 + 148) * MIB


def test_a_size_is_believed_last() -> None:
    assert needs(formula=attrs.evolve(FORMULA, trust=Trust.SIZE)).trust is Trust.SIZE


def test_what_llama_server_says_is_believed_before_the_formula() -> None:
    found = needs(ModelFacts(projection=SAID), multiplier=1)
    assert found.trust is Trust.PROJECTED
    assert rows(found) == [
        ("weights", 92, "llama-server", "device"),
        ("cache", 180, "llama-server", "device"),
        ("compute", 13, "llama-server", "device"),
        ("weights", 28, "llama-server", "host"),
        ("compute", 4, "llama-server", "host"),
        ("driver", 56, "allowance", "device"),
        ("projector", 30, "file size", "device"),
    ]


def test_a_learned_driver_stands_for_the_allowance() -> None:
    found = needs(ModelFacts(projection=SAID), DRIVER, multiplier=1)
    assert ("driver", 54, "learned", "device") in rows(found)
    assert found.projected_device_bytes == (92 + 180 + 13 + 54 + 30) * MIB


def test_a_draft_model_that_it_speaks_of_is_not_counted_twice() -> None:
    draft = (part("draft weights", 11, "header"), part("draft cache", 7, "formula"))
    formula = attrs.evolve(FORMULA, parts=(*FORMULA.parts, *draft))
    silent = needs(ModelFacts(projection=SAID), formula=formula, multiplier=1)
    assert [row[:3] for row in rows(silent) if "draft" in row[0]] == [
        ("draft weights", 11, "header"),
        ("draft cache", 7, "formula"),
    ]
    told = attrs.evolve(SAID, draft=(Share(name="CUDA0", model=9 * MIB, context=5 * MIB, compute=3 * MIB),))
    spoken = needs(ModelFacts(projection=told), formula=formula, multiplier=1)
    assert [row[:3] for row in rows(spoken) if "draft" in row[0]] == [
        ("draft weights", 9, "llama-server"),
        ("draft cache", 5, "llama-server"),
        ("draft compute", 3, "llama-server"),
    ]


def test_of_two_devices_each_has_its_own_compute_buffers() -> None:
    two = attrs.evolve(SAID, devices=(SAID.devices[0], attrs.evolve(SAID.devices[0], name="CUDA1", compute=17 * MIB)))
    found = needs(ModelFacts(projection=two), multiplier=1)
    assert [row[:2] for row in rows(found)[:3]] == [("weights", 184), ("cache", 360), ("compute", 17)]


def test_a_server_that_sees_no_device_needs_none() -> None:
    found = needs(ModelFacts(projection=attrs.evolve(SAID, devices=())), DRIVER, multiplier=1)
    assert [one.name for one in found.parts if one.place is Place.DEVICE] == ["projector"]


def test_what_is_declared_is_believed_before_both() -> None:
    found = needs(ModelFacts(projection=SAID), DRIVER, model=DECLARED)
    assert found.trust is Trust.DECLARED
    assert found.device_bytes == found.projected_device_bytes == 400 * MIB
    assert ("other", 400 - 369, "router.toml", "device") in rows(found)
    assert found.host_bytes == 32 * MIB


def test_what_was_measured_is_believed_first() -> None:
    facts = attrs.evolve(held(375), projection=SAID)
    found = needs(facts, DRIVER, model=DECLARED)
    assert found.trust is Trust.MEASURED
    assert found.projected_device_bytes == 375 * MIB
    assert rows(found)[-1] == ("margin", 32, "vram_multiplier", "device")
    assert ("other", 6, "measured", "device") in rows(found)
    assert ("driver", 54, "learned", "device") in rows(found)


def test_less_than_its_parts_is_one_number_or_the_drivers() -> None:
    assert rows(needs(held(250), DRIVER))[-3:-1] == [
        ("driver", 10, "measured", "device"),
        ("weights", 28, "header", "host"),
    ]
    assert rows(needs(held(200), DRIVER))[:-1] == [
        ("all", 200, "measured", "device"),
        ("weights", 28, "header", "host"),
    ]


def test_what_it_took_more_in_use_is_reserved_and_not_projected() -> None:
    found = needs(attrs.evolve(held(375), grown=21 * MIB))
    assert (found.projected_device_bytes, found.device_bytes) == (375 * MIB, 396 * MIB)
    assert rows(found)[-1] == ("margin", 21, "measured", "device")
    assert needs(held(100), multiplier=1.1).device_bytes == 110 * MIB


def test_the_first_on_a_device_takes_more_than_the_second_took() -> None:
    assert shared(DRIVER) == 8 * MIB
    assert shared(attrs.evolve(DRIVER, alone=None)) == shared(None) == 0
    assert needs(held(300, alone=False), DRIVER).projected_device_bytes == 308 * MIB
    assert needs(held(300, alone=False)).projected_device_bytes == 300 * MIB


def test_a_model_that_was_split_needs_one_driver_less_on_one_device() -> None:
    found = needs(held(200, 180))
    assert found.projected_device_bytes == (380 - 56 - 20) * MIB
    assert [found.over(devices) // MIB for devices in (0, 1, 2, 3)] == [304, 304, 380, 456]


def test_a_split_that_was_seen_says_what_the_next_one_takes() -> None:
    found = needs(ModelFacts(load=held(296).load, split=held(200, 190).split))
    assert found.projected_device_bytes == 296 * MIB
    assert [found.over(devices) // MIB for devices in (1, 2, 3)] == [296, 390, 296 - 76 + 3 * 85]
    assert found.each_bytes == 85 * MIB  # 76 are known of


def test_a_split_that_nobody_saw_has_copies_of_its_inputs() -> None:
    formula = attrs.evolve(FORMULA, spread=Spread(grain=20 * MIB, copies=10 * MIB))
    assert [needs(formula=formula).over(devices) // MIB for devices in (1, 2)] == [296, 296 + 76 + 20]
    only = needs(held(200, 190), formula=formula)
    assert [only.over(devices) // MIB for devices in (1, 2)] == [390 - 76 - 20, 390]


def test_on_the_host_only_nothing_is_declared_or_measured() -> None:
    host = Footprint(parts=(part("weights", 90, "header", Place.HOST),))
    found = needs(held(300), DRIVER, model=DECLARED, formula=host)
    assert (found.trust, found.device_bytes) == (Trust.FORMULA, 0)
