"""Whose requests: one counter by the name of the key, never the key itself. A sink of requests."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter

from trio_router.telemetry.events import RequestFinished


class KeyMetrics:
    """Counts requests that came with a key."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "router_key_requests_total", "Inference requests that ended, by whose they were.", ["key", "outcome"],
            registry=registry,
        )  # fmt: skip

    def __call__(self, ended: Sequence[RequestFinished]) -> None:
        """Count those that have one."""
        for event in ended:
            if event.key is not None:
                self._requests.labels(event.key, event.outcome.word).inc()
