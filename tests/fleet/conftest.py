import logging

import pytest
import structlog

from tests.fleet.fake_servers import FakeServers


@pytest.fixture(autouse=True)
def _quiet(_logs_as_before: None) -> None:
    """Thousands of requests would write thousands of lines."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture
def servers() -> FakeServers:
    """Fake llama-servers that load in one second."""
    return FakeServers()
