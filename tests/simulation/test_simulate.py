"""Played in virtual time: sums that can be done by hand, and what the command prints."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from tests.harness.toml import router_toml
from trio_router.cli import main
from trio_router.config.schema import ApiConfig, ModelConfig, RouterConfig, SystemConfig
from trio_router.simulation.plot import svg
from trio_router.simulation.report import as_numbers, queue_over_time
from trio_router.simulation.run import Outcome, load_times, simulate
from trio_router.simulation.supervisor import LoadTimes
from trio_router.telemetry.trace import TracedLoad, TracedRequest


def config_of(models: dict[str, int], **system) -> RouterConfig:
    return RouterConfig(
        path=Path("router.toml"),
        api=ApiConfig(),
        system=SystemConfig(base_models_path=Path("/models"), **system),
        models={
            alias: ModelConfig(alias=alias, model_path=alias, file=Path("/models") / alias, slots=slots)
            for alias, slots in models.items()
        },
    )


def request(at: float, model: str = "a", seconds: float | None = 1.0, priority: str = "normal") -> TracedRequest:
    return TracedRequest(
        at=1000.0 + at, model=model, priority=priority, client="c", service_seconds=seconds, waited_seconds=None
    )


def test_a_queue_and_a_load() -> None:
    outcome = simulate(config_of({"a": 1}), [request(2), request(0), request(1)], LoadTimes({"a": 4.0}))
    assert outcome.waits["normal"] == [4, 4, 4]
    numbers = as_numbers(outcome)
    assert (numbers["seconds"], numbers["loads"]) == (7, 1)
    assert numbers["models"]["a"] == {"loads": 1, "in_memory": 1, "slots_busy": 3 / 7}
    assert numbers["waits"]["high"] == {
        "requests": 0,
        "p50_sec": None,
        "p95_sec": None,
        "p99_sec": None,
        "max_sec": None,
    }
    assert queue_over_time(outcome, 7) == [1, 2, 3, 3, 2, 1, 0]


def test_room_for_one_more() -> None:
    """What a trace is for: the same requests, another configuration."""
    requests = [request(at, "ab"[at % 2], 0.5) for at in range(40)]
    times = LoadTimes({"a": 2.0, "b": 2.0})
    one, two = (simulate(config_of({"a": 1, "b": 1}, max_concurrent_models=most), requests, times) for most in (1, 2))
    assert two.loads == {"a": 1, "b": 1}
    assert one.loads.total() > 6
    assert sum(one.waits["normal"]) > 5 * sum(two.waits["normal"])
    stays = sorted((stay.began, stay.ended) for stay in one.stays)
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(stays))


def test_high_goes_first_and_what_is_refused_is_counted() -> None:
    requests = [
        request(0, seconds=10),
        request(1, priority="low"),
        request(2, priority="high"),
        request(3, seconds=None),
    ]
    outcome = simulate(config_of({"a": 1}, max_queue_size_per_model=2), requests, LoadTimes({"a": 0.5}))
    assert outcome.waits == {"high": [8.5], "normal": [0.5], "low": [10.5]}
    assert outcome.errors == {"queue_full": 1}


def test_one_that_got_no_slot_takes_what_others_do() -> None:
    requests = [request(0, seconds=2), request(0.1, seconds=None), request(0.2, seconds=4)]
    outcome = simulate(config_of({"a": 1}), requests, LoadTimes({"a": 1.0}))
    assert outcome.busy_seconds == {"a": 9}


def test_load_times_are_means() -> None:
    loads = [
        TracedLoad(at=0, model=model, seconds=seconds) for model, seconds in [("a", 1), ("a", 9), ("a", 2), ("b", 4)]
    ]
    times = load_times(loads)
    assert (times.of("a"), times.of("b"), times.of("z"), times.stop) == (4, 4, 4, 0)
    stops = [TracedLoad(at=0, model="a", seconds=seconds, kind="unload") for seconds in (1, 2)]
    assert load_times(stops) == LoadTimes(stop=1.5)


def test_a_stop_takes_its_time() -> None:
    requests = [request(0, "a"), request(1, "b")]
    config = config_of({"a": 1, "b": 1}, max_concurrent_models=1, min_turn_sec=0)
    assert simulate(config, requests, LoadTimes(usual=2.0, stop=3.0)).waits["normal"] == [2, 3 + 3 + 2 - 1]


def test_many_requests_and_models() -> None:
    """The same as ever with a thousand models: none lost, none without its place."""
    random = Random(5)
    models = {f"m{number}": 1 + number % 3 for number in range(1000)}
    requests = [
        request(random.uniform(0, 2000), f"m{int(random.paretovariate(0.7)) % 1000}", random.uniform(0.1, 3))
        for _ in range(2000)
    ]
    outcome = simulate(
        config_of(models, max_concurrent_models=20, queue_timeout_sec=600), requests, LoadTimes(usual=5.0)
    )
    assert sum(len(each) for each in outcome.waits.values()) + outcome.errors.total() == 2000
    changes = sorted([(stay.began, 1) for stay in outcome.stays] + [(stay.ended, -1) for stay in outcome.stays])
    resident = most = 0
    for _, change in changes:
        resident += change
        most = max(most, resident)
    assert most <= 20


def test_the_picture() -> None:
    outcome = simulate(config_of({"a<b": 1}), [request(0, "a<b")], LoadTimes())
    picture = svg(outcome)
    assert picture.startswith("<svg")
    assert "a&lt;b" in picture
    assert svg(Outcome()).endswith("</svg>\n")


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    config = tmp_path / "router.toml"
    config.write_text(router_toml(models={"a": {"model_path": "a.gguf"}}))
    trace = tmp_path / "trace.jsonl"
    lines = [request(0).as_json(), request(1, "gone").as_json(), TracedLoad(at=0, model="a", seconds=3).as_json()]
    trace.write_text("\n".join(map(json.dumps, lines)))
    return config, trace


def test_the_command(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, trace = files
    plot = tmp_path / "out.svg"
    assert main(["simulate", str(trace), "--config", str(config), "--plot", str(plot)], {}) == 0
    said = capsys.readouterr()
    assert said.out.startswith("1 requests in 4 s, 1 loads\n")
    assert "all                              1    3.00 s    3.00 s    3.00 s    3.00 s" in said.out
    assert "left out: gone" in said.err
    assert plot.read_text().startswith("<svg")
    assert main(["simulate", str(trace), "--config", str(config), "--json"], {}) == 0
    assert json.loads(capsys.readouterr().out)["waits"]["all"]["p50_sec"] == 3


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "Expecting property name"),
        ("3", "not an object"),
        ("{}", "'kind' is missing"),
        ('{"kind":"request","priority":"top"}', "priority 'top'"),
        ('{"kind":"load","at":1,"model":"a"}', "'seconds' is missing"),
    ],
)
def test_a_trace_that_is_none(
    files: tuple[Path, Path], line: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, trace = files
    trace.write_text(line)
    assert main(["simulate", str(trace), "--config", str(config)], {}) == 1
    assert f"{trace}:1: " in (said := capsys.readouterr().err)
    assert why in said
