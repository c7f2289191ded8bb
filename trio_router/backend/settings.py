"""The bounds that one llama-server is looked after by."""

import math

import attrs

from trio_router.config.schema import SystemConfig


@attrs.frozen(kw_only=True)
class SupervisorSettings:
    """The bounds of router.toml that concern one backend."""

    load_timeout_seconds: float
    request_timeout_seconds: float
    health_interval_seconds: float
    max_load_attempts: int
    stall_timeout_seconds: float = math.inf
    failed_retry_seconds: float = math.inf

    @classmethod
    def of(cls, system: SystemConfig) -> "SupervisorSettings":
        """Those of `[system]`."""
        return cls(
            load_timeout_seconds=system.load_timeout_sec,
            request_timeout_seconds=system.request_timeout_sec,
            health_interval_seconds=system.health_interval_sec,
            max_load_attempts=system.max_load_attempts,
            stall_timeout_seconds=system.stall_timeout_sec,
            failed_retry_seconds=system.failed_retry_sec,
        )
