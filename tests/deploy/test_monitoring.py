"""A real Prometheus against a real router: every expression of the board and of the rules finds data."""

import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.conftest import ROOT, tool
from tests.deploy.prometheus import Prometheus, board_expressions, left_side, rules
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess, chat_body
from tests.harness.toml import router_toml

pytestmark = pytest.mark.process

DEBIAN = "apt-get install -y --no-install-recommends prometheus"
KEY = "a-key-for-people-and-prometheus"
FAKE_NVML = Path(__file__).parent / "fake_nvml"
FIRING_AT_ONCE = {"TrioRouterLoadFailures", "TrioRouterModelFailed"}
"""Alerts of what happens here that wait for nothing."""


@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules.test.yml")],
    ids=" ".join,
)
def test_promtool(monitoring: Path, command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [tool("promtool", DEBIAN), *command], cwd=monitoring, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test(monitoring: Path) -> None:
    names = [line.split()[-1] for line in (monitoring / "rules.yml").read_text().splitlines() if "- alert:" in line]
    tests = (monitoring / "rules.test.yml").read_text()
    assert len(names) == len(set(names)) >= 7
    assert [name for name in names if f"alertname: {name}\n" not in tests] == []


class Client:
    """A router under load, by somebody who has the key."""

    def __init__(self, router: RouterProcess) -> None:
        self.router = router
        self._client = router.client(headers={"Authorization": f"Bearer {KEY}"})
        self.problems: list[httpx.TransportError] = []

    def chat(self, model: str, *, priority: str = "normal", stream: bool = False, **fake: Any) -> int:
        body = chat_body(model, fake=fake, stream=stream)
        answer = self._client.post("/v1/chat/completions", json=body, headers={"X-Request-Priority": priority})
        return answer.status_code

    def try_to_chat(self, model: str, **options: Any) -> None:
        """For threads; a stream that is cut is part of what happens here."""
        try:
            self.chat(model, **options)
        except httpx.TransportError as error:
            self.problems.append(error)

    def post(self, path: str, body: Any) -> int:
        return self._client.post(path, json=body).status_code

    def state(self, model: str) -> str:
        return str(self._client.get(f"/v1/models/{model}/status").json()["status"])

    def close(self) -> None:
        self._client.close()


def at_once(calls: list[Callable[[], None]]) -> None:
    """Each in a thread of its own."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def one_round(client: Client) -> None:
    """Everything that an operator may want to see, once. `alpha` has two slots and a queue of four."""
    for stream in (False, True):
        assert client.chat("alpha", tokens=8, token_seconds=0.01, stream=stream) == 200
    assert client.chat("beta", tokens=4, cached=3) == 200
    assert client.chat("nobody") == 404
    assert client.chat("broken") == 503
    order = ("normal", "normal", "high", "normal", "low", "low", "low", "low")
    # two run, four wait, two are turned away
    at_once([partial(client.try_to_chat, "alpha", priority=each, tokens=4, token_seconds=0.1) for each in order])
    assert client.chat("gamma", tokens=4) == 200  # for which the least recently used one, beta, has to leave
    client.try_to_chat("alpha", stream=True, tokens=8, die="after_first_chunk")
    wait_until(lambda: client.state("alpha") == "ready", timeout_seconds=20)
    assert client.post("/v1/models/eject", {"model": "gamma"}) == 200


def test_board_and_rules_have_data(monitoring: Path, fake_llama: Path, header_gguf: Path, tmp_path: Path) -> None:
    executable = tool("prometheus", DEBIAN)
    model = {"model_path": header_gguf, "flags": ["-np", "2"]}
    one_slot = {"model_path": header_gguf, "flags": []}
    broken = {"model_path": header_gguf, "flags": ["--fake-exit-at-start", "1"]}
    system = {
        "llama_server_path": fake_llama,
        "gpu_devices": [0],
        "max_concurrent_models": 2,
        "max_queue_size_per_model": 4,
        "max_load_attempts": 1,
    }
    config = router_toml(models={"alpha": model, "beta": one_slot, "gamma": one_slot, "broken": broken}, system=system)
    environment = {"API_KEY": KEY, "PYTHONPATH": f"{FAKE_NVML}:{ROOT}"}
    start = time.time()
    with (
        RouterProcess(tmp_path / "router", config, environment=environment) as router,
        Prometheus(executable, monitoring, [f"127.0.0.1:{router.port}"], key=KEY) as prometheus,
    ):
        client = Client(router)
        wait_until(lambda: prometheus.now("router_ready") == [1.0], timeout_seconds=10, what="the first scrape")
        for _ in range(3):
            one_round(client)
            assert client.post("/v1/models/broken/reset", None) == 200
        client.chat("broken")
        client.chat("gamma", tokens=4)
        asked = board_expressions(monitoring)
        assert len(asked) > 50

        def without_data() -> list[str]:
            values = {one: prometheus.since(start, time.time(), one.expression) for one in asked}
            return [f"{one.place}: {one.expression}" for one, found in values.items() if not any(found)]

        # The device monitor looks every 2 s, Prometheus and its rules every second, and the range has steps of one.
        with suppress(TimeoutError):
            wait_until(lambda: not without_data(), timeout_seconds=20)
        empty = without_data()
        assert not empty, "only zeros, or nothing:\n" + "\n".join(empty)
        wait_until(lambda: prometheus.now('ALERTS{alertstate="firing", alertname="TrioRouterModelFailed"}'))
        end = time.time()
        client.close()

        up = prometheus.ask("query", query="up")["result"]
        assert {(one["metric"]["job"], one["value"][1]) for one in up} == {
            ("trio-router", "1"),
            ("trio-router-backends", "1"),
        }
        found_rules = rules(prometheus)
        assert len(found_rules) >= 7
        for rule in found_rules:
            assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule
            assert prometheus.since(start, end, left_side(rule["query"])), rule["query"]
        firing = {rule["name"] for rule in found_rules if rule["state"] == "firing"}
        assert firing == FIRING_AT_ONCE | (firing & {"TrioRouterCrashLoop"})
