"""One model: its entry of router.toml, and everything that is true of it now.

Only the registry's task brings it into memory or has it leave; requests wait in its queue; its supervisor tells it,
as its gate, what there is for those who wait.
"""

import math
import time
from collections.abc import Awaitable, Callable, Mapping

import attrs
import trio

from trio_router.backend.backend import Backend
from trio_router.backend.lifecycle import State
from trio_router.backend.supervisor import Supervisor
from trio_router.config.policies import ModelPolicy
from trio_router.config.schema import ModelConfig
from trio_router.errors import RouterError
from trio_router.fleet.estimate import LoadPace
from trio_router.fleet.placement import ModelSnapshot
from trio_router.fleet.relief import Relief
from trio_router.fleet.scheduler import Scheduler
from trio_router.fleet.ticket import Priority
from trio_router.fleet.turns import Head
from trio_router.memory.devices import UNKNOWN, DeviceMonitor
from trio_router.memory.devices import Snapshot as Devices
from trio_router.memory.footprint import Footprint
from trio_router.memory.ledger import Ledger
from trio_router.memory.need import need_of
from trio_router.memory.room import RAM, Need, Room
from trio_router.telemetry.events import Events, UnloadReason
from trio_router.telemetry.facts import ModelFacts

_LABELS = tuple(priority.label for priority in Priority)


