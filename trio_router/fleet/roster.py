"""Which models a registry has: those of router.toml, and what becomes of them when that is another."""

from typing import TYPE_CHECKING

from trio_router.backend.settings import SupervisorSettings
from trio_router.backend.supervisor import new_journal
from trio_router.config.schema import ModelConfig
from trio_router.errors import UnknownModel
from trio_router.fleet.model import Model
from trio_router.fleet.names import Names
from trio_router.fleet.planner import place_in
from trio_router.fleet.reload import Changes
from trio_router.fleet.replicas import events_of
from trio_router.fleet.scheduler import Scheduler
from trio_router.telemetry.events import Reloaded

if TYPE_CHECKING:
    from trio_router.fleet.registry import Registry


def enlist(registry: "Registry", entry: ModelConfig) -> Model:
    """A model as its entry says, with its replicas, off."""
    model = _one(registry, entry, None)
    _replicate(registry, model, entry)
    return model


def _replicate(registry: "Registry", model: Model, entry: ModelConfig) -> None:
    """Give a model the replicas that its entry says, in the place of those it had."""
    model.replicas = [_one(registry, entry, model) for _ in range(entry.replicas - 1)]
    model.scheduler.followers = [replica.scheduler for replica in model.replicas]


def _one(registry: "Registry", entry: ModelConfig, leader: Model | None) -> Model:
    """A model, or a replica of `leader`."""
    system = registry.config.system
    scheduler = Scheduler(
        alias=entry.alias,
        slots=entry.slots,
        max_waiting=system.max_queue_size_per_model,
        cache_affinity=system.cache_affinity,
    )
    model = Model(
        config=entry,
        scheduler=scheduler,
        events=registry.events,
        look=registry.look,
        devices=registry.devices,
        loads=registry.loads,
        ledger=registry.ledger,
    )
    model.room_in = lambda head: place_in(registry, model, head)
    scheduler.opens_in = model.opens_in
    model.supervisor = registry.supervising(
        model=entry,
        number=next(registry.numbers),
        launcher=registry.launcher,
        settings=SupervisorSettings.of(system),
        gate=model,
        events=registry.events,
    )
    if leader is not None:
        model.leader, model.number = leader, model.supervisor.number
        model.supervisor.events = events_of(model, registry.events)
        scheduler.leader = leader.scheduler
        scheduler.changed = leader.tell_counts
    scheduler.demand = registry.look
    scheduler.contended = registry.someone_waits
    scheduler.rest = lambda: registry.rested(model)
    return model


def reconfigure(registry: "Registry", changes: Changes) -> None:
    """Go by another configuration from now on.

    A model whose own entry changed leaves memory as by an eject, and comes back with the new entry if it was
    loaded; those who wait for it wait on. One that was taken out leaves too, and those who wait are told.
    """
    before, registry.config = registry.config, changes.config
    config = changes.config
    registry.names = Names.of(config.models.values())
    registry.bound_memory()
    for alias in changes.removed:
        model = registry.models[alias]
        model.refused(UnknownModel(f"model {alias!r} was taken out of the configuration", param="model"))
        model.supervisor.journal.close()
        _part_from(registry, model, *model.replicas)
    for alias in changes.changed:
        _part_from(registry, *registry.models[alias].replicas)
    returning = {model.alias: model for model in registry.leaving if model.alias in changes.added}
    registry.leaving = [model for model in registry.leaving if model.alias not in returning]
    for model in returning.values():
        model.supervisor.journal = new_journal()
    known = {**registry.models, **returning}
    registry.models = {alias: known.get(alias) or enlist(registry, entry) for alias, entry in config.models.items()}
    for alias, model in registry.models.items():
        _take_settings(registry, model)
        if alias in changes.changed or alias in returning:
            model.pending = config.models[alias]
            if model.state.resident:
                registry.renew(model)
            else:
                model.renew()
            _replicate(registry, model, config.models[alias])
        for replica in model.replicas:
            replica.supervisor.take(SupervisorSettings.of(config.system))
            replica.scheduler.cache_affinity = config.system.cache_affinity
        if alias in config.system.preload_models and alias not in before.system.preload_models:
            model.preload = model.scheduler.backend is None  # what is there has been loaded
    registry.events.emit(Reloaded(aliases=tuple(registry.models)))
    registry.look()


def _take_settings(registry: "Registry", model: Model) -> None:
    """What a model goes by from now on, whether it is loaded or not."""
    system = registry.config.system
    model.supervisor.take(SupervisorSettings.of(system))
    model.scheduler.max_waiting = system.max_queue_size_per_model
    model.take(registry.config.models[model.alias].policy)
    model.scheduler.cache_affinity = system.cache_affinity


def _part_from(registry: "Registry", *models: Model) -> None:
    """They are in the configuration no more: those in memory leave."""
    for model in models:
        if model.state.resident:
            registry.leaving.append(model)
            registry.renew(model)
