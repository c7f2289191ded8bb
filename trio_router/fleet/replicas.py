"""More llama-servers than one for a model: they serve its queue, and are models in memory like any other.

A replica has a supervisor, slots and a place of its own, and no queue. It is loaded when somebody waits for the model
though that is ready, into room that nobody else asks for (as what is to be preloaded is), and leaves when it is idle.
"""

from collections.abc import Iterable

import attrs

from trio_router.backend.lifecycle import State
from trio_router.fleet.model import Model
from trio_router.telemetry.events import Event, Events, ModelChanged, Reloaded, ServerChanged


def events_of(model: Model, events: Events) -> Events:
    """Where a replica's supervisor says what happened: the events of the router, under the replica's own name.

    That its state changed is news of the model that it serves, whose status shows it.
    """

    def pass_on(event: Event) -> None:
        match event:
            case ModelChanged() | ServerChanged() | Reloaded():
                events.emit(event)
            case _:
                events.emit(attrs.evolve(event, alias=model.alias))

    return Events(sinks=[pass_on])


def wish_for(models: Iterable[Model]) -> None:
    """Have replicas loaded for models whose slots do not suffice; to be called before a decision."""
    for model in models:
        for replica in model.replicas:
            _take_after(replica, model)
        if model.replicas and model.state is State.READY and model.retiring is None:
            waits = model.scheduler.waiting
            for replica in model.replicas:
                if waits <= 0:
                    break
                if replica.state is State.FAILED:
                    replica.supervisor.try_again()
                if replica.state is State.OFF and not replica.preload:
                    replica.preload = replica.wished = True
                if replica.state is not State.READY:
                    waits -= replica.scheduler.slots


def _take_after(replica: Model, model: Model) -> None:
    """What a replica that is not in memory needs is what its model does, and whether it is wished for is seen anew."""
    if replica.state is State.OFF:
        replica.footprint = model.footprint
        if replica.wished:
            replica.preload = replica.wished = False


def say_whether_they_grow(models: Iterable[Model]) -> None:
    """Have queues tell of those who wait where a replica could be loaded for them; to be called after a decision."""
    for model in models:
        if model.replicas:
            model.scheduler.grows = any(
                replica.state in {State.OFF, State.FAILED} and not replica.preload for replica in model.replicas
            )
