"""What the real llama-server's own list of flags says about those that a model may not have."""

import re
import subprocess
from pathlib import Path

import pytest

from trio_router.config.flags import OWNED, owned_reason

pytestmark = pytest.mark.e2e

SUSPICIOUS = re.compile(
    r"host|port|listen|bind|api-key|api-prefix|ssl|sock|^--models|^--model$|^--alias$|^--hf-repo$|^--hf-file$"
)
HARMLESS = {"--no-host", "--hf-repo-draft", "--hf-repo-v"}
"""Where buffers are kept; models that are loaded beside."""


def run(real_llama: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"LD_LIBRARY_PATH": str(real_llama.parent)}
    return subprocess.run(
        [real_llama, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_no_flag_that_moves_it_is_let_through(real_llama):
    """Whatever this version knows: a new one that has to do with where it listens is looked at before it passes."""
    shown = run(real_llama, "--help").stdout
    known = set(re.findall(r"(?m)(?:^|, *)(--?[a-zA-Z][a-zA-Z0-9-]*)", shown))
    assert {"--host", "--port", "--api-key", "-m", "-a"} <= known
    suspicious = {flag for flag in known if SUSPICIOUS.search(flag)} - HARMLESS
    assert {flag for flag in suspicious if owned_reason(flag) is None} == set()
    assert {flag for flag in OWNED if flag not in known} <= {
        "-dr",
        "--docker-repo",
        "--models-autoload",
        "--reuse-port",
    }


@pytest.mark.parametrize("written", ["--host=0.0.0.0", "--HOST", "--hos", "-host", "--host 0.0.0.0"])
def test_no_other_spelling_is_understood(real_llama, written):
    """What looks like an owned flag and is let through, or is refused by us alone, is none."""
    done = run(real_llama, written, "0.0.0.0", "--port", "1", "--model", "none.gguf")
    assert done.returncode != 0
    assert "invalid argument" in done.stderr + done.stdout
