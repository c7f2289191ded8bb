"""llama-server's own router mode beside ours: the same questions, answers of the same shape.

What is ours on purpose: `error.code` is a word (theirs repeats the status), unknown models are 404 (400 there, but for
one path), and a body that is not JSON is 400 (500 there). Their `preset` is the text of a file that we have not.
"""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess, clean_environment
from tests.harness.toml import router_toml

pytestmark = pytest.mark.e2e

FLAGS = ["-c", "512", "-np", "1", "-t", "1"]
THEIRS_ONLY = {"preset"}


@attrs.frozen
class Server:
    """Either router."""

    url: str

    def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=30) as client:
            return client.request(method, path, json=body)

    def entries(self) -> dict[str, dict[str, Any]]:
        return {each["id"]: each for each in self.ask("GET", "/models").json()["data"]}

    def until(self, alias: str, value: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            entry = self.entries()[alias]
            return entry if entry["status"]["value"] == value else None

        found = wait_until(reached, timeout_seconds=60, what=f"{alias}: {value}")
        assert found is not None
        return found


@pytest.fixture(scope="module")
def theirs(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("theirs")
    preset = folder / "preset.ini"
    preset.write_text(f"[one]\nmodel = {smollm2}\n[two]\nmodel = {smollm2}\n[broken]\nmodel = {preset}\n")
    log = folder / "log"
    command = [real_llama, "--host", "127.0.0.1", "--port", "0", "--models-preset", preset, "--models-max", "3", *FLAGS]
    environment = clean_environment({"LD_LIBRARY_PATH": str(real_llama.parent)})
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def address() -> str | None:
        said = log.read_text(errors="replace")
        return said.partition("listening on ")[2].split()[0].strip() if "listening on " in said else None

    try:
        found = wait_until(address, timeout_seconds=30, what="llama-server's router listens")
        assert found is not None
        yield Server(found)
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def ours(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert real_llama.exists()
    nothing = tmp_path_factory.mktemp("broken") / "broken.gguf"
    nothing.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16))
    models = {name: {"model_path": smollm2, "flags": FLAGS} for name in ("one", "two")}
    models["broken"] = {"model_path": nothing, "flags": FLAGS}
    system = {"gpu_devices": [], "max_load_attempts": 1}
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("ours")
        text = router_toml(models=models, system=system)
        router = stack.enter_context(RouterProcess(folder, text, environment={"PATH": os.defpath}))
        yield Server(router.url)


@pytest.fixture(scope="module")
def both(theirs: Server, ours: Server) -> tuple[Server, Server]:
    return theirs, ours


def missing(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """What an answer of theirs has and ours has not, or has in another type."""
    if isinstance(theirs, dict):
        if not isinstance(ours, dict):
            return [where]
        lacking = [f"{where}.{name}" for name in theirs.keys() - ours.keys() - THEIRS_ONLY]
        for name in theirs.keys() & ours.keys():
            lacking += missing(theirs[name], ours[name], f"{where}.{name}")
        return lacking
    if isinstance(theirs, list):
        if not isinstance(ours, list):
            return [where]
        return missing(theirs[0], ours[0], f"{where}[]") if theirs and ours else []
    numbers = (int, float)
    alike = isinstance(theirs, numbers) and isinstance(ours, numbers)
    return [] if alike or type(theirs) is type(ours) else [f"{where}: {theirs!r} and {ours!r}"]


def test_a_model_that_comes_and_goes(both: tuple[Server, Server]) -> None:
    found: list[list[Any]] = []
    for server in both:
        answers: list[Any] = [server.until("one", "unloaded")]
        answers.append(server.ask("POST", "/models/load", {"model": "one"}))
        loaded = server.until("one", "loaded")
        loaded.pop("meta", None)  # it comes a moment later, in both
        answers.append(loaded)
        answers.append(server.ask("POST", "/models/load", {"model": "one"}))
        answers += [server.ask("GET", f"/{what}?model=one") for what in ("props", "slots", "lora-adapters")]
        # their /props says that there is a model before their list does
        wait_until(lambda server=server: server.entries()["one"].get("meta"), timeout_seconds=10)
        answers.append(server.entries()["one"])
        answers.append(server.ask("POST", "/slots/0?action=erase", {"model": "one"}))
        answers.append(server.ask("POST", "/lora-adapters", {"model": "one"}))
        word = {"model": "one", "id": "chatcmpl-x", "action": "reasoning_end"}
        answers.append(server.ask("POST", "/v1/chat/completions/control", word))
        answers.append(server.ask("POST", "/models/unload", {"model": "one"}))
        answers.append(server.until("one", "unloaded"))
        answers.append(server.ask("POST", "/models/unload", {"model": "one"}))
        found.append(answers)
    for number, (their, our) in enumerate(zip(*found, strict=True)):
        if isinstance(their, httpx.Response):
            assert their.status_code == our.status_code, (number, their.text, our.text)
            their, our = their.json(), our.json()  # noqa: PLW2901
            if "error" in their:
                assert their["error"]["type"] == our["error"]["type"]
                continue
        assert missing(their, our) == [], number
    assert found[0][7]["meta"] == found[1][7]["meta"]


def test_one_models_metrics(ours: Server) -> None:
    """Theirs say 501 unless llama-server is started with `--metrics`, which ours always are."""
    answer = ours.ask("GET", "/metrics?model=two")
    assert answer.status_code == 200
    assert "llamacpp:prompt_tokens_total" in answer.text
    assert "router_requests_total" in ours.ask("GET", "/metrics").text
    assert ours.ask("GET", "/metrics?model=nobody").status_code == 404
    ours.ask("POST", "/models/unload", {"model": "two"})
    ours.until("two", "unloaded")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/models", None),
        ("GET", "/models?reload=1", None),
        ("GET", "/props", None),
        ("GET", "/health", None),
        ("GET", "/slots", None),
        ("GET", "/props?model=two&autoload=false", None),
        ("GET", "/slots?model=two&autoload=false", None),
        ("POST", "/v1/chat/completions?autoload=false", {"model": "two", "messages": []}),
        ("POST", "/v1/chat/completions", {"messages": []}),
        ("POST", "/models/load", {"model": "nobody"}),
        ("POST", "/slots/0?action=erase", {}),
        ("POST", "/lora-adapters?autoload=false", {"model": "two"}),
        ("POST", "/v1/chat/completions/control", {"id": "chatcmpl-x", "action": "reasoning_end"}),
    ],
)
def test_the_same_status_and_shape(both: tuple[Server, Server], method: str, path: str, body: Any) -> None:
    theirs, ours = (server.ask(method, path, body) for server in both)
    assert theirs.status_code == ours.status_code, (theirs.text, ours.text)
    assert missing({**theirs.json(), "error": None}, {**ours.json(), "error": None}) == []
    if "error" in theirs.json():
        assert theirs.json()["error"]["type"] == ours.json()["error"]["type"]


