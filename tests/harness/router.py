"""A `trio-router serve` in a process of its own, driven through its public port."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.harness.processes import command_line, is_alive, marked, wait_until

READY_LINE = re.compile(r"http://(127\.0\.0\.1|\[::1\]|localhost):(\d+)")
START_SECONDS = 30.0
STOP_SECONDS = 15.0
MARK = "TRIO_ROUTER_TEST_RUN"
"""Environment variable that a router's children inherit, by which they are found when they are orphans."""
KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "HOME", "LANG", "TMPDIR", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a router under test gets to see: nothing of ours that could change its behaviour."""
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    return {**kept, "PYTHONUNBUFFERED": "1", **(extra or {})}


class RouterProcess:
    """Starts on entry and is ready then; on exit it is stopped if it still runs.

    Unless the test stopped it by other means, it has to end with code 0 after SIGTERM; whatever happened, no process
    of it may be left. `stderr` without a traceback is part of every test: set `may_log_traceback` where one is meant.
    """

    def __init__(
        self,
        folder: Path,
        config: str,
        *,
        environment: Mapping[str, str] | None = None,
        arguments: tuple[str, ...] = (),
        shell: str = 'exec "$@"',
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config_path = folder / "router.toml"
        self.config_path.write_text(config)
        self.stderr_path = folder / "stderr.log"
        self.command = [sys.executable, "-m", "trio_router", "serve", "--config", str(self.config_path), "--port", "0"]
        self.command += arguments
        if shell != 'exec "$@"':  # a limit, or another place for what it says
            self.command = ["/bin/sh", "-c", shell, "sh", *self.command]
        self._run = uuid.uuid4().hex
        learned = {"XDG_STATE_HOME": str(self.folder / "state")}  # nothing that another test learned
        self.environment = clean_environment({**learned, **(environment or {}), MARK: self._run})
        self.may_log_traceback = False
        self.url = ""
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped_by_test = False

    def process_files(self) -> Iterator[Path]:
        """What it has open."""
        return Path(f"/proc/{self.process.pid}/fd").iterdir()

    # --- life ----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with self.stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            self._read_ready_line()
        except BaseException:
            self._end_for_good()
            raise
        return self

    def _read_ready_line(self) -> None:
        process = self.process
        assert process.stdout is not None
        end = time.monotonic() + START_SECONDS
        text = b""
        while b"\n" not in text:
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
            data = os.read(process.stdout.fileno(), 4096) if readable else b""
            if not data:
                how = f"ended with {process.wait(5)}" if readable else f"said nothing in {START_SECONDS} s"
                raise RuntimeError(f"the router {how}: {text!r}\n{self.stderr}")
            text += data
        line = text.decode()
        found = READY_LINE.search(line)
        assert found, f"no URL in the ready line: {line!r}"
        assert line.count("\n") == 1, f"more than a ready line: {line!r}"
        self.url, self.port = found[0], int(found[2])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code: int | None = None
        left: set[int] = set()
        slow = False
        try:
            if not self._stopped_by_test:
                self.process.send_signal(signal.SIGTERM)
            try:
                code = self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                slow = True
                if error is None:
                    raise AssertionError(f"the router runs on, {STOP_SECONDS} s after SIGTERM\n{self.stderr}") from None
            else:
                with suppress(TimeoutError):
                    wait_until(lambda: not self.children(), timeout_seconds=2.0)
                left = self.children()
        finally:
            told = {pid: command_line(pid) for pid in left}
            self._end_for_good()
        if error is not None:
            error.add_note(f"--- router.toml\n{self.config_path.read_text()}\n--- stderr (end)\n{self.stderr[-6000:]}")
            if slow:
                error.add_note("and the router did not stop after SIGTERM")
            return
        assert not told, f"left behind: {told}\n{self.stderr}"
        assert self._stopped_by_test or code == 0, f"exit code {code}\n{self.stderr}"
        assert self.may_log_traceback or "Traceback" not in self.stderr, self.stderr

    def _end_for_good(self) -> None:
        """Whatever the test proved or not: nothing of it stays."""
        process = self.process
        process.kill()
        process.wait()
        for pid in self.children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process.stdout is not None:
            process.stdout.close()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The router's own."""
        assert self._process is not None, "not started"
        return self._process

    @property
    def pid(self) -> int:
        """The router's own."""
        return self.process.pid

    def terminate(self) -> None:
        """SIGTERM. The test then looks at the exit code itself, with `wait`."""
        self._stopped_by_test = True
        self.process.send_signal(signal.SIGTERM)

    def interrupt(self) -> None:
        """SIGINT, likewise."""
        self._stopped_by_test = True
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL: it cannot clean up."""
        self._stopped_by_test = True
        self.process.kill()

    def wait(self, timeout_seconds: float = STOP_SECONDS) -> int:
        """The exit code, negative for a signal."""
        return self.process.wait(timeout_seconds)

    # --- looking -------------------------------------------------------------------------------------

    @property
    def stderr(self) -> str:
        """The log so far."""
        return self.stderr_path.read_text(errors="replace")

    def children(self) -> set[int]:
        """Living processes that this router started, however they are related to it now; zombies are not alive."""
        return marked(f"{MARK}={self._run}") - {self.pid}

    def servers(self) -> dict[int, str]:
        """The llama-servers among `children`: pid -> alias."""
        found = {}
        for pid in self.children():
            arguments = command_line(pid)
            if "--alias" in arguments and "-c" not in arguments[:5]:  # `-c`: still the guard before its exec
                found[pid] = arguments[arguments.index("--alias") + 1]
        return found

    def status(self, alias: str) -> dict[str, Any]:
        """The status object of one model."""
        answer = self.get(f"/v1/models/{alias}/status")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait_for_status(self, alias: str, *, timeout_seconds: float = 10.0, **wanted: Any) -> dict[str, Any]:
        """The status object of one model once it shows what is wanted: `status="ready"`, `queued=3`."""

        def reached() -> dict[str, Any] | None:
            now = self.status(alias)
            return now if all(now[name] == value for name, value in wanted.items()) else None

        found = wait_until(reached, timeout_seconds=timeout_seconds, what=f"{alias}: {wanted}")
        assert found is not None
        return found

    def is_running(self) -> bool:
        """Whether the router's process is alive."""
        return is_alive(self.pid)

    # --- talking -------------------------------------------------------------------------------------

    def client(self, **options: Any) -> httpx.Client:
        """To be used in a `with`."""
        return httpx.Client(**{"base_url": self.url, "trust_env": False, "timeout": 30.0, **options})

    def async_client(self, **options: Any) -> httpx.AsyncClient:
        """To be used in an `async with`, on trio; without a limit on connections."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncClient(
            **{"base_url": self.url, "trust_env": False, "timeout": 30.0, "limits": limits, **options}
        )

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request on a connection of its own."""
        timeout = options.pop("timeout", 30.0)
        with self.client(timeout=timeout) as client:
            return client.request(method, path, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET."""
        return self.request("GET", path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        """POST, usually of JSON."""
        return self.request("POST", path, **({"json": json} if json is not None else {}), **options)

    def chat(self, model: str, *, fake: Mapping[str, Any] | None = None, **options: Any) -> httpx.Response:
        """A chat completion; `fake` goes to the fake llama-server."""
        headers = options.pop("headers", None)
        timeout = options.pop("timeout", 30.0)
        return self.post(
            "/v1/chat/completions", chat_body(model, fake=fake, **options), headers=headers, timeout=timeout
        )

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10.0)

    def start_raw(
        self, body: bytes, *, path: str = "/v1/chat/completions", headers: str = "", by_quart: bool = False
    ) -> socket.socket:
        """A connection on which a whole POST was sent and nothing was read: a client to leave with `close`.

        `by_quart`: something other than inference was asked on it before, so that the leaner way in has given
        the connection to Quart.
        """
        connection = self.connect()
        if by_quart:
            connection.sendall(f"HEAD /nowhere HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode())
            seen = b""
            while b"\r\n\r\n" not in seen:
                seen += connection.recv(4096) or b"\r\n\r\n"
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n{headers}"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def in_background(self, model: str, **options: Any) -> "Pending":
        """A chat completion in a thread."""
        return Pending(self, model, options)


def chat_body(model: Any, *, fake: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A chat completion's body."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Grüße"}], **more}
    if fake is not None:
        body["fake"] = dict(fake)
    return body


class Pending:
    """A request under way in a thread; `answer` waits for it."""

    def __init__(self, router: RouterProcess, model: str, options: dict[str, Any]) -> None:
        self._answer: httpx.Response | Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(router, model, options), daemon=True)
        self._thread.start()

    def _run(self, router: RouterProcess, model: str, options: dict[str, Any]) -> None:
        try:
            self._answer = router.chat(model, **options)
        except httpx.HTTPError as error:
            self._answer = error

    @property
    def done(self) -> bool:
        """Whether an answer, or the connection's end, is there."""
        return self._answer is not None

    def answer(self, timeout_seconds: float = 20.0) -> httpx.Response:
        """The answer; raises the httpx error that ended it."""
        self._thread.join(timeout_seconds)
        if self._answer is None:
            raise TimeoutError(f"no answer in {timeout_seconds} s")
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer
