"""Python's clients: a chat, a stream, errors shown well and not repeated in vain, a stream that is left."""

from pathlib import Path

import pytest

from tests.clients.conftest import KEY
from tests.clients.program import Program
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess

pytestmark = pytest.mark.e2e

PROGRAMS = Path(__file__).parent / "programs"
CLIENTS = {
    "openai-2": "use_openai.py",
    "openai-3": "use_openai.py",
    "anthropic": "use_anthropic.py",
    "langchain-openai": "use_langchain.py",
    "llama-index": "use_llama_index.py",
}
TRIES = {"llama-index": 3}
"""How often a client asks for what failed for good: once, as it is told by `x-should-retry`; this one is not told."""


def active(router: RouterProcess) -> int:
    answer = router.get("/v1/models/smollm2/status", headers={"X-Api-Key": KEY})
    return int(answer.json()["active"])


def asked(router: RouterProcess, alias: str) -> float:
    """How many requests for a model have been answered, errors included."""
    text = router.get("/metrics", headers={"X-Api-Key": KEY}).text
    lines = [line for line in text.splitlines() if line.startswith('router_requests_total{endpoint="/v1/')]
    return sum(float(line.rpartition(" ")[2]) for line in lines if f'model="{alias}"' in line)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_works_unchanged(name: str, environments: Path, router: RouterProcess, home: Path) -> None:
    python = environments / name / "bin" / "python"
    broken_before = asked(router, "broken")
    with Program([python, PROGRAMS / CLIENTS[name], router.url, "smollm2", KEY], home) as client:
        ready = client.step()
        assert ready["step"] == "ready"
        if name.startswith("openai-"):
            assert ready["version"].startswith(name.removeprefix("openai-"))
        steps = {}
        errors = []
        while (step := client.step())["step"] != "streaming":
            errors.append(step) if step["step"] == "error" else steps.update({step["step"]: step})
        assert steps["chat"]["text"]
        assert steps["stream"]["text"]
        assert steps["stream"]["pieces"] > 2
        unknown, broken = errors
        assert unknown["kind"].endswith("NotFoundError")
        assert (unknown["status"], unknown["code"]) == (404, "model_not_found")
        assert "nobody" in unknown["says"]
        assert (broken["status"], broken["code"]) == (503, "model_failed")
        assert "broken" in broken["says"]
        assert asked(router, "broken") - broken_before == TRIES.get(name, 1)
        assert all(error["id"].startswith("req_") for error in errors)
        if "models" in ready:
            assert ready["models"] == ["smollm2", "broken"]
            assert steps["model"]["id"] == "smollm2"
            assert steps["chat"]["id"].startswith("req_")
        if name == "anthropic":
            assert steps["beta"]["text"]
            assert steps["count"]["tokens"] > 5
        assert active(router) == 1
        client.go_on()
        assert client.step()["step"] == "left"
        wait_until(lambda: active(router) == 0, timeout_seconds=10, what="its slot is free while it lives on")
        client.go_on()
        assert client.end() == 0
