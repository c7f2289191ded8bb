"""The program itself: its exit codes, its one line, its precedences."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import StartRouter
from tests.harness.router import clean_environment
from tests.harness.toml import router_toml

pytestmark = pytest.mark.process


def run(*arguments: str, folder: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trio_router", *arguments],
        cwd=folder,
        env=clean_environment(environment),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.fixture
def good(tmp_path: Path, fake_llama: Path, header_gguf: Path) -> Path:
    path = tmp_path / "router.toml"
    models = {"qwen": {"model_path": header_gguf}}
    path.write_text(router_toml(models=models, system={"llama_server_path": fake_llama, "gpu_devices": []}))
    return path


def test_check_good(good: Path) -> None:
    done = run("check", folder=good.parent)
    assert done.returncode == 0, done.stderr
    assert "qwen" in done.stdout


@pytest.mark.parametrize("command", ["check", "serve"])
def test_bad_config(good: Path, command: str) -> None:
    text = good.read_text().replace("[system]", "[system]\nmax_concurrent_models = 0\nnonsense = 1")
    good.write_text(text.replace('[models."qwen"]', '[models."qwen"]\nflags = ["--port", "1"]'))
    done = run(command, folder=good.parent)
    assert done.returncode == 2
    for key in ("system.max_concurrent_models", "system.nonsense", "models.qwen.flags"):
        assert key in done.stderr
    assert "Traceback" not in done.stderr
    begun = [": ".join(line.split(": ")[:2]) for line in done.stderr.splitlines()]
    keys = ("system.max_concurrent_models", "system.nonsense", "models.qwen.flags[0]")
    assert begun == [f"router.toml: {key}" for key in keys]


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["serve", "--no-such"], ["serve", "--port", "x"], ["serve", "--port", "70000"]]
)
def test_bad_usage(good: Path, arguments: list[str]) -> None:
    done = run(*arguments, folder=good.parent)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_missing_config(tmp_path: Path) -> None:
    done = run("serve", "--config", "nowhere.toml", folder=tmp_path)
    assert done.returncode == 2
    assert "nowhere.toml" in done.stderr


def test_a_port_in_use(good: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--port", str(taken.getsockname()[1]), folder=good.parent)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_one_line_on_standard_output(start_router: StartRouter) -> None:
    router = start_router(qwen=[])
    router.chat("qwen")
    assert router.get("/health").json()["port"] == router.port  # which port 0 has become
    router.terminate()
    assert router.wait() == 0
    assert router.process.stdout is not None
    assert router.process.stdout.read() == b""


def test_environment_wins(start_router: StartRouter, fake_llama: Path, header_gguf: Path) -> None:
    router = start_router(
        qwen={"model_path": header_gguf.name},
        system={"llama_server_path": "/nowhere", "base_models_path": "/nowhere"},
        environment={"LLAMA_SERVER_PATH": str(fake_llama), "BASE_MODELS_PATH": str(header_gguf.parent)},
    )
    assert router.chat("qwen").status_code == 200


def test_json_logs(start_router: StartRouter) -> None:
    router = start_router(qwen=[], arguments=("--log-format", "json"))
    router.chat("qwen", headers={"X-Request-ID": "find-me"})
    router.terminate()
    router.wait()
    lines = [json.loads(line) for line in router.stderr.splitlines()]
    assert lines
    assert any("find-me" in line.values() for line in lines)


def test_a_request_that_goes_back_to_the_queue_is_found_by_its_id(start_router: StartRouter) -> None:
    router = start_router(qwen=[], arguments=("--log-format", "json"))
    assert router.chat("qwen", fake={"die": "before_headers"}, headers={"X-Request-ID": "mine"}).status_code == 502
    router.terminate()
    assert router.wait() == 0
    told = [line for line in map(json.loads, router.stderr.splitlines()) if line.get("id") == "mine"]
    assert [line["event"] for line in told] == ["queued again", "request"]
    assert {line["model"] for line in told} == {"qwen"}
    assert told[0]["incarnation"] == 1
