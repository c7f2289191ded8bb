import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog


@pytest.fixture(autouse=True)
def _quiet(_logs_as_before: None) -> None:
    """A flood of llama-server's log is not the test's."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder whose path is short enough for sockets; pytest's own hold the test's name."""
    with tempfile.TemporaryDirectory(prefix="tr-") as folder:
        yield Path(folder)
