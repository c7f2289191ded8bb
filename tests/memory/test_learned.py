import os
from pathlib import Path

import attrs
import pytest
import structlog

from trio_router.memory import learned
from trio_router.memory.learned import DriverFacts, Held, Learned, Load, ModelFacts, default_folder
from trio_router.memory.projection import MIB, Projection, Share

PROJECTION = Projection(devices=(Share(name="Vulkan0", model=92 * MIB, context=180 * MIB, compute=13 * MIB),))
"""285 MiB."""


def load(mib: int, *, alone: bool = True, uuid: str = "GPU-1", device: str = "H100") -> Load:
    return Load(held=(Held(uuid=uuid, device=device, bytes=mib * MIB),), alone=alone)


def test_what_was_learned_is_known_at_the_next_start(tmp_path: Path) -> None:
    first = Learned(tmp_path / "state")
    first.read()
    first.projected("model", "server", PROJECTION)
    first.loaded("model", "server", load(340))
    first.save()
    second = Learned(tmp_path / "state")
    second.read()
    assert second.model("model") == first.model("model")
    assert second.model("model").load == load(340)
    assert second.model("another") == ModelFacts()
    assert second.driver("server", {"GPU-1": "H100"}).bytes == 55 * MIB
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["memory.json"]


def test_what_a_killed_router_left_half_written_is_swept(tmp_path: Path) -> None:
    old, new = tmp_path / ".memory.json-old", tmp_path / ".memory.json-new"
    for path in (old, new, tmp_path / "other"):
        path.write_text("{")
    os.utime(old, (1, 1))
    os.utime(tmp_path / "other", (1, 1))
    Learned(tmp_path).read()
    assert {path.name for path in tmp_path.iterdir()} == {new.name, "other"}


@pytest.mark.parametrize("order", ["load first", "projection first"])
def test_a_driver_is_what_was_taken_less_what_was_said(order: str) -> None:
    known = Learned()
    tell = [lambda: known.loaded("m", "s", load(340)), lambda: known.projected("m", "s", PROJECTION)]
    for each in tell if order == "load first" else reversed(tell):
        each()
    assert known.driver("s", {"GPU-1": "H100"}).alone == 55 * MIB


def test_the_first_process_on_a_device_pays_more() -> None:
    known = Learned()
    known.projected("m", "s", PROJECTION)
    known.loaded("m", "s", load(332, alone=False))
    fact = known.driver("s", {"GPU-1": "H100"})
    assert (fact.bytes, fact.source) == (47 * MIB, "learned")
    known.loaded("m", "s", load(340))
    assert known.driver("s", {"GPU-1": "H100"}).bytes == 55 * MIB


def test_the_most_that_it_took_in_use_is_kept() -> None:
    known = Learned()
    known.used("m", load(350))
    assert known.model("m") == ModelFacts()
    known.loaded("m", "s", load(340))
    for mib in (346, 361, 339):
        known.used("m", load(mib))
    assert known.model("m").grown == 21 * MIB


def test_what_a_dry_run_showed_is_better_than_nothing() -> None:
    known = Learned()
    known.idle("s", Held(uuid="GPU-1", device="H100", bytes=49 * MIB))
    fact = known.driver("s", {"GPU-1": "H100"})
    assert (fact.bytes, fact.source) == (49 * MIB, "dry run")
    known.projected("m", "s", PROJECTION)
    known.loaded("m", "s", load(340))
    assert known.driver("s", {"GPU-1": "H100"}).bytes == 55 * MIB


def test_a_driver_is_one_servers_on_devices_of_one_name() -> None:
    known = Learned()
    known.projected("m", "s", PROJECTION)
    known.loaded("m", "s", load(340))
    assert known.driver("s", {"GPU-2": "H100"}).bytes == 55 * MIB
    assert known.driver("s", {"GPU-2": "A100"}) is None
    assert known.driver("another", {"GPU-1": "H100"}) is None


def split(*mib: int) -> Load:
    return Load(
        held=tuple(Held(uuid=f"GPU-{at}", device="H100", bytes=size * MIB) for at, size in enumerate(mib)), alone=True
    )


def test_one_device_and_several_are_two_facts() -> None:
    known = Learned()
    known.loaded("m", "s", load(340))
    known.loaded("m", "s", split(208, 206))
    assert (known.model("m").load, known.model("m").split) == (load(340), split(208, 206))
    known.used("m", split(218, 214))
    assert known.model("m").grown == 18 * MIB
    known.used("m", split(300, 300, 300))
    assert known.model("m").grown == 18 * MIB, "it was begun otherwise"


