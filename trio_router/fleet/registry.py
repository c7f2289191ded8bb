"""All models, and the one task that starts and stops them.

Requests read the registry and wait in a model's queue; only `run` changes which models are in memory. It takes
commands from a mailbox, looks at everything at once (`placement.decide`), and does what that says: it looks
again at each command, when demand for a model without a backend appears or vanishes, when a model becomes ready,
when those who waited for one were refused, when a model becomes idle while another waits for room, when a model
has left memory, and when an idle timeout may have passed. A request to a ready model touches none of this.

*Resource handling.* Every model in memory is a task in `run`'s nursery (`fleet.residents`).

*Error handling.* A model that fails is a fact, kept with the model. An exception here is a bug and ends the tree.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence

import attrs
import structlog
import trio

from trio_router.backend.backend import Backend
from trio_router.backend.launch import Launcher
from trio_router.backend.lifecycle import State
from trio_router.backend.supervisor import Supervisor
from trio_router.config.schema import RouterConfig
from trio_router.errors import (
    DeadlineExceeded,
    DeadlineUnreachable,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from trio_router.fleet.estimate import LoadPace
from trio_router.fleet.explain import Plan
from trio_router.fleet.model import Model
from trio_router.fleet.names import Names
from trio_router.fleet.placement import Decision, Refuse, Retire, Snapshot, Start, decide
from trio_router.fleet.planner import decided, plan_for
from trio_router.fleet.refusal import no_room
from trio_router.fleet.reload import Changes
from trio_router.fleet.replicas import say_whether_they_grow, wish_for
from trio_router.fleet.residents import Residents
from trio_router.fleet.roster import enlist, reconfigure
from trio_router.fleet.scheduler import Lease
from trio_router.fleet.ticket import Priority, Ticket
from trio_router.fleet.turns import TurnRules
from trio_router.memory.devices import UNKNOWN, DeviceMonitor
from trio_router.memory.host import HostMemory, has_unseen_gpu
from trio_router.memory.ledger import MIB, Ledger
from trio_router.memory.room import Room, Shortage
from trio_router.telemetry.events import Events, RequestFinished, ServerChanged, UnloadReason
from trio_router.telemetry.facts import FleetFacts

log = structlog.get_logger("trio_router.fleet")

KEPT_DECISIONS = 1000

_STATES = tuple(state.value for state in State)


@attrs.frozen
class _Look:
    """Something happened: look at everything."""


@attrs.frozen(kw_only=True)
class _Eject:
    model: Model
    force: bool
    drain_seconds: float


@attrs.frozen(kw_only=True)
class _Renew:
    """The model's entry of router.toml is another, or gone."""

    model: Model


