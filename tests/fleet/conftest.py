import logging
from collections.abc import Iterator

import pytest
import structlog

from tests.fleet.fake_servers import FakeServers


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of requests would write thousands of lines."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=False
    )
    yield
    structlog.configure(**before)


@pytest.fixture
def servers() -> FakeServers:
    """Fake llama-servers that load in one second."""
    return FakeServers()