@attrs.define(eq=False, kw_only=True)
class Model:
    """One entry of router.toml and everything that is true of it now. The gate of its supervisor."""

    config: ModelConfig
    scheduler: Scheduler
    events: Events
    leader: "Model | None" = None
    """The one whose queue it serves, of which it is a replica; None for all that have a name of their own."""
    number: int = 1
    """Tells replicas apart."""
    replicas: list["Model"] = attrs.field(factory=list)
    supervisor: Supervisor = attrs.field(init=False)
    look: Callable[[], None] = attrs.field(default=lambda: None)
    """Called when a decision about it may be another than before."""
    loads: LoadPace = attrs.field(factory=LoadPace)
    """Of all models."""
    room_in: Callable[[Head | None], float | None] = attrs.field(default=lambda _: 0.0)
    """Seconds until there is room for it if somebody waits so, as far as that is known."""

    asked: int = 0
    """How many ask for it by name and wait until it is ready."""
    kept: bool = False
    """Asked for by name by somebody who did not wait: cleared once it was ready, or failed."""
    preload: bool = False
    wished: bool = False
    """Whether that is so because somebody waits for the model whose replica it is."""
    last_used: float = -math.inf
    """Trio time at which it was last ready or idle again."""
    keep_seconds: float | None = None
    """How long it may be idle, if the last request said so."""
    footprint: Footprint | None = None
    """What it is projected to need; None until its file was read, or when it cannot be."""
    footprint_problem: str | None = None
    """Why it cannot be."""
    devices: DeviceMonitor | None = None
    """Says what its llama-server holds, as far as the driver knows."""
    ledger: Ledger = attrs.field(factory=Ledger)
    """Knows what is reserved for it, and for the others."""
    relief: Relief = attrs.field(factory=Relief)
    """What is done for it when memory is too short."""
    weigh: Callable[["Model"], Awaitable[None]] | None = None
    """Finds out what it needs by its flags, when these are others."""
    last_used_at: float | None = None
    """The same as Unix time, for people."""
    created: int = attrs.field(factory=lambda: int(time.time()))
    """Unix time of its file, or of our start."""
    retiring: UnloadReason | None = None
    """Why it is on its way out."""
    pending: ModelConfig | None = None
    """Its new entry of router.toml, which it goes by once its llama-server is gone."""
    back: bool = False
    """Whether it is to be loaded again then."""
    cut: bool = False
    """Whether its running requests are being ended rather than waited for."""
    scope: trio.CancelScope | None = None
    """Ends its supervisor."""
    told_at: float | None = None
    """Trio time at which its llama-server was told to stop."""
    residency: int = 0
    """How often it was brought into memory."""
    was_ready: bool = False
    """Whether it was ready in this residency."""
    ready_at: float = -math.inf
    """Trio time at which it first was."""
    heir: str | None = None
    """The model it makes room for."""
    behind: Head | None = None
    """Those who got its place though some who waited for it were older."""
    refusals: int = 0
    refusal: RouterError | None = None
    """What those who waited were told last, and how often that happened."""
    _settled: trio.Event = attrs.field(factory=trio.Event)

    @property
    def alias(self) -> str:
        """Its name; that of a replica is no alias that anybody could ask for."""
        return self.config.alias if self.leader is None else f"{self.config.alias}#{self.number}"

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self.supervisor.state

    @property
    def footprint_bytes(self) -> int | None:
        """What it is projected to need on devices, without the margin that is reserved besides."""
        return None if self.footprint is None else self.footprint.projected_device_bytes

    def device_bytes(self) -> dict[int, int]:
        """What its llama-server holds by device, as the driver says: to be shown, never to decide by."""
        pid = self.supervisor.pid
        if pid is None or self.devices is None:
            return {}
        held = {device.index: device.processes.get(pid) for device in self.devices.snapshot.devices}
        return {index: size for index, size in held.items() if size is not None}

    @property
    def load_seconds(self) -> float | None:
        """What a load takes: as measured, else as its size lets expect; None: not known."""
        measured = self.supervisor.load_seconds
        return measured if measured is not None else self.loads.projected(self._size_bytes)

    @property
    def load_progress(self) -> int | None:
        """Percent of a load, by the time it took last; None when it is not being loaded, or that is not known."""
        if self.state is State.READY:
            return 100
        since, load = self.supervisor.loading_since, self.load_seconds
        if since is None or not load:
            return None
        return min(99, int(100 * (trio.current_time() - since) / load))

    @property
    def _size_bytes(self) -> int | None:
        return None if self.footprint is None else self.footprint.total_bytes

    def opens_in(self, head: Head | None = None) -> float | None:
        """Seconds until its slots can be leased, if somebody waits so; None: not known."""
        if self.scheduler.backend is not None:
            return 0.0
        load = self.load_seconds
        since = self.supervisor.loading_since
        if load is None:
            return None
        if since is not None and self.retiring is None:
            return max(0.0, since + load - trio.current_time())
        room = self.room_in(head)
        return None if room is None else room + load

    def idle_in(self) -> float | None:
        """Seconds until all that wait for it are done, and nobody holds a lease; None: not known."""
        scheduler = self.scheduler
        if scheduler.idle:
            return 0.0
        last = scheduler.expected_wait(scheduler.waiting + scheduler.slots - 1)
        return None if last is None else max(last, scheduler.drained_in() or 0.0)

    @property
    def seen(self) -> Devices:
        """What the GPUs showed last."""
        return UNKNOWN if self.devices is None else self.devices.snapshot

    @property
    def pinned(self) -> bool:
        """Whether it stays whoever else wants room; replicas do not."""
        return self.config.pinned and self.leader is None

    def need(self, room: Room | None = None) -> Need | None:
        """Memory that it takes; None: not known. What it counts as larger for does not make it too large for ever."""
        gpus = () if self.devices is None else self.devices.gpu_devices
        factor = self.relief.factor(self.footprint)
        need = need_of(self.config, self.footprint, gpus, factor)
        if factor > 1 and room is not None and room.never(need) is not None:
            return need_of(self.config, self.footprint, gpus, 1.0)
        return need

    def reserved(self) -> Mapping[int, int]:
        """Bytes reserved for it by device; none when it is not in memory, or what it needs was not known."""
        reservation = self.ledger.held.get(self.alias)
        return {} if reservation is None else reservation.spot.bytes

    def facts(self) -> ModelFacts:
        """What a gauge may show."""
        queue = self.scheduler.statistics()
        held = self.device_bytes()
        projected = (self.footprint_bytes or 0) if self.state.resident else 0
        return ModelFacts(
            alias=self.alias,
            state=self.state.value,
            slots_busy=queue.active,
            slots_idle=queue.free,
            waiting=queue.waiting,
            waiting_by_priority=dict(zip(_LABELS, queue.waiting_by_priority, strict=True)),
            device_bytes=held,
            reserved_bytes={"ram" if device == RAM else str(device): size for device, size in self.reserved().items()},
            vram_bytes=sum(held.values()) if held else projected,
        )

    @property
    def matters(self) -> bool:
        """Whether a decision can be about it."""
        wanted = self.scheduler.waiting or self.asked or self.kept or self.preload
        return self.state.resident or bool(wanted)

    def snapshot(self, room: Room) -> ModelSnapshot:
        """What a decision may know; `room` is all the memory there is."""
        return ModelSnapshot(
            alias=self.alias,
            state=self.state,
            retiring=self.retiring is not None,
            head=self.scheduler.head(),
            active=self.scheduler.active,
            asked=bool(self.asked or self.kept),
            preload=self.preload,
            heir=self.heir,
            behind=self.behind,
            serving=self.scheduler.backend is not None,
            yielding=self.scheduler.paused,
            was_ready=self.was_ready,
            ready_at=self.ready_at,
            load_seconds=self.load_seconds or 0.0,
            last_used=self.last_used,
            keep_seconds=self.keep_seconds,
            need=self.need(room) if self.state is State.OFF else None,
            frees=self.reserved(),
            pinned=self.pinned,
            crowded=self.relief.crowded,
            patient=self.relief.patient,
        )

    def renew(self) -> None:
        """Go by the new entry, if there is one; nothing of it is in memory. It is tried again if it had failed."""
        if self.pending is None:
            return
        self.config = self.supervisor.model = self.pending
        self.scheduler.slots = self.config.slots
        self.pending = self.footprint = self.footprint_problem = None
        self.supervisor.reset()
        self.kept = self.kept or self.back
        self.back = False

    def take(self, policy: ModelPolicy) -> None:
        """Go by another policy; its llama-server is not concerned."""
        if self.config.policy != policy:
            self.config = self.supervisor.model = attrs.evolve(self.config, policy=policy)
        if self.pending is not None:
            self.pending = attrs.evolve(self.pending, policy=policy)

    def used(self) -> None:
        """It did something just now."""
        self.last_used = trio.current_time()
        self.last_used_at = time.time()

    def tell_counts(self) -> None:
        """More or fewer wait, or hold a lease, here or at a replica."""
        self.scheduler.changed()

    def settle(self) -> None:
        """Wake who waits for its state to change."""
        self._settled.set()
        self._settled = trio.Event()

    async def until_settled(self) -> None:
        """Return after the next change of state that matters to a command."""
        await self._settled.wait()

    # --- the supervisor's gate --------------------------------------------------------------------

    def opened(self, backend: Backend) -> None:
        if (seconds := self.supervisor.load_seconds) is not None:
            self.loads.add(seconds, self._size_bytes)
        self.used()
        if not self.was_ready:
            self.was_ready, self.ready_at = True, self.last_used
        self.kept = self.preload = False
        self.ledger.ready(self.alias, trio.current_time())
        self.relief.ready()
        self.scheduler.open(backend)
        self.settle()
        self.look()

    def closed(self, backend: Backend) -> None:
        backend.aboard = self.scheduler.active
        self.ledger.reloading(self.alias, self.seen)
        if self.scheduler.backend is backend:
            self.scheduler.close()
            self.look()  # it yields no more, if it did: it can leave

    def refused(self, error: RouterError) -> None:
        self.scheduler.refuse(error)
        self.refuse_askers(error)
        self.look()

    async def out_of_memory(self) -> bool:
        changed = await self.relief.next(self.config, self.footprint)
        if changed is None:
            return False
        if changed is not self.config:
            self.config = self.supervisor.model = changed
            if self.weigh is not None:
                await self.weigh(self)
        self.relief.again = True
        return True

    def gone(self) -> bool:
        """Its llama-server is gone; whether only so that it is placed anew."""
        again, self.relief.again = self.relief.again and self.retiring is None and self.pending is None, False
        if not again and (own := self.relief.over()) is not None:
            self.config = self.supervisor.model = own
            self.footprint = None
        return again

    def refuse_askers(self, error: RouterError) -> None:
        """Tell those who asked for it by name `error`; the queue is not concerned."""
        self.kept = self.preload = False
        self.refusals += 1
        self.refusal = error
        self.settle()
