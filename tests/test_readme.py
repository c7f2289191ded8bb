"""Every code block of the README, run as it stands; those that need root or a Docker engine are read by the shell only.

A new block fails until it is said here how it is run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from tests.harness.router import RouterProcess, clean_environment
from tests.harness.tiny_gguf import write_tiny_llama

ROOT = Path(__file__).parent.parent
ADDRESS = "http://127.0.0.1:8000"
READ_ONLY = {
    "docker compose": "needs a Docker engine; tests/deploy reads what it is given",
    "docker build": "needs a Docker engine; tests/deploy runs the Dockerfile's steps",
    "API_KEY=...": "needs a Docker engine",
    "haproxy -c": "needs a cluster; tests/deploy reads and runs these files",
    "sudo python3": "changes the system; tests/deploy holds the unit against systemd's own reader",
}
"""What blocks that are not run begin with, and why."""


@attrs.frozen
class Block:
    """A fenced block."""

    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"line-{self.line}-{self.language}"


def blocks() -> list[Block]:
    text = (ROOT / "README.md").read_text()
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = blocks()
TOML = [block for block in BLOCKS if block.language == "toml"]
BASH = [block for block in BLOCKS if block.language == "bash"]
LEFT = [block for block in BASH if block.text.startswith(tuple(READ_ONLY))]


def the(begins: str, language: str = "bash") -> str:
    """The one block that begins so."""
    (found,) = (block.text for block in BLOCKS if block.language == language and block.text.startswith(begins))
    return found


def run(command: list[str | Path], *, folder: Path, environment: dict[str, str] | None = None, seconds: float = 150):
    scripts = str(Path(sys.executable).parent)
    kept = clean_environment(
        {"PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **(environment or {})}
    )
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_block_is_accounted_for() -> None:
    ran = {
        the("pip install -e"), the("curl"), the("trio-router init"), the("python -m benchmarks"), the("pip install nox"),
        the("from openai", "python"), the("root nursery", ""),
    }  # fmt: skip
    known = ran | {block.text for block in [*TOML, *LEFT]}
    unknown = [str(block) for block in BLOCKS if block.text not in known]
    assert unknown == [], "say in this file how they are run"


@pytest.mark.parametrize("block", BASH, ids=str)
def test_the_shell_reads_it(block: Block, tmp_path: Path) -> None:
    run(["bash", "-n", "-c", block.text], folder=tmp_path)
    for word in shlex.split(block.text, comments=True):
        if word.startswith(("deploy/", "benchmarks/")):
            assert (ROOT / word).exists()


@pytest.mark.parametrize("block", TOML, ids=str)
def test_check_likes_it(block: Block, tmp_path: Path, fake_llama: Path, header_gguf: Path) -> None:
    """With the files it names put where the environment says they are."""
    text = block.text
    found = tomllib.loads(text)
    for table in found.get("models", {}).values():
        place = tmp_path / Path(table["model_path"]).name
        shutil.copy(header_gguf, place)
    if "models" not in found:
        shutil.copy(header_gguf, tmp_path / "qwen.gguf")
        text += '\n[models.qwen]\nmodel_path = "qwen.gguf"\n'
    text = text.replace('key_sha256 = "2c26b4..."', f'key_sha256 = "{"2c" * 32}"')
    config = tmp_path / "router.toml"
    config.write_text(text)
    places = {"LLAMA_SERVER_PATH": str(fake_llama), "BASE_MODELS_PATH": str(tmp_path)}
    run([sys.executable, "-m", "trio_router", "check", "--config", config], folder=tmp_path, environment=places)


def test_the_benchmarks_are_there(tmp_path: Path) -> None:
    first, second = the("python -m benchmarks").splitlines()
    program, *options = shlex.split(first)
    assert program == "python"
    said = run([sys.executable, *options[:2], "--help"], folder=ROOT)
    assert options[2:] == ["--quick"]
    assert "--quick" in said
    assert second == "nox -s bench"
    assert "\ndef bench(" in (ROOT / "noxfile.py").read_text()


def test_what_is_installed_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra, model, serve = the("pip install -e").strip().split(" && ")
    assert extra == 'pip install -e ".[demo]"'
    assert "demo" in project["optional-dependencies"]
    assert f'MODEL = "{model.rpartition(" ")[2]}"' in (ROOT / "noxfile.py").read_text()
    assert serve == "trio-router serve"
    assert "trio-router" in project["scripts"]
    assert the("pip install nox") == "pip install nox && nox\n"
    assert (ROOT / "noxfile.py").exists()


@pytest.fixture(scope="module")
def demo(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """`trio-router serve` with the repository's own router.toml, on another port."""
    assert real_llama.exists()
    assert smollm2.exists()
    text = (ROOT / "router.toml").read_text()
    with RouterProcess(tmp_path_factory.mktemp("demo"), text, environment={"PATH": os.defpath}) as router:
        yield router


@pytest.mark.e2e
def test_the_first_request(demo: RouterProcess, tmp_path: Path) -> None:
    command = the("curl")
    assert ADDRESS in command
    said = run(["bash", "-c", command.replace(ADDRESS, demo.url)], folder=tmp_path)
    assert said.rstrip().endswith("data: [DONE]")


@pytest.mark.e2e
def test_the_first_program(demo: RouterProcess, tmp_path: Path) -> None:
    program = the("from openai", "python")
    assert ADDRESS in program
    said = run([sys.executable, "-c", program.replace(ADDRESS, demo.url)], folder=tmp_path)
    assert said.strip()


@pytest.mark.e2e
def test_from_a_folder_of_models_to_a_chat(real_llama: Path, smollm2: Path, tmp_path: Path) -> None:
    assert real_llama.exists()
    init, serve = the("trio-router init").splitlines()
    models = tmp_path / "models"
    models.mkdir()
    write_tiny_llama(models / "tiny.gguf", tokenizer_from=smollm2, seed=1)
    places = {"HOME": str(tmp_path), "LLAMA_SERVER_PATH": str(real_llama)}
    run(["bash", "-c", init], folder=tmp_path, environment=places)
    assert serve == "trio-router serve"
    written = (tmp_path / "router.toml").read_text()
    alias = next(iter(tomllib.loads(written)["models"]))
    with RouterProcess(tmp_path / "serve", written, environment={"PATH": os.defpath}) as router:
        assert router.chat(alias, max_tokens=4, timeout=60).status_code == 200
