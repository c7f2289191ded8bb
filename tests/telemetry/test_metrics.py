import threading
import time
from typing import Any

import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.telemetry.facts import GIB, Gpu, Gpus, fleet, model
from tests.telemetry.samples import families, samples
from trio_router.telemetry.events import (
    BackendExited,
    BackendRestarted,
    Event,
    ExitKind,
    LoadFinished,
    LoadResult,
    ModelChanged,
    Outcome,
    Reloaded,
    RequestFinished,
    ServerChanged,
    Unloaded,
    UnloadReason,
)
from trio_router.telemetry.metrics import Metrics

CHAT = "/v1/chat/completions"
FAMILIES = {
    "router_requests_total": "counter",
    "router_request_duration_seconds": "histogram",
    "router_time_to_first_token_seconds": "histogram",
    "router_time_per_output_token_seconds": "histogram",
    "router_queue_wait_seconds": "histogram",
    "router_queue_depth": "gauge",
    "router_queued_requests": "gauge",
    "router_active_requests": "gauge",
    "router_tokens_total": "counter",
    "router_model_loads_total": "counter",
    "router_model_load_seconds": "histogram",
    "router_model_unloads_total": "counter",
    "router_backend_exits_total": "counter",
    "router_backend_restarts_total": "counter",
    "router_slots": "gauge",
    "router_model_state": "gauge",
    "router_model_vram_bytes": "gauge",
    "router_model_device_memory_bytes": "gauge",
    "router_model_reserved_bytes": "gauge",
    "router_device_memory_bytes": "gauge",
    "router_device_utilization_ratio": "gauge",
    "router_device_temperature_celsius": "gauge",
    "router_device_power_watts": "gauge",
    "router_ready": "gauge",
    "router_build_info": "gauge",
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(["qwen", "with/slash"], {CHAT, "/v1/embeddings"}, version="1.2.3")


async def text_of(metrics: Metrics, told=None, gpus=None, accept: str | None = None) -> str:
    body, _ = await metrics.render(accept, told or fleet(model()), gpus or Gpus())
    return body.decode()


async def values(metrics: Metrics, **given: Any) -> dict[tuple[str, ...], float]:
    return samples(await text_of(metrics, **given))


def finished(**facts: Any) -> RequestFinished:
    given = {
        "request_id": "req_1",
        "finished_at": 0.0,
        "alias": "qwen",
        "endpoint": CHAT,
        "priority": "normal",
        "outcome": Outcome.OK,
        "status": 200,
        "code": None,
    }
    return RequestFinished(**{**given, "duration_seconds": 2.0, **facts})


async def test_the_families_are_these(metrics: Metrics) -> None:
    found = families(await text_of(metrics))
    assert {name: kind for name, kind in found.items() if name.startswith("router_")} == FAMILIES
    assert {"process_cpu_seconds_total", "python_info", "python_gc_collections_total"} <= found.keys()


EVENTS: list[tuple[Event | RequestFinished, dict[tuple[str, ...], float]]] = [
    (
        finished(
            queue_seconds=0.5,
            first_byte_seconds=0.7,
            first_token_seconds=0.7,
            seconds_per_output_token=0.02,
            input_tokens=31,
            output_tokens=6,
            cached_tokens=30,
        ),
        {
            ("router_requests_total", f"endpoint={CHAT}", "model=qwen", "outcome=ok", "status=success"): 1,
            ("router_request_duration_seconds_count", "model=qwen"): 1,
            ("router_request_duration_seconds_sum", "model=qwen"): 2.0,
            ("router_request_duration_seconds_bucket", "le=2.5", "model=qwen"): 1,
            ("router_time_to_first_token_seconds_sum", "model=qwen"): 0.7,
            ("router_time_per_output_token_seconds_sum", "model=qwen"): 0.02,
            ("router_tokens_total", "kind=input", "model=qwen"): 31,
            ("router_tokens_total", "kind=output", "model=qwen"): 6,
            ("router_tokens_total", "kind=cached", "model=qwen"): 30,
        },
    ),
    (
        finished(outcome=Outcome.REJECTED, status=503, code="queue_full"),
        {("router_requests_total", f"endpoint={CHAT}", "model=qwen", "outcome=rejected", "status=error"): 1},
    ),
    (
        finished(alias=None, outcome=Outcome.CLIENT_ERROR, status=404),
        {("router_requests_total", f"endpoint={CHAT}", "model=unknown", "outcome=client_error", "status=error"): 1},
    ),
    (
        finished(priority="high", waited_seconds=3.0, outcome=Outcome.CANCELLED),
        {
            ("router_requests_total", f"endpoint={CHAT}", "model=qwen", "outcome=cancelled", "status=error"): 1,
            ("router_queue_wait_seconds_count", "model=qwen", "priority=high"): 1,
            ("router_queue_wait_seconds_sum", "model=qwen", "priority=high"): 3.0,
        },
    ),
    (
        LoadFinished(alias="with/slash", result=LoadResult.OK, seconds=4.0),
        {
            ("router_model_loads_total", "model=with/slash", "result=ok"): 1,
            ("router_model_load_seconds_sum", "model=with/slash"): 4.0,
        },
    ),
    (
        LoadFinished(alias="qwen", result=LoadResult.TIMEOUT, seconds=300.0),
        {("router_model_loads_total", "model=qwen", "result=timeout"): 1},
    ),
    (
        Unloaded(alias="qwen", reason=UnloadReason.EVICTED),
        {("router_model_unloads_total", "model=qwen", "reason=evicted"): 1},
    ),
    (
        BackendExited(alias="qwen", incarnation=1, kind=ExitKind.KILLED, code=-9),
        {("router_backend_exits_total", "kind=killed", "model=qwen"): 1},
    ),
    (BackendRestarted(alias="qwen"), {("router_backend_restarts_total", "model=qwen"): 1}),
    (ModelChanged(alias="qwen"), {}),
    (ServerChanged(status="ready"), {}),
]


@pytest.mark.parametrize(("event", "moved"), EVENTS)
async def test_what_an_event_moves(
    metrics: Metrics, event: Event | RequestFinished, moved: dict[tuple[str, ...], float]
) -> None:
    before = await values(metrics)
    if isinstance(event, RequestFinished):
        metrics.requests([event])
    else:
        metrics(event)
    after = await values(metrics)
    for series, value in moved.items():
        assert before.get(series, 0) == 0
        assert after[series] == value
    named = {series[0].removesuffix("_sum").removesuffix("_count").removesuffix("_bucket") for series in moved}
    for series in after:
        if series[0].startswith("router_") and not series[0].startswith(tuple(named) or ("-",)):
            assert before[series] == after[series], series


@pytest.mark.parametrize("outcome", Outcome)
async def test_every_outcome(metrics: Metrics, outcome: Outcome) -> None:
    metrics.requests([finished(outcome=outcome)])
    status = "success" if outcome is Outcome.OK else "error"
    told = await values(metrics)
    assert told[
        "router_requests_total", f"endpoint={CHAT}", "model=qwen", f"outcome={outcome.value}", f"status={status}"
    ]
    # what was refused, or left, says nothing of how fast we are
    assert (("router_request_duration_seconds_count", "model=qwen") in told) is outcome.timed


async def test_no_label_is_what_a_client_typed(metrics: Metrics) -> None:
    for evil in ('"} 1\nevil', "unheard-of", "/v1/../x", "é" * 1000):
        metrics.requests([finished(alias=evil, endpoint=evil)])
    metrics.requests([finished(endpoint=CHAT + "/")])
    told = {series: value for series, value in (await values(metrics)).items() if series[0] == "router_requests_total"}
    assert told == {
        ("router_requests_total", "endpoint=other", "model=unknown", "outcome=ok", "status=success"): 4,
        ("router_requests_total", f"endpoint={CHAT}", "model=qwen", "outcome=ok", "status=success"): 1,
    }


async def test_a_model_that_is_added_again_is_known_again(metrics: Metrics) -> None:
    metrics(Reloaded(aliases=("with/slash",)))
    metrics.requests([finished()])
    metrics(Reloaded(aliases=("qwen", "with/slash")))
    metrics.requests([finished()])
    told = await values(metrics)
    for name in ("qwen", "unknown"):
        assert told["router_requests_total", f"endpoint={CHAT}", f"model={name}", "outcome=ok", "status=success"] == 1


async def test_rare_counters_begin_at_zero(metrics: Metrics) -> None:
    told = await values(metrics)
    for kind in ExitKind:
        assert told["router_backend_exits_total", f"kind={kind.value}", "model=with/slash"] == 0
    for result in LoadResult:
        assert told["router_model_loads_total", "model=qwen", f"result={result.value}"] == 0
    for reason in UnloadReason:
        assert told["router_model_unloads_total", "model=qwen", f"reason={reason.value}"] == 0


async def test_gauges_of_the_fleet(metrics: Metrics) -> None:
    loading = fleet(
        model(
            "qwen",
            state="loading",
            slots_busy=2,
            slots_idle=1,
            waiting=3,
            waiting_by_priority={"high": 1, "normal": 2, "low": 0},
            device_bytes={0: GIB, 1: 2 * GIB},
            vram_bytes=3 * GIB,
        ),
        phase="starting",
    )
    told = await values(metrics, told=loading)
    expected = {
        ("router_ready",): 0,
        ("router_queue_depth", "model=qwen"): 3,
        ("router_queued_requests", "model=qwen", "priority=high"): 1,
        ("router_queued_requests", "model=qwen", "priority=normal"): 2,
        ("router_queued_requests", "model=qwen", "priority=low"): 0,
        ("router_active_requests", "model=qwen"): 2,
        ("router_slots", "model=qwen", "state=busy"): 2,
        ("router_slots", "model=qwen", "state=idle"): 1,
        ("router_model_state", "model=qwen", "state=loading"): 1,
        ("router_model_state", "model=qwen", "state=ready"): 0,
        ("router_model_vram_bytes", "model=qwen"): 3 * GIB,
        ("router_model_device_memory_bytes", "device=0", "model=qwen"): GIB,
        ("router_model_device_memory_bytes", "device=1", "model=qwen"): 2 * GIB,
    }
    assert {series: told[series] for series in expected} == expected
    assert (await values(metrics, told=fleet(model())))["router_ready",] == 1


async def test_gauges_of_devices(metrics: Metrics) -> None:
    unified = Gpu(
        index=3, total_bytes=None, used_bytes=None, free_bytes=None, utilization_percent=None, power_watts=None
    )
    told = await values(metrics, gpus=Gpus((Gpu(), unified)))
    assert {series: value for series, value in told.items() if series[0].startswith("router_device_")} == {
        ("router_device_memory_bytes", "device=0", "kind=total"): 80 * GIB,
        ("router_device_memory_bytes", "device=0", "kind=used"): 20 * GIB,
        ("router_device_memory_bytes", "device=0", "kind=free"): 60 * GIB,
        ("router_device_utilization_ratio", "device=0"): 0.42,
        ("router_device_temperature_celsius", "device=0"): 55,
        ("router_device_temperature_celsius", "device=3"): 55,
        ("router_device_power_watts", "device=0"): 312.5,
    }


async def test_two_routers_do_not_share_numbers(metrics: Metrics) -> None:
    other = Metrics(["qwen"], {CHAT}, version="1")
    metrics(BackendRestarted(alias="qwen"))
    assert (await values(other))["router_backend_restarts_total", "model=qwen"] == 0


async def test_openmetrics_when_asked_for(metrics: Metrics) -> None:
    metrics.requests([finished()])
    body, kind = await metrics.render("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", fleet(), Gpus())
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    found = {family.name: family.type for family in text_string_to_metric_families(body.decode())}
    assert found["router_requests"] == "counter"
    assert found["router_build"] == "info"


@pytest.mark.parametrize(
    "accept", [None, "", "*/*", "text/html", "text/plain;version=0.0.4", "text/plain;version=x", ";;,=", "é"]
)
async def test_plain_text_otherwise(metrics: Metrics, accept: str | None) -> None:
    body, kind = await metrics.render(accept, fleet(model()), Gpus())
    assert kind.startswith("text/plain; version=0.0.4")
    assert b"router_ready 1.0" in body


async def test_build_info(metrics: Metrics) -> None:
    told = await values(metrics)
    (series,) = [series for series in told if series[0] == "router_build_info"]
    assert "version=1.2.3" in series
    assert any(label.startswith("python_version=3.") for label in series)


def fifty() -> tuple[Metrics, Any]:
    aliases = [f"model-{number}" for number in range(50)]
    metrics = Metrics(aliases, {CHAT}, version="1")
    for alias in aliases:
        metrics(LoadFinished(alias=alias, result=LoadResult.OK, seconds=1))
        for priority in ("high", "normal", "low"):
            metrics.requests([finished(alias=alias, priority=priority, waited_seconds=1)])
        for outcome in Outcome:
            metrics.requests(
                [finished(alias=alias, outcome=outcome, first_token_seconds=1, seconds_per_output_token=0.1)]
            )
    return metrics, fleet(*(model(alias) for alias in aliases))


async def test_a_large_board_is_rendered_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, told = fifty()
    threads = []
    collect = metrics._state.collect
    monkeypatch.setattr(metrics._state, "collect", lambda: threads.append(threading.get_ident()) or collect())
    before = time.thread_time()
    body, _ = await metrics.render(None, told, Gpus((Gpu(),)))
    in_the_loop = time.thread_time() - before
    assert len(body) > 400_000
    assert threads
    assert threads[0] != threading.get_ident()
    assert in_the_loop < 0.02


async def test_the_loop_runs_on_during_a_scrape() -> None:
    """The bound is 20 ms; three tries, because a machine that tests run on has other things to do."""
    metrics, told = fifty()
    longest = 1.0
    for _ in range(3):
        gaps = []

        async def tick(gaps: list[float] = gaps) -> None:
            while True:
                before = time.perf_counter()
                await trio.sleep(0.001)
                gaps.append(time.perf_counter() - before - 0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            for _ in range(3):
                await metrics.render(None, told, Gpus((Gpu(),)))
            nursery.cancel_scope.cancel()
        assert len(gaps) > 5
        longest = min(longest, max(gaps))
    assert longest < 0.05


async def test_a_scraper_that_leaves_does_not_wait(metrics: Metrics) -> None:
    with trio.move_on_after(0):
        await metrics.render(None, fleet(model()), Gpus())
    assert "router_ready" in await text_of(metrics)
