"""Which models are in memory, and what happens when one cannot be."""

import stat
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import is_alive, wait_until
from tests.harness.record import Record

pytestmark = pytest.mark.process

ONE_TRY = {"max_load_attempts": 1}


def failed(answer: httpx.Response, *words: str) -> None:
    """The answer is the model's failure, and says these words."""
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "model_failed"), answer.text
    assert error["type"] == "service_unavailable_error"
    assert int(answer.headers["retry-after"]) >= 1
    for word in words:
        assert word in error["message"]


def test_many_waiters_share_one_load(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=["-np", "8", "--fake-load-until", str(gate), *record.flags])
    pending = [router.in_background("qwen") for _ in range(8)]
    router.wait_for_status("qwen", queued=8)
    gate.touch()
    assert {each.answer().status_code for each in pending} == {200}
    assert len(record.lines("spawned")) == 1


def test_the_list_of_models_is_there_at_once_also_during_a_load(start_router: StartRouter, record: Record) -> None:
    """Within 50 ms; most of the time, on a machine that does other things as well."""
    gate = record.path.with_name("gate")
    router = start_router(qwen=["--fake-load-until", str(gate), *record.flags])
    pending = router.in_background("qwen")
    router.wait_for_status("qwen", status="loading")
    seconds = []
    with router.client() as client:
        for _ in range(15):
            asked = time.monotonic()
            listed = client.get("/v1/models").json()["data"]
            seconds.append(time.monotonic() - asked)
            assert listed[0]["status"]["value"] == "loading"
    gate.touch()
    assert pending.answer().status_code == 200
    assert sorted(seconds)[len(seconds) // 2] < 0.05


def test_readiness_is_noticed_at_once(start_router: StartRouter, record: Record) -> None:
    """Within 30 ms of `/health` turning 200; twice that is allowed here, for a busy machine."""
    router = start_router(qwen=["--fake-load-seconds", "0.3", *record.flags])
    late = []
    for _ in range(3):
        assert router.chat("qwen").status_code == 200
        late.append(record.lines("received")[-1]["time"] - record.lines("ready")[-1]["time"])
        router.post("/v1/models/eject", {"model": "qwen"})
    assert min(late) < 0.06, late


def test_three_aliases_one_at_a_time(start_router: StartRouter, record: Record) -> None:
    """`max_concurrent_models = 1`: each is answered, one llama-server at a time, none left behind."""
    aliases = ["one", "two", "three"]
    router = start_router(models=dict.fromkeys(aliases, record.flags), system={"max_concurrent_models": 1})
    for alias in aliases * 2:
        answer = router.chat(alias)
        assert (answer.status_code, answer.json()["model"]) == (200, alias)
        assert list(router.servers().values()) == [alias]
    pending = [router.in_background(alias) for alias in aliases * 3]
    most = 0
    while not all(each.done for each in pending):
        most = max(most, len(router.servers()))
        time.sleep(0.01)
    assert {each.answer().status_code for each in pending} == {200}
    assert most == 1


def test_the_least_recently_used_leaves(start_router: StartRouter) -> None:
    router = start_router(models={"a": [], "b": [], "c": []}, system={"max_concurrent_models": 2})
    for alias in ("a", "b", "a"):
        router.chat(alias)
    router.chat("c")
    assert set(router.servers().values()) == {"a", "c"}


def test_what_runs_is_never_cut_for_another_model(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(models={"a": record.flags, "b": record.flags}, system={"max_concurrent_models": 1})
    running = router.in_background("a", fake={"hold_until": str(gate)})
    router.wait_for_status("a", active=1)
    waiting = router.in_background("b")
    router.wait_for_status("b", queued=1)
    time.sleep(0.3)
    assert list(router.servers().values()) == ["a"]
    assert not waiting.done
    gate.touch()
    assert (running.answer().status_code, waiting.answer().json()["model"]) == (200, "b")


def test_a_stream_of_work_does_not_lock_others_out(start_router: StartRouter) -> None:
    """With one place, two models that are both wanted all the time take turns."""
    router = start_router(models={"a": [], "b": []}, system={"max_concurrent_models": 1, "queue_timeout_sec": 20})
    pending = [router.in_background(alias) for alias in "aabbaabb" * 3]
    assert {each.answer(30).status_code for each in pending} == {200}


def test_idle_timeout(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=record.flags, system={"idle_timeout_sec": 0.4})
    running = router.in_background("qwen", fake={"hold_until": str(gate)})
    router.wait_for_status("qwen", active=1)
    time.sleep(0.8)
    assert router.status("qwen")["status"] == "ready"  # busy is not idle
    gate.touch()
    assert running.answer().status_code == 200
    began = time.monotonic()
    wait_until(lambda: router.servers() == {})
    assert 0.3 < time.monotonic() - began < 2
    assert router.chat("qwen").status_code == 200
    assert len(record.lines("spawned")) == 2


def test_idle_timeout_off(start_router: StartRouter) -> None:
    router = start_router(qwen=[], system={"idle_timeout_sec": 0.1, "enable_idle_timeout": False})
    router.chat("qwen")
    pid = router.status("qwen")["pid"]
    time.sleep(0.5)
    assert is_alive(pid)


def test_preload(start_router: StartRouter, record: Record) -> None:
    """In parallel, and the server answers meanwhile."""
    gate = record.path.with_name("gate")
    flags = ["--fake-load-until", str(gate), *record.flags]
    router = start_router(models={"a": flags, "b": flags, "c": flags}, system={"preload_models": ["a", "c"]})
    record.wait_for("spawned", 2)
    assert router.get("/health").status_code == 200
    gate.touch()
    for alias in "ac":
        router.wait_for_status(alias, status="ready")
    assert router.status("b")["status"] == "off"


def test_preload_all_respects_the_bound(start_router: StartRouter) -> None:
    router = start_router(
        models={"a": [], "b": [], "c": []}, system={"preload_models": ["*"], "max_concurrent_models": 2}
    )
    for alias in "ab":
        router.wait_for_status(alias, status="ready")
    assert len(router.servers()) == 2
    assert router.chat("c").status_code == 200


def test_exit_at_start_says_its_words(start_router: StartRouter, record: Record) -> None:
    words = "error: invalid argument: --no-such-flag"
    router = start_router(qwen=["--fake-exit-at-start", "1", "--fake-words", words, *record.flags], system=ONE_TRY)
    failed(router.chat("qwen"), "qwen", words)
    status = router.status("qwen")
    assert status["status"] == "failed"
    assert words in status["error_message"]
    assert router.get("/v1/models").json()["data"][0]["status"]["value"] == "failed"
    failed(router.chat("qwen"), words)
    assert len(record.lines("spawned")) == 1  # failed is failed: it is not tried for every request
    failures = router.get("/v1/models/failed").json()["failed_models"]
    assert (failures[0]["model"], failures[0]["attempts"]) == ("qwen", 1)


def test_attempts_and_backoff(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=["--fake-exit-at-start", "1", *record.flags], system={"max_load_attempts": 3})
    failed(router.chat("qwen"))
    times = [line["time"] for line in record.lines("spawned")]
    assert len(times) == 3
    assert times[1] - times[0] > 0.1
    assert times[2] - times[1] > times[1] - times[0]


def test_a_load_that_fails_first_is_tried_again(start_router: StartRouter, record: Record) -> None:
    state = record.path.with_name("state")
    router = start_router(qwen=["--fake-fail-first", "2", "--fake-state", str(state), *record.flags])
    assert router.chat("qwen").status_code == 200
    assert len(record.lines("spawned")) == 3
    assert router.status("qwen")["status"] == "ready"


def test_reset(start_router: StartRouter, record: Record) -> None:
    state = record.path.with_name("state")
    router = start_router(qwen=["--fake-fail-first", "1", "--fake-state", str(state)], system=ONE_TRY)
    failed(router.chat("qwen"))
    reset = router.post("/v1/models/qwen/reset").json()
    assert (reset["status"], reset["model"]) == ("success", "qwen")
    assert "fails on purpose" in reset["previous_error"]
    assert router.chat("qwen").status_code == 200
    assert router.post("/v1/models/qwen/reset").json()["status"] == "not_found"
    assert router.get("/v1/models/failed").json() == {"failed_models": [], "message": "No failed models"}


def test_out_of_memory_says_so(start_router: StartRouter, record: Record) -> None:
    failed(start_router(qwen=["--fake-oom", *record.flags]).chat("qwen"), "out of memory")
    assert len(record.lines("spawned")) == 2, "once more after others could make room, and no more"


def test_out_of_memory_with_a_smaller_context(start_router: StartRouter, header_gguf: Path) -> None:
    model = {"model_path": header_gguf, "flags": ["-c", "8192", "--fake-oom-above", "2048"]}
    router = start_router(qwen={**model, "on_oom": ["smaller_context", "smaller_context"]}, system=ONE_TRY)
    assert router.chat("qwen").status_code == 200
    status = router.status("qwen")
    assert status["adjusted"] == ["smaller_context: 8192 -> 4096 tokens", "smaller_context: 4096 -> 2048 tokens"]
    assert (status["status"], status["error_message"] is not None) == ("ready", True)
    router.post("/v1/models/eject", {"model": "qwen"})
    assert router.status("qwen")["adjusted"] == []
    router.chat("qwen")
    assert len(router.status("qwen")["adjusted"]) == 2


def test_load_timeout(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-never-ready"], system={"load_timeout_sec": 0.4, **ONE_TRY})
    answer = router.chat("qwen")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "load_timeout")
    assert answer.json()["error"]["type"] == "timeout_error"
    wait_until(lambda: router.servers() == {})


def test_a_missing_file(start_router: StartRouter, tmp_path: Path) -> None:
    router = start_router(qwen={"model_path": tmp_path / "missing.gguf"}, good=[], system=ONE_TRY)
    failed(router.chat("qwen"), "missing.gguf")
    assert router.chat("good").status_code == 200


def test_a_broken_gguf(start_router: StartRouter, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"hello, I am no model")
    router = start_router(qwen={"model_path": tmp_path / "broken.gguf"}, system=ONE_TRY)
    failed(router.chat("qwen"), "broken.gguf", "GGUF")


def test_a_llama_server_that_is_not_executable(start_router: StartRouter, fake_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "llama-server"
    copy.write_bytes(fake_llama.read_bytes())
    copy.chmod(stat.S_IRUSR)
    router = start_router(qwen=[], system={"llama_server_path": copy, **ONE_TRY})
    failed(router.chat("qwen"), str(copy), "ermission denied")


def test_a_llama_server_that_is_no_program(start_router: StartRouter, tmp_path: Path) -> None:
    copy = tmp_path / "llama-server"
    copy.write_bytes(b"\x7fELF but not really")
    copy.chmod(0o755)
    router = start_router(qwen=[], system={"llama_server_path": copy, **ONE_TRY})
    failed(router.chat("qwen"), str(copy), "xec format error")


def test_a_llama_server_that_is_missing(start_router: StartRouter, tmp_path: Path) -> None:
    router = start_router(qwen=[], system={"llama_server_path": tmp_path / "nowhere", **ONE_TRY})
    failed(router.chat("qwen"), "nowhere")


def test_a_flood_of_log_does_not_block(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-flood-log", "2000000"])
    assert router.chat("qwen").status_code == 200


def test_children_do_not_see_secrets(start_router: StartRouter) -> None:
    router = start_router(qwen=[], environment={"API_KEY": "sesame", "LLAMA_ARG_HOST": "0.0.0.0", "HF_TOKEN": "hf"})
    assert router.chat("qwen", headers={"X-Api-Key": "sesame"}).status_code == 200
    (pid,) = router.servers()
    seen = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
    for word in (b"sesame", b"LLAMA_ARG_HOST", b"HF_TOKEN"):
        assert word not in seen


def test_the_socket_is_private(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=record.flags)
    router.chat("qwen")
    argv = record.lines("spawned")[0]["argv"]
    path = Path(argv[argv.index("--host") + 1])
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    router.post("/v1/models/eject", {"model": "qwen"})
    assert not path.exists()
    router.terminate()
    assert router.wait() == 0
    assert not path.parent.exists()


class TestTcp:
    def test_serves_with_a_key_of_its_own(self, start_router: StartRouter, record: Record) -> None:
        router = start_router(qwen=record.flags, system={"backend_transport": "tcp"})
        assert router.chat("qwen").status_code == 200
        assert router.chat("qwen", stream=True).text.endswith("data: [DONE]\n\n")
        port = router.status("qwen")["port"]
        assert httpx.post(f"http://127.0.0.1:{port}/tokenize", json={}, trust_env=False).status_code == 401
        assert "--api-key" not in record.lines("spawned")[0]["argv"]

    def test_restarts(self, start_router: StartRouter) -> None:
        router = start_router(qwen=[], system={"backend_transport": "tcp"})
        for _ in range(3):
            assert router.chat("qwen").status_code == 200
            router.post("/v1/models/eject", {"model": "qwen"})
