"""What these tests look at, and a Prometheus of their own."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MONITORING = DEPLOY / "monitoring"


def tool(name: str, source: str) -> str:
    """Where a program is; skips the test where it is not."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: {source}")
    return found


@pytest.fixture
def monitoring(tmp_path: Path) -> Path:
    """A copy of deploy/monitoring, with a key file, to be run and changed."""
    folder = tmp_path / "monitoring"
    shutil.copytree(MONITORING, folder)
    (folder / "router-api-key").write_text("none")
    return folder
