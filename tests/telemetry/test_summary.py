from typing import Any

import pytest

from trio_router.telemetry.events import (
    BackendExited,
    ExitKind,
    LoadFinished,
    LoadResult,
    ModelChanged,
    Outcome,
    RequestFinished,
    Unloaded,
    UnloadReason,
)
from trio_router.telemetry.snapshot import telemetry_summary
from trio_router.telemetry.summary import MAX_DURATIONS, Summary, percentile


class Clock:
    def __init__(self) -> None:
        self.now = 10_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def summary(clock: Clock) -> Summary:
    return Summary(["qwen", "llama"], clock)


def finished(alias: str | None = "qwen", outcome: Outcome = Outcome.OK, seconds: float = 1.0, **facts: Any):
    given = {"queue_seconds": 0.1 if outcome is Outcome.OK else None, "code": None, "priority": "normal"}
    return RequestFinished(
        request_id="req_1",
        finished_at=0.0,
        alias=alias,
        endpoint="/v1/chat/completions",
        outcome=outcome,
        status=200,
        duration_seconds=seconds,
        **{**given, **facts},
    )


def test_nothing_asked_is_a_valid_answer(summary: Summary) -> None:
    assert telemetry_summary(summary) == {
        "window_seconds": 3600.0,
        "total_requests": 0,
        "success_count": 0,
        "error_count": 0,
        "success_rate": 100.0,
        "avg_latency_ms": 0.0,
        "p50_latency_ms": 0.0,
        "p95_latency_ms": 0.0,
        "p99_latency_ms": 0.0,
        "tokens_generated": 0,
        "tokens_read": 0,
        "requests_by_model": {},
        "errors_by_type": {},
    }


def test_the_last_hour(summary: Summary, clock: Clock) -> None:
    for number in range(1, 101):
        summary.requests([finished(seconds=number / 1000, input_tokens=3, output_tokens=2)])
    summary.requests([finished("llama", Outcome.REJECTED, 0.001, code="queue_full")])
    summary.requests([finished("llama", Outcome.CANCELLED, 100.0)])
    summary.requests([finished(None, Outcome.CLIENT_ERROR, 0.001, code="model_not_found")])
    summary.requests([finished("llama", Outcome.BACKEND_ERROR, 1.0, queue_seconds=0.0)])
    told = telemetry_summary(summary)
    assert told["total_requests"] == 104
    assert (told["success_count"], told["error_count"], told["success_rate"]) == (100, 4, 96.15)
    assert told["avg_latency_ms"] == pytest.approx((5050 + 1000) / 101, abs=0.001)
    assert (told["p50_latency_ms"], told["p95_latency_ms"], told["p99_latency_ms"]) == (51.0, 96.0, 100.0)
    assert (told["tokens_generated"], told["tokens_read"]) == (200, 300)
    assert told["requests_by_model"] == {"qwen": 100, "llama": 3, "unknown": 1}
    assert told["errors_by_type"] == {"queue_full": 1, "cancelled": 1, "model_not_found": 1, "backend_error": 1}
    clock.now += 3601
    assert telemetry_summary(summary)["total_requests"] == 0
    assert telemetry_summary(summary)["p99_latency_ms"] == 0.0


def test_the_last_minute_is_each_models_own(summary: Summary, clock: Clock) -> None:
    summary.requests([finished(seconds=0.2, output_tokens=5)])
    clock.now += 30
    summary.requests([finished(outcome=Outcome.TIMEOUT, seconds=0.4, code="backend_timeout")])
    summary.requests([finished(outcome=Outcome.REJECTED, seconds=9.0)])
    minute = summary.minute("qwen")
    assert (minute.requests, minute.errors, minute.output_tokens, minute.mean_ms) == (3, 2, 5, 300.0)
    assert summary.minute("llama").requests == 0
    clock.now += 45
    assert summary.minute("qwen").requests == 2
    clock.now += 45
    assert summary.minute("qwen").requests == 0


def test_totals_are_since_the_start(summary: Summary, clock: Clock) -> None:
    summary.requests([finished()])
    summary.requests([finished(outcome=Outcome.BACKEND_ERROR, queue_seconds=0.0)])
    summary.requests([finished(outcome=Outcome.REJECTED)])
    summary.requests([finished(outcome=Outcome.TIMEOUT, code="queue_timeout")])
    summary.requests([finished(outcome=Outcome.CANCELLED)])
    clock.now += 100_000
    totals = summary.totals("qwen")
    assert (totals.requests, totals.processed, totals.rejected) == (5, 2, 2)
    assert summary.totals("llama").requests == 0


def test_uptime(summary: Summary, clock: Clock) -> None:
    assert summary.uptime_percentage("qwen") == 100.0
    summary(LoadFinished(alias="qwen", result=LoadResult.OK, seconds=1.0))
    clock.now += 90
    summary(BackendExited(alias="qwen", incarnation=1, kind=ExitKind.KILLED, code=-9))
    clock.now += 10
    summary(LoadFinished(alias="qwen", result=LoadResult.FAILED, seconds=1.0))
    assert summary.uptime_percentage("qwen") == 90.0
    summary(LoadFinished(alias="qwen", result=LoadResult.OK, seconds=1.0))
    clock.now += 100
    assert summary.uptime_percentage("qwen") == 95.0
    summary(BackendExited(alias="qwen", incarnation=2, kind=ExitKind.STOPPED, code=0))
    summary(Unloaded(alias="qwen", reason=UnloadReason.IDLE))
    summary(ModelChanged(alias="qwen"))
    clock.now += 1000
    assert summary.uptime_percentage("qwen") == 95.0
    assert summary.uptime_percentage("llama") == 100.0


def test_memory_is_bounded(summary: Summary) -> None:
    for _ in range(MAX_DURATIONS + 5):
        summary.requests([finished(alias="never heard of")])
    assert len(summary._durations) == MAX_DURATIONS
    assert len(summary._models) == 3


@pytest.mark.parametrize(
    ("values", "share", "found"),
    [
        ([], 0.5, None),
        ([7], 0.99, 7),
        ([1, 2], 0.5, 1),
        ([1, 2, 3, 4], 0.5, 2),
        (range(1, 1001), 0.99, 990),
        ([5], 0.0, 5),
    ],
)
def test_percentile(values, share: float, found) -> None:
    assert percentile(list(values), share) == found
