"""From a folder of GGUF files to a chat in two commands."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.router import clean_environment
from tests.harness.tiny_gguf import write_split_llama, write_tiny_llama

pytestmark = pytest.mark.e2e

START_SECONDS = 60
ANSWER_SECONDS = 120


def trio_router(*arguments: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trio_router", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS
    )


def read_until(process: subprocess.Popen[bytes], pattern: str, seconds: float) -> str:
    """What it has said once that matches."""
    assert process.stdout is not None
    text, end = b"", time.monotonic() + seconds
    while (found := re.search(pattern, text.decode(errors="replace"))) is None:
        readable, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        data = os.read(process.stdout.fileno(), 4096) if readable else b""
        assert data, f"it says nothing like {pattern}: {text!r}"
        text += data
    return found[0]


def test_two_commands(tmp_path: Path, real_llama: Path, smollm2: Path) -> None:
    models = tmp_path / "models"
    (models / "Big").mkdir(parents=True)
    write_tiny_llama(models / "Tiny One.gguf", tokenizer_from=smollm2, seed=1)
    write_split_llama(models / "Big", "Big", tokenizer_from=smollm2, parts=2)
    (models / "half.gguf").write_bytes((models / "Tiny One.gguf").read_bytes()[:100_000])
    (models / "notes.gguf").write_text("this is no model")
    environment = clean_environment(
        {"LLAMA_SERVER_PATH": str(real_llama), "LD_LIBRARY_PATH": str(real_llama.parent), "HOME": str(tmp_path)}
    )

    written = trio_router("init", "--models-dir", "models", folder=tmp_path, environment=environment)
    assert written.returncode == 0, written.stderr
    assert [line.split(":")[0] for line in written.stdout.splitlines()[:-1]] == ["big", "tiny-one"]
    checked = trio_router("check", folder=tmp_path, environment=environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "trio_router", *arguments]
        return stack.enter_context(
            subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=stderr)
        )

    with ExitStack() as stack:
        stderr = stack.enter_context((tmp_path / "stderr.log").open("wb"))
        router = start("serve", "--port", "0")
        stack.callback(router.kill)
        url = read_until(router, r"http://[\w.:\[\]]+(?=\n)", START_SECONDS)
        for model in ("tiny-one", "big"):
            talk = start("run", "--url", url, model, "Hello!")
            stack.callback(talk.kill)
            read_until(talk, r"(?:\w+\s+){5}", ANSWER_SECONDS)  # it would go on as long as its context
            talk.send_signal(signal.SIGINT)
            assert talk.wait(30) == 130
        router.send_signal(signal.SIGTERM)
        assert router.wait(30) == 0
