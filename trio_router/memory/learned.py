"""What was learned on this machine about memory, kept in a file from one start to the next.

For a model, by its `fingerprint`: what llama-server said it would take, and what the devices showed that it took when it
was loaded last. For a device and a llama-server, what a process costs there besides: the driver's own.

*Error handling*: the file is a convenience. One that cannot be read, or is none of ours, counts as empty; one that cannot
be written is said once. Everything works without it, from scratch.
"""

import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import attrs
import msgspec
import structlog

from trio_router.memory.projection import MIB, Projection

NAME: Final = "memory.json"
UNFINISHED: Final = f".{NAME}-"
"""What a file is called while it is written,"""
UNFINISHED_SECONDS: Final = 60.0
"""and for how long at most."""
VERSION: Final = 2
"""1: a load on the second GPU could count as one on both."""
MAX_BYTES: Final = 4 * 1024 * 1024
MAX_MODELS: Final = 500
MAX_DRIVERS: Final = 100
MAX_DRIVER_BYTES: Final = 4096 * MIB
"""More than this is no driver's own: somebody else took it."""

_Fact = TypeVar("_Fact", "ModelFacts", "DriverFacts")

log = structlog.get_logger("trio_router.memory")


@attrs.frozen(kw_only=True)
class Held:
    """What a process took of one device."""

    uuid: str
    device: str
    """The device's name: another of that name is taken to behave alike."""
    bytes: int


@attrs.frozen(kw_only=True)
class Load:
    """What a model took when it was loaded."""

    held: tuple[Held, ...]
    alone: bool
    """Whether no other process was on those devices: the first one there pays a little more."""
    strays: tuple[Held, ...] = ()
    """What it took of devices that it does not compute on."""

    @property
    def bytes(self) -> int:
        """On all devices that it computes on."""
        return sum(held.bytes for held in self.held)


@attrs.frozen(kw_only=True)
class ModelFacts:
    """What is known of one model with its flags."""

    projection: Projection | None = None
    """Of the fewest devices that it was ever said for."""
    load: Load | None = None
    """On one device,"""
    split: Load | None = None
    """and on several."""
    grown: int | None = None
    """Bytes that it took more in use than at its load: buffers that its driver makes when they are needed."""
    at: float = 0.0
    """Unix time of the last change."""


@attrs.frozen(kw_only=True)
class DriverFacts:
    """What a process costs on one device besides what llama-server says, in bytes."""

    device: str
    alone: int | None = None
    """Seen at a load with nobody else there,"""
    beside: int | None = None
    """or with others,"""
    idle: int | None = None
    """or before anything was allocated: a little less."""
    stray: int | None = None
    """By a process that computes on other devices."""
    at: float = 0.0

    @property
    def bytes(self) -> int | None:
        """The best of them, for a process that comes first."""
        return next((size for size in (self.alone, self.beside, self.idle) if size is not None), None)

    @property
    def source(self) -> str:
        """Where that is from."""
        return "dry run" if self.alone is None and self.beside is None else "learned"


@attrs.frozen(kw_only=True)
class Facts:
    """The file."""

    version: int = VERSION
    models: Mapping[str, ModelFacts] = attrs.field(factory=dict)
    drivers: Mapping[str, DriverFacts] = attrs.field(factory=dict)
    """By the device's UUID and the llama-server's print."""


def default_folder(environ: Mapping[str, str]) -> Path | None:
    """Where state is kept: systemd's folder for the service, else XDG's; None for nobody's home."""
    if given := environ.get("STATE_DIRECTORY"):  # several are separated by colons
        return Path(given.split(":", maxsplit=1)[0])
    if given := environ.get("XDG_STATE_HOME"):
        return Path(given) / "trio-router"
    try:
        return Path.home() / ".local" / "state" / "trio-router"
    except RuntimeError:
        return None