def test_what_is_said_of_one_device_stands() -> None:
    (share,) = PROJECTION.devices
    both = Projection(devices=(share, share))
    known = Learned()
    known.projected("m", "s", both)
    assert known.model("m").projection == both
    known.projected("m", "s", PROJECTION)
    known.projected("m", "s", both)
    assert known.model("m").projection == PROJECTION


def test_the_most_that_processes_took_of_devices_of_others() -> None:
    known = Learned()
    for mib in (8, 16, 12):
        stray = Held(uuid="GPU-0", device="H100", bytes=mib * MIB)
        known.loaded("m", "s", attrs.evolve(load(340), strays=(stray,)))
    assert known.strays("s", ("GPU-0", "GPU-1")) == {"GPU-0": 16 * MIB}
    assert known.strays("another", ("GPU-0",)) == {}
    assert known.driver("s", {"GPU-0": "H100"}) is None, "nobody computed there"


@pytest.mark.parametrize("mib", [285, 200, 285 + 5000])
def test_what_cannot_be_a_driver_is_none(mib: int) -> None:
    known = Learned()
    known.projected("m", "s", PROJECTION)
    known.loaded("m", "s", load(mib))
    known.idle("s", Held(uuid="GPU-1", device="H100", bytes=(mib - 285) * MIB))
    assert known.driver("s", {"GPU-1": "H100"}) is None


def test_of_two_devices_nobody_knows_whose_is_what() -> None:
    known = Learned()
    known.projected("m", "s", PROJECTION)
    known.loaded("m", "s", attrs.evolve(load(340), held=(*load(200).held, *load(190, uuid="GPU-2").held)))
    assert known.driver("s", {"GPU-1": "H100"}) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\x00",
        b'{"version": 1, "models": {"m": {"load": 3}}}',
        b'{"version": 99}',
        b"[" * 100_000,
        b'{"version": 1, "models": {"\xff": {}}}',
        b'{"x": ' + b"[" * 100_000,
    ],
)
def test_a_file_that_is_none_of_ours_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "memory.json").write_bytes(content)
    known = Learned(tmp_path)
    known.read()
    assert known.facts.models == {}
    known.loaded("m", "s", load(1))
    known.save()
    assert Learned(tmp_path).model("m") == ModelFacts()
    again = Learned(tmp_path)
    again.read()
    assert again.model("m").load == load(1)


def test_a_huge_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "MAX_BYTES", 100)
    (tmp_path / "memory.json").write_bytes(b'{"version": 1, "models": {}}' + b" " * 200)
    known = Learned(tmp_path)
    known.read()  # cut, it is still JSON
    assert known.facts.models == {}


def test_nowhere_to_write_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = Learned(tmp_path / "file" / "state")
    known.loaded("m", "s", load(1))
    with structlog.testing.capture_logs() as logs:
        known.read()
        known.save()
        known.save()
    assert [(entry["log_level"], entry["file"]) for entry in logs] == [
        ("warning", str(tmp_path / "file" / "state" / "memory.json"))
    ]
    assert known.model("m").load == load(1)


def test_two_routers_do_not_lose_each_others(tmp_path: Path) -> None:
    one, other = Learned(tmp_path), Learned(tmp_path)
    one.loaded("a", "s", load(1))
    other.loaded("b", "s", load(2))
    one.save()
    other.save()
    third = Learned(tmp_path)
    third.read()
    assert (third.model("a").load, third.model("b").load) == (load(1), load(2))


def test_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "MAX_MODELS", 3)
    times = iter(range(100))
    monkeypatch.setattr(learned.time, "time", lambda: float(next(times)))
    known = Learned(tmp_path)
    for name in "abcde":
        known.loaded(name, "s", load(1))
    known.save()
    assert list(known.facts.models) == ["c", "d", "e"]


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = Learned()
    known.read()
    known.loaded("m", "s", load(1))
    known.save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "XDG_STATE_HOME": "/x"}, "/var/lib/a"),
        ({"XDG_STATE_HOME": "/x"}, "/x/trio-router"),
        ({}, "/home/me/.local/state/trio-router"),
    ],
)
def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], folder: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert default_folder(environ) == Path(folder)


def test_facts_say_where_they_are_from() -> None:
    assert DriverFacts(device="x").bytes is None
