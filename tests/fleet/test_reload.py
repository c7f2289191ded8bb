"""Another configuration: what it changes, and what it does to models that run."""

from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from tests.fleet.fake_servers import FakeServers
from tests.fleet.fleet import Fleet, running
from trio_router.backend.lifecycle import State
from trio_router.config.schema import ApiConfig, KeyConfig, ModelConfig, RouterConfig, SystemConfig
from trio_router.errors import UnknownModel
from trio_router.fleet.reload import compare


def entry(alias: str, *flags: str, slots: int = 1) -> ModelConfig:
    return ModelConfig(alias=alias, model_path=alias, file=Path("/models") / alias, flags=flags, slots=slots)


def with_models(config: RouterConfig, *models: ModelConfig) -> RouterConfig:
    return attrs.evolve(config, models={model.alias: model for model in models})


def with_system(config: RouterConfig, **values) -> RouterConfig:
    return attrs.evolve(config, system=attrs.evolve(config.system, **values))


def reload(fleet: Fleet, config: RouterConfig) -> None:
    fleet.registry.apply(compare(fleet.registry.config, config))


# --- what is different ------------------------------------------------------------------------------

OLD = RouterConfig(
    path=Path("router.toml"),
    api=ApiConfig(),
    system=SystemConfig(base_models_path=Path("/models")),
    models={alias: entry(alias) for alias in "abc"},
)


def test_nothing():
    changes = compare(OLD, OLD)
    assert (changes.keys, changes.added, changes.removed, changes.changed) == ((), (), (), ())
    assert changes.unchanged == ("a", "b", "c")
    assert changes.config == OLD


def test_models():
    changes = compare(OLD, with_models(OLD, entry("d"), entry("a", "-c", "9"), entry("b")))
    assert (changes.added, changes.removed, changes.changed, changes.unchanged) == (("d",), ("c",), ("a",), ("b",))
    assert changes.keys == ("models.a.flags",)


def test_slots_that_follow_from_another_key_change_a_model_too():
    new = with_system(with_models(OLD, entry("a", slots=2), entry("b"), entry("c")), default_parallel=2)
    changes = compare(OLD, new)
    assert (changes.changed, changes.keys) == (("a",), ("system.default_parallel",))


def test_what_is_read_once_stays_until_the_next_start():
    new = attrs.evolve(with_system(OLD, gpu_devices=(1,), idle_timeout_sec=5), api=ApiConfig(port=1, max_body_mb=1))
    changes = compare(OLD, new)
    assert changes.keys == ("api.port", "api.max_body_mb", "system.idle_timeout_sec", "system.gpu_devices")
    assert changes.after_restart == ("api.port", "system.gpu_devices")
    assert (changes.config.api.port, changes.config.api.max_body_mb) == (8000, 1)
    assert (changes.config.system.gpu_devices, changes.config.system.idle_timeout_sec) == ((0,), 5)
    assert compare(changes.config, new).after_restart == changes.after_restart, "it is told again"


def test_keys_are_told_by_one_word():
    new = attrs.evolve(OLD, keys=(KeyConfig(name="a", key="secret"),))
    assert compare(OLD, new).keys == ("keys",)
    assert compare(OLD, attrs.evolve(OLD, api=ApiConfig(key="secret"))).keys == ("keys",)


# --- what becomes of models -------------------------------------------------------------------------


async def test_only_a_changed_model_is_restarted(autojump_clock):
    servers = FakeServers()
    async with running(servers, {"a": 1, "b": 1}) as fleet:
        fleet.soon("a", 10, name="first")
        fleet.soon("b", 100, name="other")
        await trio.sleep(2)
        reload(fleet, with_models(fleet.registry.config, entry("a", "-c", "9", slots=2), entry("b")))
        fleet.soon("a", name="second")
        fleet.soon("a", name="third")
        await trio.sleep(3)
        assert fleet.states == "stopping ready"
        assert fleet["a"].config.slots == 1, "what runs, runs as it was started"
        await trio.sleep(10)
        assert fleet.states == "ready ready"
        assert sorted(fleet.of("runs")[2:]) == ["12 second runs", "12 third runs"]
        assert (fleet["a"].config.flags, len(fleet["a"].supervisor.backend.slots)) == (("-c", "9"), 2)
        assert servers.launches == {"a": 2, "b": 1}
        assert "11 a left: reloaded" in fleet.record


async def test_it_comes_back_though_nobody_waits(autojump_clock):
    servers = FakeServers()
    async with running(servers, {"a": 1, "b": 1}) as fleet:
        await fleet.load("a")
        reload(fleet, with_models(fleet.registry.config, entry("a", "x"), entry("b", "x")))
        await trio.sleep(5)
        assert fleet.states == "ready off"
        assert fleet["b"].config.flags == ("x",)
        assert servers.launches == {"a": 2}