@attrs.define(eq=False)
class Learned:
    """The facts, and their file. Only `read` and `save` touch the disk; both block."""

    folder: Path | None = None
    """None: nothing is kept."""
    facts: Facts = attrs.field(factory=Facts)
    _told: bool = attrs.field(default=False, init=False)

    @property
    def path(self) -> Path | None:
        """The file."""
        return None if self.folder is None else self.folder / NAME

    def read(self) -> None:
        """Take what the file says, and take away what a router left that was killed while it wrote."""
        self.facts = _merged(self._stored(), self.facts)
        if self.folder is not None:
            for left in self.folder.glob(f"{UNFINISHED}*"):
                with suppress(OSError):  # another router's, which has just finished
                    if time.time() - left.stat().st_mtime > UNFINISHED_SECONDS:
                        left.unlink()

    def save(self) -> None:
        """Write the file, whole or not at all; what another router learned meanwhile stays in it."""
        if self.path is None:
            return
        self.facts = _merged(self._stored(), self.facts)
        content = msgspec.json.format(msgspec.json.encode(self.facts), indent=1)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=UNFINISHED, delete=False) as file:
                try:
                    file.write(content)
                    file.close()
                    os.replace(file.name, self.path)  # noqa: PTH105  (a name that tempfile made)
                except BaseException:
                    os.unlink(file.name)  # noqa: PTH108
                    raise
        except OSError as error:
            self._tell("what was learned is not kept", error)

    def _stored(self) -> Facts:
        if self.path is None:
            return Facts()
        try:
            with self.path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
            facts = msgspec.json.decode(content[:MAX_BYTES], type=Facts)
        except FileNotFoundError:
            return Facts()
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._tell("what was learned cannot be read", error)
            return Facts()
        return facts if facts.version == VERSION else Facts()

    def _tell(self, what: str, error: Exception) -> None:
        if not self._told:
            log.warning(what, file=str(self.path), error=str(error))
        self._told = True

    # --- facts ------------------------------------------------------------------------------------

    def model(self, print_: str) -> ModelFacts:
        """What is known of the model."""
        return self.facts.models.get(print_, ModelFacts())

    def driver(self, server: str, uuids: Mapping[str, str]) -> DriverFacts | None:
        """What a process of `server` costs on the devices `uuids` (UUID -> name): the most known of any of them."""
        seen = {key: fact for key, fact in self.facts.drivers.items() if fact.bytes is not None}
        known = [fact for uuid in uuids if (fact := seen.get(f"{uuid} {server}")) is not None]
        if not known:  # another device of the same name
            names = set(uuids.values())
            known = [fact for key, fact in seen.items() if key.endswith(f" {server}") and fact.device in names]
        return max(known, key=lambda fact: (fact.source == "learned", fact.bytes or 0), default=None)

    def strays(self, server: str, uuids: Iterable[str]) -> dict[str, int]:
        """What each process of `server` takes of devices that it does not compute on, by UUID, as far as it was seen."""
        found = {uuid: self.facts.drivers.get(f"{uuid} {server}") for uuid in uuids}
        return {uuid: fact.stray for uuid, fact in found.items() if fact is not None and fact.stray}

    def projected(self, print_: str, server: str, projection: Projection) -> None:
        """llama-server said what it would take."""
        known = self.model(print_).projection
        if known is not None and 0 < len(known.devices) < len(projection.devices):
            return  # the driver's part, and what one device would take, are reckoned from what is said of one
        self._put(print_, attrs.evolve(self.model(print_), projection=projection))
        self._learn_driver(print_, server)

    def loaded(self, print_: str, server: str, load: Load) -> None:
        """The devices showed what it took."""
        facts = self.model(print_)
        self._put(print_, attrs.evolve(facts, load=load) if len(load.held) == 1 else attrs.evolve(facts, split=load))
        self._learn_driver(print_, server)
        for held in load.strays:
            known = self.facts.drivers.get(f"{held.uuid} {server}")
            self._put_driver(server, held, stray=max(held.bytes, (known and known.stray) or 0))

    def used(self, print_: str, end: Load) -> None:
        """The devices showed what it took at its end, or near it."""
        facts = self.model(print_)
        begun = facts.load if len(end.held) == 1 else facts.split
        if begun is None or len(begun.held) != len(end.held):
            return
        grown = end.bytes - begun.bytes
        if grown > (facts.grown if facts.grown is not None else -1):
            self._put(print_, attrs.evolve(facts, grown=grown))

    def idle(self, server: str, held: Held) -> None:
        """A llama-server took so much of a device before it allocated anything."""
        if 0 < held.bytes <= MAX_DRIVER_BYTES:
            self._put_driver(server, held, idle=held.bytes)

    def _put(self, print_: str, facts: ModelFacts) -> None:
        models = {**self.facts.models, print_: attrs.evolve(facts, at=_after(facts.at))}
        self.facts = attrs.evolve(self.facts, models=models)

    def _put_driver(self, server: str, held: Held, **sizes: int) -> None:
        key = f"{held.uuid} {server}"
        before = self.facts.drivers.get(key, DriverFacts(device=held.device))
        drivers = {**self.facts.drivers, key: attrs.evolve(before, device=held.device, at=_after(before.at), **sizes)}
        self.facts = attrs.evolve(self.facts, drivers=drivers)

    def _learn_driver(self, print_: str, server: str) -> None:
        """What was taken less what was said is the driver's own; of several devices nobody knows whose is what."""
        facts = self.model(print_)
        if facts.load is None or facts.projection is None or len(facts.projection.devices) > 1:
            return
        (held,) = facts.load.held
        own = held.bytes - sum(share.total for share in facts.projection.devices)
        if 0 < own <= MAX_DRIVER_BYTES and not facts.projection.draft:
            self._put_driver(server, held, **{"alone" if facts.load.alone else "beside": own})


def _merged(stored: Facts, ours: Facts) -> Facts:
    """Of each the newer, the newest so many."""
    return Facts(
        models=_newest(stored.models, ours.models, MAX_MODELS),
        drivers=_newest(stored.drivers, ours.drivers, MAX_DRIVERS),
    )


def _after(at: float) -> float:
    """Now, or when something was learned before that, by a clock that has been set back since."""
    return max(time.time(), at)


def _newest(stored: Mapping[str, _Fact], ours: Mapping[str, _Fact], most: int) -> dict[str, _Fact]:
    merged = {**stored, **{key: fact for key, fact in ours.items() if key not in stored or stored[key].at <= fact.at}}
    return dict(sorted(merged.items(), key=lambda item: item[1].at)[-most:])
