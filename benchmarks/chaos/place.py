"""The router that things happen to: its folder, its configuration, its process, and the llama-servers below it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

import attrs
import trio

from benchmarks.chaos.line import Cut, Line
from benchmarks.chaos.questions import ALIASES, Violation
from benchmarks.machine import descendants, start_pinned, stop
from benchmarks.peers import free_port, serve_command
from tests.harness.tiny_gguf import write_tiny_llama
from tests.harness.toml import router_toml
from trio_router.config import LlamaServer

START_SECONDS: Final = 90.0
"""Of a busy machine."""
STALL_SECONDS: Final = 3.0
QUEUE_SECONDS: Final = 20.0
DRAIN_SECONDS: Final = 5.0
CONTEXT: Final = 1024
WRAPPER: Final = """#!/bin/sh
# stands for llama-server; the files say what is wrong with the next one
for no in "$CHAOS"/refuse.*; do
  if rm "$no" 2>/dev/null; then echo "error: chaos says no" >&2; exit 1; fi
done
if rm "$CHAOS/hang" 2>/dev/null; then exec sleep 1000; fi
if mv "$CHAOS/sick" "$CHAOS/sick.$$" 2>/dev/null; then
  exec "PYTHON" -I -S "$CHAOS/sick.py" "$CHAOS/sick.$$" "$CHAOS/llama-server" "$@"
fi
exec "$CHAOS/llama-server" "$@"
"""


@attrs.define(eq=False, kw_only=True)
class Place:
    """A router and its surroundings."""

    folder: Path
    runtime: Path
    """Where routers make their folders for sockets."""
    server: LlamaServer
    port: int = attrs.field(factory=free_port)
    process: "subprocess.Popen[bytes]" = attrs.field(init=False)
    down: bool = True
    """Whether the router is not there, or about to go: our doing."""
    downs: int = 0
    """How often it went."""

    @classmethod
    @contextmanager
    def prepared(cls, folder: Path, server: LlamaServer, tokenizer: Path) -> Iterator[Self]:
        """Models, the wrapper, and a first configuration; at the end no router is left."""
        with tempfile.TemporaryDirectory(prefix="chaos-") as runtime:  # short: it holds sockets
            place = cls(folder=folder, runtime=Path(runtime), server=server)
            for number, alias in enumerate(ALIASES):
                write_tiny_llama(folder / f"{alias}.gguf", tokenizer_from=tokenizer, seed=number)
            (folder / "llama-server").symlink_to(server.path)
            wrapper = folder / "wrapper"
            wrapper.write_text(WRAPPER.replace("PYTHON", sys.executable))
            (folder / "sick.py").symlink_to(Path(__file__).with_name("sick.py"))
            wrapper.chmod(0o755)
            place.configure()
            try:
                yield place
            finally:
                stop(place.process)

    def configure(self, *, context: int = CONTEXT, at_once: bool = True) -> None:
        """Write router.toml; another context is another entry for the last model, and for no other."""
        models = {
            alias: {
                "model_path": self.folder / f"{alias}.gguf",
                "flags": ["-t", "1", "--parallel", "2", "-c", str(context if alias == ALIASES[-1] else CONTEXT)],
            }
            for alias in ALIASES
        }
        system = {
            "gpu_devices": [],
            "llama_server_path": self.folder / "wrapper",
            "max_concurrent_models": 2,
            "queue_timeout_sec": QUEUE_SECONDS,
            "load_timeout_sec": 10,
            "stall_timeout_sec": STALL_SECONDS,
            "failed_retry_sec": 2,
            "drain_timeout_sec": DRAIN_SECONDS,
            "stop_at_once": at_once,
        }
        self.write(router_toml(models=models, system=system, api={"port": self.port}))

    def write(self, text: str) -> None:
        """Put another router.toml there, all at once."""
        unfinished = self.folder / "router.new"
        unfinished.write_text(text)
        unfinished.rename(self.folder / "router.toml")

    async def start(self) -> None:
        """Start a router. Raises Violation if it does not come."""
        runtime = {"XDG_RUNTIME_DIR": str(self.runtime), "TMPDIR": str(self.runtime), "CHAOS": str(self.folder)}
        runtime["XDG_STATE_HOME"] = str(self.folder / "state")
        self.process = start_pinned(
            serve_command(self.folder / "router.toml"),
            None,
            log=self.folder / "router.log",
            env={**os.environ, **self.server.environment, **runtime},
        )
        with trio.move_on_after(START_SECONDS):
            while not await self._is_well():
                if self.process.poll() is not None:
                    raise Violation(f"the router ended with {self.process.returncode}\n{self.log()[-3000:]}")
                await trio.sleep(0.02)
            self.down = False
            return
        raise Violation(f"the router is not there after {START_SECONDS:g} s\n{self.log()[-3000:]}")

    async def _is_well(self) -> bool:
        async with Line.to(self.port) as line:
            try:
                return (await line.ask("GET", "/health")).status == 200
            except (OSError, Cut):
                return False

    def log(self) -> str:
        """Of all routers so far."""
        path = self.folder / "router.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def going(self) -> None:
        """The router is about to be ended: who is cut from now on is cut by us."""
        self.down = True
        self.downs += 1

    def llama_servers(self) -> list[int]:
        """Those of the router that runs, hung and sick ones included."""
        return [pid for pid in descendants(self.process.pid) if self._is_llama_server(pid)]

    def open_files(self) -> int:
        """How many the router has."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def _is_llama_server(self, pid: int) -> bool:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return any(word.startswith(os.fsencode(self.folder)) for word in words[:4]) or words[0] == b"sleep"


def alive(pids: list[int]) -> list[int]:
    """Those that are not dead, nor dead and unburied."""
    left = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            left.append(pid)
    return left
