"""Whatever comes: each is served once, no more models are in memory than may be, and nobody waits beyond the bound."""

from random import Random

import pytest

from tests.simulation.test_simulate import config_of, request
from trio_router.config.schema import RouterConfig
from trio_router.simulation.run import Outcome, simulate
from trio_router.simulation.supervisor import LoadTimes
from trio_router.telemetry.trace import TracedRequest

AGING, SWAP_WAIT, LOAD, STOP, LONGEST = 5.0, 10.0, 2.0, 0.25, 3.0
MODELS = {"busy": 4, "b": 1, "c": 2, "d": 1}
BOUND = 2 * AGING + len(MODELS) * (SWAP_WAIT + LONGEST + STOP + LOAD)
"""Until its key is older than that of any high: two agings. Then a turn of each, what runs at its end, a stop, a load."""


def traffic(seed: int) -> list[TracedRequest]:
    """One model that is never idle, and others that are asked for now and then; all priorities for all."""
    random = Random(seed)
    priorities = ("high", "normal", "normal", "low")
    busy = [request(at, "busy", random.uniform(1.2, 1.9), random.choice(priorities)) for at in range(600)]
    others = [
        request(random.uniform(0, 600), random.choice("bcd"), random.uniform(0, LONGEST), random.choice(priorities))
        for _ in range(40)
    ]
    return busy + others


def config(places: int, **system) -> RouterConfig:
    return config_of(
        MODELS, max_concurrent_models=places, aging_sec=AGING, queue_timeout_sec=1e6, max_queue_size_per_model=10_000,
        **system,
    )  # fmt: skip


def played(seed: int, places: int, **system) -> Outcome:
    return simulate(config(places, **system), traffic(seed), LoadTimes(usual=LOAD, stop=STOP))


def longest_wait(outcome: Outcome) -> float:
    return max(max(waits) for waits in outcome.waits.values())


@pytest.mark.parametrize("places", [1, 2])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("min_turn", [None, 3.0, 100.0])
def test_waits_are_bounded(seed: int, places: int, min_turn: float | None) -> None:
    outcome = played(seed, places, min_turn_sec=min_turn, max_swap_wait_sec=SWAP_WAIT)
    assert outcome.errors == {}
    assert sum(map(len, outcome.waits.values())) == len(traffic(seed))
    assert longest_wait(outcome) < BOUND
    changes = sorted([(stay.began, 1) for stay in outcome.stays] + [(stay.ended, -1) for stay in outcome.stays])
    resident = 0
    for _, change in changes:
        resident += change
        assert resident <= places


def test_it_is_the_bound_that_does_it() -> None:
    assert longest_wait(played(1, 1, min_turn_sec=1e6, max_swap_wait_sec=1e6)) > BOUND
