"""What these tests look at, and a Prometheus of their own."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MONITORING = DEPLOY / "monitoring"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """None of what is deployed depends on the Python that runs these tests."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.once)


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
