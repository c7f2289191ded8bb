"""Another router.toml while the router runs."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartRouter
from tests.harness.processes import stop, wait_until
from tests.harness.record import Record
from tests.harness.router import RouterProcess, chat_body
from tests.harness.toml import router_toml

pytestmark = pytest.mark.process


def rewrite(router: RouterProcess, old: str, new: str) -> None:
    text = router.config_path.read_text()
    assert old in text
    router.config_path.write_text(text.replace(old, new))


@pytest.mark.parametrize("headers", [{}, {"TE": "trailers"}], ids=["lean", "quart"])
def test_only_what_changed_is_restarted_and_streams_of_others_go_on(
    start_router: StartRouter, record: Record, headers: dict[str, str]
) -> None:
    router = start_router(a=["-c", "1024", *record.flags], b=record.flags, c=record.flags)
    assert router.chat("a").status_code == 200
    before = router.status("a")["pid"]
    stream = router.in_background("b", stream=True, headers=headers, fake={"tokens": 40, "token_seconds": 0.05})
    record.wait_for("started", alias="b")
    pid = router.status("b")["pid"]
    rewrite(router, '"1024"', '"2048"')
    rewrite(router, '[models."c"]', '[models."d"]')
    rewrite(router, "[system]", "[system]\nmax_queue_size_per_model = 3")
    answer = router.post("/v1/config/reload")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "status": "success",
        "changed": ["system.max_queue_size_per_model", "models.a.flags"],
        "after_restart": [],
        "models": {"added": ["d"], "removed": ["c"], "restarted": ["a"], "unchanged": ["b"]},
    }
    router.wait_for_status("a", status="ready")
    assert router.status("a")["pid"] != before
    assert "2048" in record.lines("spawned", alias="a")[-1]["argv"]
    assert router.chat("d").status_code == 200
    assert router.chat("c").json()["error"]["code"] == "model_not_found"
    assert stream.answer().text.endswith("data: [DONE]\n\n")
    assert router.status("b")["pid"] == pid


@pytest.mark.parametrize("headers", [{}, {"TE": "trailers"}], ids=["lean", "quart"])
def test_a_request_of_a_model_that_was_taken_out_can_be_cancelled(
    start_router: StartRouter, record: Record, headers: dict[str, str]
) -> None:
    router = start_router(a=record.flags, b=[])
    running = router.in_background("a", headers={**headers, "X-Request-ID": "mine"}, fake={"stall": True})
    record.wait_for("started")
    rewrite(router, '[models."a"]', '[models."c"]')
    assert router.post("/v1/config/reload").status_code == 200
    assert router.post("/v1/requests/mine/cancel").json() == {"status": "success", "cancelled": 1}
    assert running.answer().json()["error"]["code"] == "request_cancelled"


@pytest.mark.parametrize("by_signal", [False, True])
def test_a_wrong_file_changes_nothing(start_router: StartRouter, *, by_signal: bool) -> None:
    router = start_router(a=[], b=[])
    assert router.chat("a").status_code == 200
    pid = router.status("a")["pid"]
    rewrite(router, "[system]", '[system]\nidle_timeout_sec = -1\naging_sec = "x"')
    rewrite(router, '[models."b"]', '[models."e"]')
    if by_signal:
        router.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "configuration refused" in router.stderr)
    else:
        error = router.post("/v1/config/reload").json()["error"]
        assert error["code"] == "invalid_config"
        assert [problem.partition("system.")[2].split()[0] for problem in error["problems"]] == [
            "idle_timeout_sec:",
            "aging_sec:",
        ]
    assert router.chat("b").status_code == 200
    assert router.status("a")["pid"] == pid


def test_a_model_file_that_is_not_there(start_router: StartRouter, tmp_path: Path) -> None:
    router = start_router(a=[])
    pid = router.post("/v1/models/load", {"model": "a"}) and router.status("a")["pid"]
    text = router.config_path.read_text()
    path = next(line for line in text.splitlines() if line.startswith("model_path"))
    rewrite(router, path, f'model_path = "{tmp_path}/none.gguf"')
    answer = router.post("/v1/config/reload")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_config")
    assert "none.gguf" in answer.json()["error"]["message"]
    assert router.status("a")["pid"] == pid


def test_by_signal(start_router: StartRouter, record: Record) -> None:
    router = start_router(a=record.flags)
    assert router.chat("a").status_code == 200
    rewrite(router, "flags = [", 'flags = ["-c", "512", ')
    router.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(record.lines("ready")) == 2)
    assert router.chat("a").status_code == 200
    assert "configuration reloaded" in router.stderr
    assert router.is_running()


@pytest.mark.parametrize("by_quart", [False, True])
def test_keys_and_limits_hold_at_once(start_router: StartRouter, *, by_quart: bool) -> None:
    """On both ways in, and on connections that were there before."""
    router = start_router(a=[])
    long = json.dumps({**chat_body("a"), "more": "x" * (2 << 20)}).encode()
    connection = {"TE": "trailers"} if by_quart else {}

    def ask(body: bytes, **headers: str) -> Any:
        answer = router.post("/v1/chat/completions", content=body, headers={**connection, **headers})
        return answer.status_code if answer.is_success else answer.json()["error"]["code"]

    assert ask(long) == 200
    rewrite(router, "[api]", "[api]\nmax_body_mb = 1")
    rewrite(router, "[system]", '[[keys]]\nname = "app"\nkey = "sk-app"\n[system]')
    assert router.post("/v1/config/reload").json()["changed"] == ["api.max_body_mb", "keys"]
    short = json.dumps(chat_body("a")).encode()
    assert ask(short) == "invalid_api_key"
    assert ask(short, **{"X-Api-Key": "sk-app"}) == 200
    assert ask(long, **{"X-Api-Key": "sk-app"}) == "body_too_large"
    answer = router.post("/v1/config/reload", headers={"X-Api-Key": "sk-app"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_required")
    assert "key=app" in router.stderr
    assert "sk-app" not in router.stderr
    router.config_path.write_text(router_toml(models={"a": {"model_path": "x"}}))  # refused: there is no such file
    router.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "configuration refused" in router.stderr)
    assert ask(short) == "invalid_api_key"


def test_timeouts_hold_for_models_that_are_loaded(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(a=record.flags)
    running = router.in_background("a", fake={"hold_until": str(gate)})
    (line,) = record.wait_for("started")
    rewrite(router, "[system]", "[system]\nstall_timeout_sec = 0.8\nhealth_interval_sec = 0.2")
    answer = router.post("/v1/config/reload").json()
    assert answer["changed"] == ["system.stall_timeout_sec", "system.health_interval_sec"]
    assert answer["models"]["unchanged"] == ["a"]
    stop(line["pid"])
    gate.touch()
    assert running.answer().status_code == 200
    assert len(record.lines("spawned")) == 2
    assert "computed nothing for 0.8 s" in router.stderr

    rewrite(router, "[system]", "[system]\nrequest_timeout_sec = 0.5")
    assert router.post("/v1/config/reload").json()["changed"] == ["system.request_timeout_sec"]
    assert router.chat("a", fake={"stall": True}).json()["error"]["code"] == "backend_timeout"


def test_what_needs_another_start_is_told(start_router: StartRouter) -> None:
    router = start_router(a=[])
    rewrite(router, "[system]", '[system]\nbackend_transport = "tcp"')
    answer = router.post("/v1/config/reload").json()
    assert (answer["changed"], answer["after_restart"]) == (["system.backend_transport"],) * 2
    assert router.chat("a").status_code == 200
    assert router.status("a")["port"] is None


def test_a_model_on_a_gpu_that_needs_another_start(start_router: StartRouter) -> None:
    router = start_router(a=[], system={"gpu_devices": []})
    text = router.config_path.read_text()
    rewrite(router, "gpu_devices = []", "gpu_devices = [1]")
    line = next(line for line in text.splitlines() if line.startswith("model_path"))
    rewrite(router, line, f"{line}\ngpu = 1")
    answer = router.post("/v1/config/reload")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_config")
    assert "models.a.gpu: GPU 1" in answer.json()["error"]["message"]
    assert router.chat("a").status_code == 200


def test_readers_of_the_status_stream_are_told(start_router: StartRouter) -> None:
    router = start_router(a=[])
    with router.client() as client, client.stream("GET", "/v1/models/status/stream") as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line.startswith("event: full_status"))
        rewrite(router, '[models."a"]', '[models."z"]')
        router.post("/v1/config/reload")
        next(line for line in lines if line.startswith("event: full_status"))
        data = next(line for line in lines if line.startswith("data: "))
        assert list(json.loads(data[6:])["models"]) == ["z"]
