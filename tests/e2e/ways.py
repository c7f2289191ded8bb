"""The real llama-server bare, and behind routers, to compare what they answer."""

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx

from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess
from tests.harness.toml import router_toml

QUART = {"TE": "trailers"}
"""Any header that asks for more than the plain case."""
OURS = {
    "content-length",
    "x-request-id",
    "request-id",
    "x-queue-time-ms",
    "x-queue-position",
    "x-accel-buffering",
    "cache-control",
}
THEIRS = {"server", "keep-alive", "date", "connection", "access-control-allow-origin"}
"""Of llama-server's headers: hop-by-hop, or its own opinion on web pages."""
CLOCK = re.compile(
    rb'"(?:created|created_at|completed_at)":\d+|"(?:id|item_id|call_id)":"[^"]*"|"timings":\{[^{}]*\}'
    rb'|"(?:t_[a-z_]+|[a-z_]*_ms|[a-z_]*_per_second|tokens_cached|generation_settings)":[-\d.e]+'
)


@attrs.frozen
class Ways:
    """Where to ask."""

    bare: str
    router: str
    passing: str
    """A router that sends every request as it came (`system.stop_at_once = false`)."""

    log: Callable[[], str]
    """Of the router."""

    def ask(
        self, path: str, body: Any = None, *, passing: bool = True, twice: bool = False, **more: Any
    ) -> list[httpx.Response]:
        """The answers of the bare server and of both ways of both routers, or of the first alone.

        With `twice` each is asked before: what it still knows of the prompt is the same then. `more` goes to httpx.
        """
        found = []
        routers = [self.router, self.passing] if passing else [self.router]
        ways = [(router, headers) for router in routers for headers in ({}, QUART)]
        for base, headers in ((self.bare, {}), *ways):
            with httpx.Client(trust_env=False, timeout=60) as client:
                if twice:
                    client.post(base + path, json=body, headers=headers, **more)
                found.append(client.post(base + path, json=body, headers=headers, **more))
        return found


@contextmanager
def open_ways(folder: Path, llama_server: Path, model: Path, flags: list[str]) -> Iterator[Ways]:
    """All of them, with the same model and flags."""
    models = {"smollm2": {"model_path": model, "flags": flags}}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [llama_server, "--model", model, "--alias", "smollm2", *flags, "--host", "127.0.0.1", "--port", str(port)]
    environment = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(llama_server.parent)}
    with (
        (folder / "bare.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment) as bare,
        RouterProcess(folder, router_toml(models=models, system={"gpu_devices": []})) as router,
        RouterProcess(
            folder / "passing", router_toml(models=models, system={"gpu_devices": [], "stop_at_once": False})
        ) as passing,
    ):

        def ready() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(ready, timeout_seconds=60)
            yield Ways(f"http://127.0.0.1:{port}", router.url, passing.url, lambda: router.stderr)
        finally:
            bare.terminate()


def assert_same(answers: list[httpx.Response]) -> None:
    """The first is llama-server's own; the others say the same."""
    bare, *ours = answers
    for answer in ours:
        assert answer.status_code == bare.status_code
        assert CLOCK.sub(b"#", answer.content) == CLOCK.sub(b"#", bare.content)
        passed = {name: value for name, value in answer.headers.items() if name not in OURS | THEIRS}
        expected = {name: value for name, value in bare.headers.items() if name not in OURS | THEIRS}
        assert passed == expected
        assert answer.headers["x-request-id"]
        assert int(answer.headers.get("content-length", len(answer.content))) == len(answer.content)
    names = [set(answer.headers) for answer in ours]
    assert names == names[:1] * len(names)