@attrs.define(eq=False, kw_only=True)
class Registry:
    """The models by alias."""

    config: RouterConfig
    models: Mapping[str, Model]
    events: Events
    launcher: Launcher
    devices: DeviceMonitor | None = None
    supervising: type[Supervisor] = Supervisor
    """A simulation has another kind."""
    ledger: Ledger = attrs.field(factory=Ledger)
    """What is reserved for models in memory."""
    host: HostMemory = attrs.field(factory=HostMemory)
    leaving: list[Model] = attrs.field(factory=list)
    """Taken out of router.toml, and still in memory."""
    loads: LoadPace = attrs.field(factory=LoadPace)
    phase: str = "starting"
    """starting, ready, draining: what users see of the router itself."""
    started_at: float = attrs.field(factory=time.time)
    _began: float = attrs.field(factory=time.monotonic)
    updated_at: float = attrs.field(factory=time.time)
    decisions: deque[Plan] = attrs.field(factory=lambda: deque(maxlen=KEPT_DECISIONS))
    """The last ones, oldest first."""
    names: Names = attrs.field(init=False)
    """Everything that a client may call a model."""
    numbers: "itertools.count[int]" = attrs.field(factory=itertools.count)
    """For models and replicas that are made."""
    someone_waits: bool = False
    """Whether a wanted model got no place: each that becomes idle is then worth a look."""
    _mail: trio.MemorySendChannel[_Look | _Eject | _Renew] = attrs.field(init=False)
    _inbox: trio.MemoryReceiveChannel[_Look | _Eject | _Renew] = attrs.field(init=False)
    _look_posted: bool = False

    def __attrs_post_init__(self) -> None:
        self.bound_memory()
        if self.devices is not None:
            self.devices.on_sample = self._sampled
        # without a bound: looks are coalesced to one, and each other letter has a client that waits for it
        self._mail, self._inbox = trio.open_memory_channel[_Look | _Eject | _Renew](math.inf)
        self.names = Names.of(self.config.models.values())

    @classmethod
    def of(
        cls,
        config: RouterConfig,
        launcher: Launcher,
        events: Events,
        devices: DeviceMonitor | None = None,
        supervising: type[Supervisor] = Supervisor,
    ) -> "Registry":
        """A registry of `config`'s models, all off."""
        registry = cls(
            config=config, models={}, events=events, launcher=launcher, devices=devices, supervising=supervising
        )
        registry.models = {alias: enlist(registry, entry) for alias, entry in config.models.items()}
        return registry

    @property
    def draining(self) -> bool:
        """Whether nothing new is let in."""
        return self.phase == "draining"

    def enter(self, phase: str) -> None:
        """The router itself is in another phase now."""
        self.phase, self.updated_at = phase, time.time()
        self.events.emit(ServerChanged(status=phase))

    def facts(self) -> FleetFacts:
        """What is true now, for gauges: a value that may be handed to a thread."""
        return FleetFacts(
            phase=self.phase,
            uptime_seconds=self.uptime_seconds,
            states=_STATES,
            models=tuple(model.facts() for model in self.models.values()),
        )

    @property
    def uptime_seconds(self) -> float:
        """Since the start, whatever was done to the clock on the wall."""
        return round(time.monotonic() - self._began, 3)

    # --- requests ---------------------------------------------------------------------------------

    def model(self, said: str) -> Model:
        """The model of that name, or that has it for another one. Raises UnknownModel."""
        found = self.models.get(said)
        return self.models[self.names[said].alias] if found is None else found

    def keep(self, alias: str, seconds: float | None) -> None:
        """What the last request for a model says of how long it is to stay idle; None: as long as any."""
        model = self.models.get(alias)
        if model is not None and model.keep_seconds != seconds:
            for each in (model, *model.replicas):
                each.keep_seconds = seconds
            self.look()

    def ticket(
        self, alias: str, priority: Priority, client: str = "", weight: float = 1.0, due: float = math.inf
    ) -> Ticket:
        """A place in the order for a request of `client` that arrives now and waits until `due`. Raises UnknownModel."""
        now = trio.current_time()
        return Ticket(
            alias=self.model(alias).alias,
            priority=priority,
            arrived_at=now,
            deadline=min(due, now + self.config.system.queue_timeout_sec),
            key=now + priority.steps * self.config.system.aging_sec,
            client=client,
            weight=weight,
            due=due,
        )

    async def lease(self, ticket: Ticket) -> Lease:
        """Wait for a slot of the ticket's model, which is loaded for it if need be. The caller releases the lease.

        Raises QueueFull, QueueTimeout, LoadTimeout, ModelFailed, ShuttingDown.
        """
        model = self.model(ticket.alias)
        self._admit(model)
        try:
            return await model.scheduler.acquire(ticket)
        except (QueueFull, QueueTimeout, DeadlineUnreachable, DeadlineExceeded) as error:
            error.details["decision"] = self.plan(ticket).as_json()
            raise

    def _admit(self, model: Model) -> None:
        if self.draining:
            raise ShuttingDown("the router is shutting down")
        if model.state is State.FAILED and not model.supervisor.try_again():
            raise model.supervisor.failure()

    def answered(self, backend: Backend, end: bytes) -> None:
        """A request was answered by `backend`; its answer ended so."""
        model = self.models.get(backend.alias) if backend.answered(end) else None
        if model is None:
            return
        if model.supervisor.backend is backend:
            model.supervisor.proved()
        else:
            for replica in model.replicas:
                if replica.supervisor.backend is backend:
                    replica.supervisor.proved()

    def learn(self, ended: Sequence[RequestFinished]) -> None:
        """A request sink: how long these held their slots."""
        now = trio.current_time()
        for event in ended:
            model = None if event.alias is None else self.models.get(event.alias)
            if model is not None and event.held_seconds is not None and event.priority is not None:
                model.scheduler.pace.add(event.held_seconds, Priority[event.priority.upper()].steps, now)

    # --- commands ---------------------------------------------------------------------------------

    async def load(self, alias: str) -> Model:
        """Wait until the model is ready. Raises UnknownModel, ModelFailed, ShuttingDown, LoadTimeout, BackendUnavailable.

        A caller that is cancelled asks no longer; the load goes on only if somebody else does.
        """
        model = self.model(alias)
        self._admit(model)
        model.asked += 1
        self.look()
        try:
            refusals = model.refusals
            while model.scheduler.backend is None:
                await model.until_settled()
                if model.refusals != refusals and model.refusal is not None:
                    raise model.refusal.again()
        finally:
            model.asked -= 1
            self.look()
        return model

    def load_soon(self, alias: str) -> Model:
        """Have the model loaded, without waiting. Raises UnknownModel, ModelFailed, ShuttingDown."""
        model = self.model(alias)
        self._admit(model)
        if model.state is not State.READY or model.retiring is not None:
            model.kept = True
            self.look()
        return model

    async def eject(self, alias: str, *, force: bool = False) -> bool:
        """Unload the model, after its running requests unless `force`; returns False if it was not loaded.

        Requests that wait for it go on waiting, and have it loaded again. Raises UnknownModel.
        """
        leaving = self.eject_soon(alias, force=force)
        for model, residency in leaving:
            while model.state.resident and model.residency == residency:
                await model.until_settled()
        return bool(leaving)

    def eject_soon(self, alias: str, *, force: bool = False) -> list[tuple[Model, int]]:
        """Have the model unloaded, without waiting; returns who leaves, each with the residency that ends.

        Raises UnknownModel.
        """
        leader = self.model(alias)
        drain = 0.0 if force else self.config.system.drain_timeout_sec
        leaving = []
        for model in (leader, *leader.replicas):
            if model.state.resident:
                self._mail.send_nowait(_Eject(model=model, force=force, drain_seconds=drain))
                leaving.append((model, model.residency))
            else:
                model.kept = model.preload = False
        return leaving

    def meant(self, said: str) -> str:
        """The name that counts where a client says `said`: that of the default model for one that is nobody's."""
        default = self.config.system.default_model
        return said if default is None or said in self.names else default

    def reset(self, alias: str) -> tuple[bool, str | None]:
        """Let a failed model be tried again: whether there was anything to reset, and what the error was."""
        model = self.model(alias)
        if model.state is not State.FAILED:
            return False, None
        previous = model.supervisor.reset()
        self.look()
        return True, previous

    def apply(self, changes: Changes) -> None:
        """Go by another configuration from now on."""
        reconfigure(self, changes)

    def renew(self, model: Model) -> None:
        """Have a model leave memory, and come back if its entry in the configuration is another one."""
        self._mail.send_nowait(_Renew(model=model))

    def bound_memory(self) -> None:
        """Go by what the configuration says of memory."""
        system = self.config.system
        self.ledger.reserve_bytes = system.vram_reserve_mb * MIB
        self.ledger.ram_bytes = None if system.ram_budget_mb is None else system.ram_budget_mb * MIB

    # --- the task ---------------------------------------------------------------------------------

    def look(self) -> None:
        """Have `run` look at everything soon."""
        if not self._look_posted:
            self._look_posted = True
            self._mail.send_nowait(_Look())

    def rested(self, model: Model) -> None:
        """Nothing runs on it, and nobody waits for it."""
        model.used()
        unusual = model.retiring is not None or model.scheduler.backend is None or model.keep_seconds is not None
        if self.someone_waits or unusual:
            self.look()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start and stop models until cancelled."""
        for alias in self.config.system.preload_models:
            for model in (self.models[alias], *self.models[alias].replicas):
                model.preload = True
        async with trio.open_nursery() as nursery:
            task_status.started()
            self.look()
            residents = Residents(nursery=nursery, ledger=self.ledger, events=self.events, left=self._left)
            again = math.inf
            while True:
                mail: _Look | _Eject | _Renew = _Look()
                with trio.move_on_at(again):
                    mail = await self._inbox.receive()
                match mail:
                    case _Eject():
                        residents.retire(
                            mail.model, UnloadReason.EJECTED, cut=mail.force, drain_seconds=mail.drain_seconds
                        )
                    case _Renew(model=model):
                        # one that is on its way out already leaves as it would have, and does not come back by itself
                        comes_back = model.state.resident and model.retiring is None and model not in self.leaving
                        model.back = model.back or comes_back
                        drain_seconds = self.config.system.drain_timeout_sec
                        residents.retire(model, UnloadReason.RELOADED, drain_seconds=drain_seconds)
                    case _Look():
                        self._look_posted = False
                again = self._do(residents, self._decide())

    def _sampled(self) -> None:
        """The GPUs were looked at."""
        if self.someone_waits:
            self.look()

    def room(self) -> Room:
        """What may be reserved now: the one answer to whether something fits."""
        devices = UNKNOWN if self.devices is None else self.devices.snapshot
        now = trio.current_time()
        # a model on a GPU that we do not see is projected to be on the host
        blind = self.config.system.gpu_devices and not devices.devices and has_unseen_gpu()
        return self.ledger.room(
            devices,
            None if blind else self.host.available(now),
            now,
            pinned=[model.alias for model in self.everyone() if model.pinned],
        )

    def _decide(self) -> Decision:
        wish_for(self.models.values())
        return decide(self.snapshot())

    def snapshot(self, also: Model | None = None) -> Snapshot:
        """What a decision may know; `also` of a model that nobody wants."""
        system = self.config.system
        models = [model for model in self.everyone() if model.matters or model is also] if not self.draining else []
        room = self.room()
        return Snapshot(
            now=trio.current_time(),
            models=[model.snapshot(room) for model in models],
            max_resident=system.max_concurrent_models,
            idle_timeout=system.idle_timeout_sec if system.enable_idle_timeout else None,
            turns=TurnRules(min_turn=system.min_turn_sec, max_swap_wait=system.max_swap_wait_sec),
            room=room,
        )

    def projected_bytes(self) -> int:
        """What models in memory are projected to hold on devices."""
        return sum(model.footprint_bytes or 0 for model in self.everyone() if model.state.resident)

    def plan(self, ticket: Ticket) -> Plan:
        """What would happen to a request with this ticket."""
        return plan_for(self, ticket)

    def everyone(self) -> list[Model]:
        """Every model that may hold memory, replicas too; no two have the same alias."""
        replicas = [replica for model in self.models.values() for replica in model.replicas]
        return [*self.models.values(), *replicas, *self.leaving]

    def _do(self, residents: Residents, decision: Decision) -> float:
        models = {model.alias: model for model in self.everyone()}
        if decision.actions or decision.yielding:
            self.decisions.extend(decided(self, decision))
        for action in decision.actions:
            match action:
                case Start(spot=spot):
                    models[action.alias].relief.patient = False
                    residents.start(models[action.alias], spot)
                case Refuse(shortage=shortage):
                    self._refuse(models[action.alias], shortage)
                case Retire():
                    log.info("unloading", model=action.alias, reason=action.reason.value)
                    model = models[action.alias]
                    model.heir, model.behind = action.heir, action.behind
                    if action.heir is not None:
                        models[action.heir].relief.somebody_leaves()
                    residents.retire(model, action.reason)
        self._have_yield(decision)
        return decision.look_again_at

    def _refuse(self, model: Model, shortage: Shortage | None) -> None:
        """Tell those who wait; a replica that cannot be is no harm to them."""
        if model.leader is None:
            error = no_room(model, shortage, self.everyone(), self.config.system)
            log.warning("no room", model=model.alias, error=error.message)
            model.refused(error)

    def _have_yield(self, decision: Decision) -> None:
        """Models that give no new lease, and who is told that somebody waits."""
        for model in self.everyone():
            if model.alias in decision.yielding:
                model.heir = decision.yielding[model.alias]
                model.scheduler.pause()
            elif model.scheduler.paused:
                model.scheduler.resume()
                self.look()  # those who got a lease wait no more
        if self.someone_waits != decision.someone_waits:
            self.someone_waits = decision.someone_waits
            for model in self.everyone():
                model.scheduler.contended = decision.someone_waits
        say_whether_they_grow(self.models.values())
        if self.devices is not None:
            self.devices.look_closely(decision.memory_waits)

    def _left(self, model: Model) -> None:
        """Its llama-server is gone."""
        if model in self.leaving:
            self.leaving.remove(model)
        self.look()

    # --- the end ----------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Refuse what waits and what comes, and wait up to `seconds` for what runs."""
        self.enter("draining")
        for model in self.everyone():
            model.refused(ShuttingDown("the router is shutting down"))
        with trio.move_on_after(seconds) as bound:
            for model in self.everyone():
                await model.scheduler.until_no_lease()
        if bound.cancelled_caught:
            log.warning("requests are cut", running=sum(model.scheduler.active for model in self.everyone()))
