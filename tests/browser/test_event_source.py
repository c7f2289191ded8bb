"""The seed's JavaScript, unchanged, in a real browser."""

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.places import OtherOrigin, Relay
from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.process, pytest.mark.browser]

SEED = """
const eventSource = new EventSource("/v1/models/status/stream");

eventSource.addEventListener("full_status", (e) => {
  console.log("Initial:", JSON.parse(e.data));
});

eventSource.addEventListener("model_update", (e) => {
  const data = JSON.parse(e.data);
  console.log(`Model ${data.alias}: ${data.status}`);
});
"""
"""The seed's README, "Stream Status Updates", to the letter."""

CONSOLE = "window.said = []; console.log = (...words) => { window.said.push(words); };"
"""What is said is kept for the test."""
MORE = """
window.source = eventSource;
window.ids = []; window.failures = [];
for (const name of ["full_status", "model_update", "server_update", "heartbeat"])
  eventSource.addEventListener(name, (e) => { window.ids.push([name, e.lastEventId]); });
eventSource.onerror = () => { window.failures.push(eventSource.readyState); };
"""
SCRIPT = f"() => {{ {CONSOLE}{SEED}{MORE} }}"


class Seen:
    """What the page saw."""

    def __init__(self, page: "Page") -> None:
        self.page = page

    def get(self, name: str) -> list[Any]:
        found: list[Any] = self.page.evaluate(f"window.{name}")
        return found

    def until_said(self, *words: Any) -> list[list[Any]]:
        wait_until(lambda: list(words) in self.get("said"), timeout_seconds=15, what=f"{words}")
        return self.get("said")

    def until_connected(self, times: int = 1) -> None:
        wait_until(
            lambda: sum(words[0] == "Initial:" for words in self.get("said")) >= times,
            timeout_seconds=15,
            what="full_status",
        )

    def changes(self) -> list[str]:
        """`Model ...` lines, each once when it comes twice in a row: counts change too."""
        lines = [words[0] for words in self.get("said") if words[0] != "Initial:"]
        return [line for at, line in enumerate(lines) if lines[at - 1 : at] != [line]]


LIFE = [f"Model qwen: {state}" for state in ("starting", "loading", "ready", "stopping", "off")]


@pytest.fixture
def same_origin(start_router: StartRouter, page: "Page") -> tuple[RouterProcess, Seen]:
    """The seed's script, run on a page of the router itself."""
    router = start_router(qwen=[], llama=[])
    page.goto(f"{router.url}/health")
    page.evaluate(SCRIPT)
    return router, Seen(page)


def test_the_seeds_script(same_origin: tuple[RouterProcess, Seen]) -> None:
    router, seen = same_origin
    seen.until_connected()
    router.post("/v1/models/load", {"model": "qwen"})
    router.post("/v1/models/eject", {"model": "qwen"})
    said = seen.until_said("Model qwen: off")
    first, status = said[0]
    assert first == "Initial:"
    assert status["server"]["status"] == "ready"
    assert {alias: model["status"] for alias, model in status["models"].items()} == {"qwen": "off", "llama": "off"}
    assert status["summary"] == {"total": 2, "off": 2}
    assert seen.changes() == LIFE
    numbers = [int(identity.rpartition("-")[2]) for _, identity in seen.get("ids")]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert seen.get("failures") == []


def test_it_connects_again_and_resumes(start_router: StartRouter, page: "Page") -> None:
    """The network is cut in the middle, and nothing is missed."""
    router = start_router(qwen=[])
    with Relay(router.port) as relay:
        page.goto(f"{relay.url}/health")
        page.evaluate(SCRIPT)
        seen = Seen(page)
        seen.until_connected()
        router.post("/v1/models/load", {"model": "qwen"})
        seen.until_said("Model qwen: ready")
        relay.cut()
        router.post("/v1/models/eject", {"model": "qwen"})
        seen.until_said("Model qwen: off")
        assert seen.get("failures") == [0]  # CONNECTING: it tries again by itself
        assert seen.changes() == LIFE
        assert [words[0] for words in seen.get("said")].count("Initial:") == 1
        page.goto("about:blank")  # the relay waits for its connections


def test_a_restarted_router_begins_anew(start_router: StartRouter, page: "Page") -> None:
    first = start_router(qwen=[])
    page.goto(f"{first.url}/health")
    page.evaluate(SCRIPT)
    seen = Seen(page)
    seen.until_connected()
    first.terminate()
    assert first.wait() == 0
    said = seen.get("ids")
    assert said[-1][0] == "server_update"
    start_router(qwen=[], arguments=("--port", str(first.port)))
    seen.until_connected(times=2)
    assert seen.get("ids")[-1][1].split("-")[0] != said[-1][1].split("-")[0]


def test_a_page_of_another_origin(start_router: StartRouter, page: "Page") -> None:
    """`api.cors_origins` lets its script read; without, the browser keeps the stream from it."""
    with OtherOrigin() as other:
        for allowed in (True, False):
            router = start_router(qwen=[], api={"cors_origins": [other.url] if allowed else []})
            other.show(f"{CONSOLE}{SEED}{MORE}", base=router.url)
            page.goto(other.url)
            seen = Seen(page)
            if allowed:
                seen.until_connected()
                router.post("/v1/models/load", {"model": "qwen"})
                seen.until_said("Model qwen: ready")
            else:
                wait_until(lambda seen=seen: seen.get("failures"), timeout_seconds=15)
                assert seen.get("failures") == [2]  # CLOSED: it does not try again
                assert seen.get("said") == []
            page.goto("about:blank")


def test_metrics_stream(start_router: StartRouter, page: "Page") -> None:
    router = start_router(qwen=[])
    page.goto(f"{router.url}/health")
    told = page.evaluate(
        """() => new Promise((done) => {
        const found = [];
        const source = new EventSource("/metrics/stream");
        source.addEventListener("metrics", (e) => {
          found.push(e.data);
          if (found.length == 3) { source.close(); done(found); }
        });
        })"""
    )
    first, *_, last = map(json.loads, told)
    assert [model["alias"] for model in last["models"]] == ["qwen"]
    assert last["server"]["uptime_seconds"] - first["server"]["uptime_seconds"] > 3
