"""Plans and decisions over HTTP, and in a command."""

import pytest

from tests.conftest import StartRouter
from trio_router.cli import main

pytestmark = pytest.mark.process


def test_a_plan_and_what_then_happens(start_router: StartRouter, capsys) -> None:
    router = start_router(models={"a": [], "b": []}, system={"max_concurrent_models": 1, "min_turn_sec": 0})
    assert router.chat("a").status_code == 200
    assert router.post("/v1/router/plan", {"model": "a"}).json()["outcome"] == "run"
    plan = router.post("/v1/router/plan", {"model": "b", "priority": "high"}).json()
    assert (plan["outcome"], plan["evicts"], plan["queue_position"], plan["priority"]) == ("load", ["a"], 1, "high")
    assert main(["plan", "b", "--url", router.url]) == 0
    assert "load: model 'b' is loaded in the place of 'a', which makes room now" in capsys.readouterr().out
    assert list(router.servers().values()) == ["a"]
    assert router.chat("b").status_code == 200
    decisions = router.get("/v1/router/decisions").json()["decisions"]
    told = [(each["outcome"], each["model"], each["evicts"]) for each in decisions]
    assert told == [("start", "a", []), ("evict", "b", ["a"]), ("start", "b", [])]
    assert decisions[1].keys() == plan.keys()
    assert router.get("/v1/router/decisions?last=1").json()["decisions"] == decisions[-1:]
    for last in ("x", "-1", "1.5", "9" * 10):
        assert router.get(f"/v1/router/decisions?last={last}").json()["error"]["code"] == "invalid_request"


def test_what_is_no_request(start_router: StartRouter) -> None:
    router = start_router(models={"a": []})
    assert router.post("/v1/router/plan", {"model": "z"}).json()["error"]["code"] == "model_not_found"
    assert router.post("/v1/router/plan", {}).json()["error"]["code"] == "missing_model"
    answer = router.post("/v1/router/plan", {"model": "a", "priority": "top"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_priority")
