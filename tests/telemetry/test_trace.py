import json

from trio_router.telemetry import trace
from trio_router.telemetry.events import LoadFinished, LoadResult, Outcome, RequestFinished, Unloaded, UnloadReason
from trio_router.telemetry.trace import Trace, TracedLoad, TracedRequest, read_line


def ended(**facts) -> RequestFinished:
    usual = {
        "request_id": "x", "finished_at": 1010.0, "alias": "a", "endpoint": "/v1/completions", "priority": "low",
        "outcome": Outcome.OK, "status": 200, "code": None, "duration_seconds": 4.0, "waited_seconds": 1.0,
        "held_seconds": 2.5, "input_tokens": 7, "output_tokens": 9, "client": "10.0.0.1",
    }  # fmt: skip
    return RequestFinished(**{**usual, **facts})


def read(kept: Trace) -> list:
    return [read_line(line) for line in kept.lines()]


def test_requests_and_loads_come_back_as_they_were() -> None:
    kept = Trace()
    kept.requests([ended(), ended(alias="b", held_seconds=None, waited_seconds=None, input_tokens=None, status=503)])
    kept.requests([ended(alias=None, priority=None)])
    kept(LoadFinished(alias="a", result=LoadResult.OK, seconds=1.5))
    kept(LoadFinished(alias="a", result=LoadResult.FAILED, seconds=9))
    kept(Unloaded(alias="a", reason=UnloadReason.EVICTED, seconds=0.25))
    kept(Unloaded(alias="a", reason=UnloadReason.FAILED))
    first, second, load, unload = read(kept)
    assert first == TracedRequest(
        at=1006, model="a", priority="low", client=first.client, service_seconds=2.5, waited_seconds=1,
        input_tokens=7, output_tokens=9,
    )  # fmt: skip
    assert (second.model, second.service_seconds, second.waited_seconds, second.status) == ("b", None, None, 503)
    assert (second.input_tokens, second.output_tokens) == (None, 9)
    assert load == TracedLoad(at=load.at, model="a", seconds=1.5)
    assert unload == TracedLoad(at=unload.at, model="a", seconds=0.25, kind="unload")


def test_numbers_that_nobody_can_have_meant() -> None:
    kept = Trace()
    kept.requests([ended(input_tokens=2**32 - 1, output_tokens=10**14)])
    (request,) = read(kept)
    assert request.input_tokens == request.output_tokens == 2**32 - 2


def test_clients_can_be_told_apart_and_not_be_known() -> None:
    kept, other = Trace(), Trace()
    for each in (kept, other):
        each.requests([ended(), ended(client="10.0.0.2"), ended()])
    one, two, again = (request.client for request in read(kept))
    assert one == again != two
    assert "10.0.0" not in "".join(kept.lines())
    assert read(other)[0].client != one


def test_it_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(trace, "MAX_REQUESTS", 3)
    kept = Trace()
    kept.requests([ended(finished_at=float(number)) for number in range(10)])
    assert [json.loads(line)["at"] for line in kept.lines()] == [3, 4, 5]
