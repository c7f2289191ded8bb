"""A fake llama-server that a test talks to directly."""

import contextlib
import socket
import subprocess
from typing import Any

import httpx

from tests.harness.processes import wait_until


class Fake:
    """One fake server on a Unix socket, without a router before it."""

    def __init__(self, command: list[str], path: str, env: dict[str, str] | None = None) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [*command, "--host", path],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(
            transport=httpx.HTTPTransport(uds=self.path), base_url="http://fake", trust_env=False, timeout=10, **options
        )

    def health(self) -> int:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.settimeout(2)
            probe.connect(self.path)  # not with httpx: httpcore leaks the socket when this fails
            probe.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
            return int(probe.recv(1000).split()[1])
        return 0

    def ready(self) -> "Fake":
        wait_until(lambda: self.health() == 200)
        return self

    def post(self, path: str, body: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def said(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