@pytest.mark.parametrize("moment", [0.5, 1.5, 3.0])
async def test_two_reloads_in_a_row(autojump_clock, moment):
    servers = FakeServers()
    servers.plan("a").stop_seconds = 2
    async with running(servers, {"a": 1}) as fleet:
        fleet.soon("a", 5)
        await trio.sleep(moment)
        reload(fleet, with_models(fleet.registry.config, entry("a", "x", slots=3)))
        await trio.sleep(0.1)
        reload(fleet, with_models(fleet.registry.config, entry("a", "y", slots=2)))
        await trio.sleep(30)
        assert fleet.states == "ready"
        assert (fleet["a"].config.flags, len(fleet["a"].supervisor.backend.slots)) == (("y",), 2)


async def test_a_model_that_is_taken_out(autojump_clock):
    servers = FakeServers()
    async with running(servers, {"a": 1, "b": 1}, max_concurrent_models=1) as fleet:
        gone = fleet["a"]
        fleet.soon("a", 5, name="running")
        await trio.sleep(2)
        fleet.soon("a", name="waiting")
        fleet.soon("b", name="other")
        await trio.lowlevel.checkpoint()
        reload(fleet, with_models(fleet.registry.config, entry("b")))
        with pytest.raises(UnknownModel):
            fleet.registry.model("a")
        await trio.sleep(2)
        assert "2 waiting model_not_found" in fleet.record
        assert gone.state is State.STOPPING
        assert servers.most_alive == 1, "what leaves still holds its place"
        await trio.sleep(10)
        assert gone.state is State.OFF
        assert fleet.registry.leaving == []
        assert fleet.of("runs")[-1] == "7 other runs"


async def test_taken_out_and_put_back_before_it_was_gone(autojump_clock):
    servers = FakeServers()
    async with running(servers, {"a": 1, "b": 1}) as fleet:
        fleet.soon("a", 5)
        await trio.sleep(2)
        reload(fleet, with_models(fleet.registry.config, entry("b")))
        await trio.sleep(1)
        reload(fleet, with_models(fleet.registry.config, entry("a", "x"), entry("b")))
        fleet.soon("a", name="new")
        await trio.sleep(10)
        assert fleet.of("runs")[-1] == "7 new runs"
        assert fleet["a"].config.flags == ("x",)
        assert fleet.registry.leaving == []


async def test_a_new_model_and_a_new_preload(autojump_clock):
    servers = FakeServers()
    async with running(servers, {"a": 1}) as fleet:
        config = with_system(fleet.registry.config, preload_models=("c",), max_queue_size_per_model=7)
        reload(fleet, with_models(config, entry("a"), entry("c")))
        fleet.soon("c", name="new")
        await trio.sleep(5)
        assert fleet.states == "off ready"
        assert [model.scheduler.max_waiting for model in fleet.registry.models.values()] == [7, 7]
        assert fleet["a"].supervisor.number != fleet["c"].supervisor.number


async def test_a_failed_model_is_tried_with_its_new_settings(autojump_clock):
    servers = FakeServers()
    async with running(servers, {"a": 1}, max_load_attempts=1) as fleet:
        servers.plan("a").refused = "no such file"
        await fleet.ask("a")
        assert fleet.states == "failed"
        servers.plan("a").refused = None
        reload(fleet, with_models(fleet.registry.config, entry("a", "x")))
        assert fleet.states == "off"
        await fleet.ask("a")
        assert fleet.states == "ready"


async def test_during_a_backoff(autojump_clock):
    servers = FakeServers()
    async with running(servers, {"a": 1}, max_load_attempts=50) as fleet:
        servers.plan("a").refused = "no such file"
        fleet.soon("a", name="patient")
        await trio.sleep(40)
        servers.plan("a").refused = None
        reload(fleet, with_models(fleet.registry.config, entry("a", "x")))
        await trio.sleep(2)
        assert fleet.of("patient") == ["41 patient runs"]


async def test_while_it_drains_nothing_comes_back(autojump_clock):
    async with running(FakeServers(), {"a": 1}) as fleet:
        fleet.soon("a", 5)
        await trio.sleep(2)
        reload(fleet, with_models(fleet.registry.config, entry("a", "x")))
        await fleet.registry.drain(30)
        assert trio.current_time() == 6
        await trio.sleep(10)
        assert fleet.states == "off"


async def test_a_loaded_model_that_comes_to_be_preloaded_is_not_pinned_by_that(autojump_clock: MockClock) -> None:
    async with running(FakeServers(), {"a": 1, "b": 1}, max_concurrent_models=1, idle_timeout_sec=30) as fleet:
        await fleet.ask("a", 1)
        config = fleet.registry.config
        fleet.registry.apply(
            compare(config, attrs.evolve(config, system=attrs.evolve(config.system, preload_models=("a",))))
        )
        await fleet.ask("b", 1)
        assert fleet.states == "off ready"
        await trio.sleep(100)
        assert fleet.states == "off off"
