"""What there is and how it is; load and eject."""

import threading
from datetime import datetime, timedelta

import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.record import Record

pytestmark = pytest.mark.process


def test_list_and_one(start_router: StartRouter) -> None:
    router = start_router(models={"org/qwen:7b": [], "plain": [], "a/b/c": []})
    listed = router.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["org/qwen:7b", "plain", "a/b/c"]
    for entry in listed["data"]:
        assert (entry["object"], entry["owned_by"], entry["status"]["value"]) == ("model", "user", "unloaded")
        assert isinstance(entry["created"], int)
        assert entry["n_ctx"] is None
    router.chat("org/qwen:7b")
    for path in ("/v1/models/org/qwen:7b", "/v1/models/org%2Fqwen:7b", "/v1/models/org%2fqwen%3A7b"):
        one = router.get(path).json()
        assert (one["id"], one["status"]["value"]) == ("org/qwen:7b", "loaded")
    router.wait_for_status("org/qwen:7b", n_ctx=1024)
    assert router.get("/v1/models/nobody").json()["error"]["code"] == "model_not_found"


def test_statuses(start_router: StartRouter) -> None:
    router = start_router(models={"org/qwen": ["-np", "2"], "plain": []})
    router.chat("org/qwen")
    found = router.get("/v1/models/status").json()
    assert found["server"]["status"] == "ready"
    assert found["server"]["uptime_seconds"] > 0
    assert found["summary"] == {"total": 2, "ready": 1, "off": 1}
    status = found["models"]["org/qwen"]
    assert (status["alias"], status["status"], status["port"], status["slots"]) == ("org/qwen", "ready", None, 2)
    assert status["pid"] in router.servers()
    for name in ("started_at", "last_used_at", "updated_at"):
        assert datetime.fromisoformat(status[name]).utcoffset() == timedelta(0)
    one = router.get("/v1/models/org/qwen/status").json()
    assert (one["model"], one["is_alive"]) == ("org/qwen", True)
    off = router.get("/v1/models/plain/status").json()
    assert (off["status"], off["is_alive"], off["pid"], off["error_message"]) == ("off", False, None, None)


def test_load_and_eject(start_router: StartRouter) -> None:
    router = start_router(models={"org/qwen": []})
    loaded = router.post("/v1/models/load", {"model": "org/qwen"})
    assert loaded.status_code == 200, loaded.text
    assert router.status("org/qwen")["status"] == "ready"
    ejected = router.post("/v1/models/eject", {"model": "org/qwen"}).json()
    assert (ejected["status"], ejected["model_ejected"]) == ("success", "org/qwen")
    assert router.servers() == {}
    again = router.post("/v1/models/eject", {"model": "org/qwen"})
    assert again.status_code == 200
    assert (again.json()["status"], again.json()["model_ejected"]) == ("not_found", None)
    assert router.chat("org/qwen").status_code == 200


def test_load_without_waiting(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=["--fake-load-until", str(gate)])
    assert router.post("/v1/models/load?wait=false", {"model": "qwen"}).status_code == 202
    router.wait_for_status("qwen", status="loading")
    assert router.get("/v1/models/qwen").json()["status"]["value"] == "loading"
    gate.touch()
    router.wait_for_status("qwen", status="ready")


@pytest.mark.parametrize("path", ["/v1/models/load", "/v1/models/eject"])
def test_commands_refuse_bad_bodies(start_router: StartRouter, path: str) -> None:
    router = start_router(qwen=[])
    assert router.post(path, {"model": "nobody"}).json()["error"]["code"] == "model_not_found"
    assert router.post(path, {}).json()["error"]["code"] == "missing_model"
    assert router.post(path, {"model": 3}).json()["error"]["code"] == "missing_model"
    assert router.post(path, content=b"[]").json()["error"]["code"] == "invalid_json"
    assert router.servers() == {}


def test_eject_waits_for_what_runs(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=record.flags)
    running = router.in_background("qwen", fake={"hold_until": str(gate)})
    record.wait_for("started")
    answers = []
    ejecting = threading.Thread(target=lambda: answers.append(router.post("/v1/models/eject", {"model": "qwen"})))
    ejecting.start()
    router.wait_for_status("qwen", status="stopping")
    assert not answers
    gate.touch()
    assert running.answer().status_code == 200
    ejecting.join(10)
    assert answers[0].json()["status"] == "success"
    assert router.servers() == {}


def test_eject_by_force_cuts(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=record.flags)
    running = router.in_background("qwen", fake={"stall": True})
    record.wait_for("started")
    assert router.post("/v1/models/eject?force=true", {"model": "qwen"}).json()["status"] == "success"
    answer = running.answer()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "backend_unavailable")
    assert "retry-after" in answer.headers
    wait_until(lambda: router.servers() == {})
