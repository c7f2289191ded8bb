"""The program `llm`: a chat, a stream, an error, Ctrl-C."""

from pathlib import Path

import pytest

from tests.clients.conftest import KEY
from tests.clients.program import Program
from tests.clients.test_python import active
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess

pytestmark = pytest.mark.e2e


@pytest.fixture
def settings(router: RouterProcess, home: Path) -> dict[str, str]:
    """The environment of an `llm` that knows the router's models."""
    folder = home / "llm"
    folder.mkdir(parents=True)
    entries = [
        f"- {{model_id: {name}, model_name: {name}, api_base: '{router.url}/v1', api_key_name: router}}\n"
        for name in ("smollm2", "nobody")
    ]
    (folder / "extra-openai-models.yaml").write_text("".join(entries))
    (folder / "keys.json").write_text(f'{{"router": "{KEY}"}}')
    return {"LLM_USER_PATH": str(folder)}


def test_a_chat_and_a_stream(environments: Path, home: Path, settings: dict[str, str]) -> None:
    command = [environments / "llm" / "bin" / "llm", "-m", "smollm2", "-o", "max_tokens", "12", "Name a colour."]
    with Program([*command, "--no-stream"], home, settings) as chat:
        assert chat.end() == 0
        assert chat.output.strip()
    with Program(command, home, settings) as stream:
        assert stream.end() == 0
        assert stream.output.strip()


def test_an_error(environments: Path, home: Path, settings: dict[str, str]) -> None:
    command = [environments / "llm" / "bin" / "llm", "-m", "nobody", "Name a colour."]
    with Program(command, home, settings) as program:
        assert program.end() == 1
        assert "no model is called 'nobody'" in program.stderr
        assert "Traceback" not in program.stderr


def test_ctrl_c(environments: Path, home: Path, router: RouterProcess, settings: dict[str, str]) -> None:
    command = [environments / "llm" / "bin" / "llm", "-m", "smollm2", "-o", "max_tokens", "4000", "Tell a long story."]
    with Program(command, home, settings) as program:
        program.say_no_more()
        wait_until(lambda: active(router) == 1, timeout_seconds=60)
        program.interrupt()
        wait_until(lambda: active(router) == 0, timeout_seconds=10)
        assert program.end() != 0
