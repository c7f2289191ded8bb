"""One router for all of them, with a key, as a machine that several people use would have it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess
from tests.harness.toml import router_toml

ENVIRONMENTS = "TRIO_ROUTER_CLIENTS"
"""Names the folder in which the nox sessions make the clients' environments."""
KEY = "sk-clients"
CONTEXT = 12288
"""Tokens of a slot."""


@pytest.fixture(scope="session")
def environments() -> Path:
    folder = os.environ.get(ENVIRONMENTS)
    if folder is None:
        pytest.skip(f"{ENVIRONMENTS} is not set: nox -s clients")
    return Path(folder)


@pytest.fixture(scope="session")
def router(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    assert real_llama.exists()
    nothing = tmp_path_factory.mktemp("broken") / "broken.gguf"
    nothing.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16))
    models = {
        "smollm2": {"model_path": smollm2, "flags": ["-c", str(2 * CONTEXT), "-np", "2", "-t", "1"]},
        "broken": {"model_path": nothing},
    }
    text = router_toml(
        models=models,
        system={"gpu_devices": [], "preload_models": ["smollm2"], "max_load_attempts": 1},
        keys=[{"name": "clients", "key": KEY, "admin": True}],
    )
    with RouterProcess(tmp_path_factory.mktemp("router"), text, environment={"PATH": os.defpath}) as router:
        wait_until(lambda: router.get("/readyz").status_code == 200, timeout_seconds=60)
        yield router


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"
