"""A client in a process of its own: its own HOME, no way out but to the router, and a limit in time."""

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NOWHERE = "http://127.0.0.1:9"
"""Discards what is sent, if anybody listens at all: the proxy to everything but this machine."""
OFFLINE = {
    **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"), NOWHERE),
    **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
}
LIMIT_SECONDS = 90.0


class Program:
    """Starts on entry; on exit it is killed, with all that it started, if it still runs."""

    def __init__(self, command: Sequence[str | Path], home: Path, environment: Mapping[str, str] | None = None) -> None:
        self.command = [str(part) for part in command]
        self.home = home
        self.environment = {
            "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(home), "TMPDIR": str(home), "TERM": "dumb",
            "XDG_CONFIG_HOME": f"{home}/.config", "XDG_CACHE_HOME": f"{home}/.cache", "XDG_DATA_HOME": f"{home}/.data",
            **OFFLINE, **(environment or {}),
        }  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.said: list[str] = []
        self.stderr_path = home / "stderr"

    def __enter__(self) -> Self:
        self.home.mkdir(parents=True, exist_ok=True)
        with self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                self.command, cwd=self.home, env=self.environment, start_new_session=True, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.said.append(line)
                self.lines.put(line)
        self.lines.put(None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(10)
        if self.process.stdin is not None:
            self.process.stdin.close()
        if error is not None:
            error.add_note(f"--- said\n{self.output[-4000:]}\n--- stderr\n{self.stderr[-4000:]}")

    @property
    def output(self) -> str:
        """What it has said so far."""
        return "".join(self.said)

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    def line(self, timeout_seconds: float = LIMIT_SECONDS) -> str:
        """The next line it says."""
        try:
            said = self.lines.get(timeout=timeout_seconds)
        except queue.Empty:
            raise TimeoutError(f"it said nothing for {timeout_seconds:g} s") from None
        assert said is not None, f"it ended with {self.process.wait(10)}"
        return said

    def step(self) -> dict[str, Any]:
        """The next line, which is JSON."""
        found: dict[str, Any] = json.loads(self.line())
        return found

    def go_on(self) -> None:
        """Let it take its next step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def say_no_more(self) -> None:
        """The end of its standard input, which some wait for before they begin."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self, timeout_seconds: float = LIMIT_SECONDS) -> int:
        """Wait for it; its exit status."""
        self.say_no_more()
        code = self.process.wait(timeout_seconds)
        self._reader.join(10)
        return code

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)