def test_a_load_that_fails(both: tuple[Server, Server]) -> None:
    def failed(server: Server) -> dict[str, Any] | None:
        entry = server.entries()["broken"]
        return entry if entry["status"].get("failed") else None

    found = []
    for server in both:
        assert server.ask("POST", "/models/load", {"model": "broken"}).json() == {"success": True}
        found.append(wait_until(lambda server=server: failed(server), timeout_seconds=60, what="failed"))
    theirs, ours = found
    assert missing(theirs, ours) == []
    assert theirs["status"]["value"] == ours["status"]["value"] == "unloaded"


def events_of_a_life(server: Server) -> dict[str, dict[str, Any]]:
    """What the stream of events said of a model that was loaded and unloaded: the last of each status."""
    events: list[dict[str, Any]] = []
    begun = threading.Event()

    def read() -> None:
        with httpx.stream("GET", f"{server.url}/models/sse", timeout=60, trust_env=False) as answer:
            begun.set()
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(json.loads(line.removeprefix("data: ")))
                    if events[-1].get("data", {}).get("status") == "unloaded" and events[-1]["model"] == "two":
                        return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert begun.wait(20)
    server.ask("POST", "/models/load", {"model": "two"})
    server.until("two", "loaded")
    server.ask("POST", "/models/unload", {"model": "two"})
    reader.join(30)
    assert not reader.is_alive()
    return {each["data"]["status"]: each["data"] for each in events if each["model"] == "two"}


def test_events(both: tuple[Server, Server]) -> None:
    """Theirs call some `status_change`; their documentation, and programs, know `model_status`."""
    theirs, ours = (events_of_a_life(server) for server in both)
    assert list(theirs) == list(ours) == ["loading", "loaded", "unloaded"]
    theirs["loaded"]["info"].pop("meta")  # ours asks for it once the model is loaded
    for status, data in theirs.items():
        assert missing(data, ours[status]) == []
    assert theirs["unloaded"]["exit_code"] == ours["unloaded"]["exit_code"] == 0
