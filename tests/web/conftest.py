import pytest

from tests.backend.conftest import _quiet, sockets
from tests.web.site import WAYS, Headers

__all__ = ["_quiet", "sockets"]


@pytest.fixture(params=WAYS)
def way(request) -> Headers:
    """What a request has to say to come in that way."""
    return list(WAYS[request.param])
