from tests.backend.conftest import _quiet, sockets

__all__ = ["_quiet", "sockets"]
