"""Agents from npm: a chat (which each of them streams), an error, Ctrl-C. `nox -s npm_clients`.

Their own prompts are thousands of tokens, which a processor's core reads at a few hundred a second: hence minutes.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import KEY
from tests.clients.program import Program
from tests.clients.test_python import active
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess
from tests.harness.toml import router_toml

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LIMIT_SECONDS = 300.0
CONTEXT = 32768
"""Tokens of a slot: room for what they say of themselves, two or three thousand tokens of it by SmolLM2's template, which
leaves tools out."""
ANSWER = 48
"""Tokens, whatever an agent asks for: small models rarely find an end, and Claude Code asks for 32,000."""
Ask = Callable[[str, str], Program]


@pytest.fixture(scope="module")
def router(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    assert real_llama.exists()
    flags = ["-c", str(2 * CONTEXT), "-np", "2", "-t", "1", "-b", "256"]
    text = router_toml(
        models={"smollm2": {"model_path": smollm2, "flags": flags, "max_output_tokens": ANSWER}},
        system={"gpu_devices": [], "preload_models": ["smollm2"]},
        keys=[{"name": "agents", "key": KEY}],
    )
    with RouterProcess(tmp_path_factory.mktemp("router"), text, environment={"PATH": os.defpath}) as router:
        wait_until(lambda: router.get("/readyz").status_code == 200, timeout_seconds=60)
        yield router


def claude(bin: Path, home: Path, url: str, model: str, words: str) -> Program:
    environment = {
        "ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": KEY, "ANTHROPIC_SMALL_FAST_MODEL": model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }  # fmt: skip
    options = ["--model", model, "--tools", "", "--system-prompt", "You are kind.", "--max-turns", "1"]
    return Program([bin / "claude", "-p", words, *options], home, environment)


def codex(bin: Path, home: Path, url: str, model: str, words: str) -> Program:
    folder = home / ".codex"
    folder.mkdir(parents=True)
    provider = {"name": "router", "base_url": f"{url}/v1", "env_key": "ROUTER_KEY", "wire_api": "responses"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in provider.items()]
    head = [f'model = "{model}"', 'model_provider = "router"', "[model_providers.router]"]
    (folder / "config.toml").write_text("\n".join([*head, *lines]) + "\n")
    return Program([bin / "codex", "exec", "--skip-git-repo-check", words], home, {"ROUTER_KEY": KEY})


def opencode(bin: Path, home: Path, url: str, model: str, words: str) -> Program:
    home.mkdir(parents=True)
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "router",
        "options": {"baseURL": f"{url}/v1", "apiKey": KEY},
        "models": {model: {"name": model, "limit": {"context": CONTEXT, "output": ANSWER}}},
    }
    names = {"model": f"router/{model}", "small_model": f"router/{model}"}
    (home / "opencode.json").write_text(json.dumps({"provider": {"router": provider}, "autoupdate": False, **names}))
    environment = {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    return Program([bin / "opencode", "run", words], home, environment)


AGENTS = {"claude": claude, "codex": codex, "opencode": opencode}
SAYS = {"claude": "nobody", "codex": "no model is called 'nobody'", "opencode": "no model is called 'nobody'"}
"""What each makes of a model that there is not."""


@pytest.fixture(params=AGENTS)
def agent(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ask(agent: str, environments: Path, router: RouterProcess, home: Path) -> Ask:
    """Starts the agent with words for a model."""

    def start(model: str, words: str) -> Program:
        return AGENTS[agent](environments / "node_modules" / ".bin", home, router.url, model, words)

    return start


def test_a_chat(ask: Ask) -> None:
    with ask("smollm2", "Name a colour.") as program:
        assert program.end(LIMIT_SECONDS) == 0
        assert program.output.strip()


def test_an_error(ask: Ask, agent: str) -> None:
    with ask("nobody", "Name a colour.") as program:
        program.end(LIMIT_SECONDS)
        assert SAYS[agent] in program.output + program.stderr


def test_ctrl_c(ask: Ask, router: RouterProcess) -> None:
    with ask("smollm2", "Tell a long story.") as program:
        program.say_no_more()
        wait_until(lambda: active(router) > 0, timeout_seconds=60)
        program.interrupt()
        wait_until(lambda: active(router) == 0, timeout_seconds=20)


def test_a_probe_before_anything_else(router: RouterProcess) -> None:
    """claude-code asks so whether anybody is there."""
    assert router.request("HEAD", "/").status_code == 302
    assert router.request("HEAD", "/v1/models", headers={"X-Api-Key": KEY}).status_code == 200
