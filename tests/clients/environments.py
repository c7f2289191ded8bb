"""Make an environment for each of Python's clients: `python environments.py FOLDER`, a few at once."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CLIENTS = {
    "openai-2": "openai>=2,<3",
    "openai-3": "openai>=3,<4",
    "anthropic": "anthropic>=2",
    "llm": "llm>=0.30",
    "langchain-openai": "langchain-openai>=1",
    "llama-index": "llama-index-llms-openai-like>=0.7",
}
AT_ONCE = 3
"""Of a few seconds each, half of which is waiting for an index."""


def make(folder: Path, requirement: str) -> None:
    """The environment at `folder`; one that is there and complete stays as it is."""
    done = folder / "made-for"
    if done.exists() and done.read_text() == requirement:
        return
    run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder])
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    run([*pip, "--quiet", "--disable-pip-version-check", "--no-compile", requirement])
    done.write_text(requirement)


def run(command: list[str | Path]) -> None:
    """Say nothing unless it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command}: {done.stdout}{done.stderr}")


def main() -> None:
    """Make them all."""
    folder = Path(sys.argv[1])
    with ThreadPoolExecutor(AT_ONCE) as at_once:
        # the largest first, so that the last to be ready is not alone
        made = [at_once.submit(make, folder / name, wanted) for name, wanted in reversed(CLIENTS.items())]
    for each in made:
        each.result()


if __name__ == "__main__":
    main()
