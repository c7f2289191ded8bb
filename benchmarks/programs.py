"""The two C programs, compiled when they are needed: a backend that computes nothing, and a load generator."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import attrs

from benchmarks.machine import Cores, Usage, in_quiet, usage

HERE = Path(__file__).parent


@cache
def compiled(name: str) -> Path:
    """The program made of `name`.c; kept under a name that its source decides."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("the benchmarks need a C compiler: cc")
    source = HERE / f"{name}.c"
    folder = Path(tempfile.gettempdir()) / f"trio-router-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    program = folder / f"{name}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not program.exists():
        unfinished = program.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-O2", "-o", unfinished, source], check=True)
        unfinished.rename(program)
    return program


@attrs.frozen(kw_only=True)
class Load:
    """One run of the load generator; the meaning of the arguments is in load.c."""

    mode: str
    target: str
    connections: int
    body: dict[str, Any]
    seconds: float = 2.0
    warmup: float = 0.3
    path: str = "/v1/chat/completions"
    rate: float = 0.0
    chunks: int = 0
    ramp: float = 0.0
    loop: bool = False
    padding_bytes: int = 0
    """A body of this size: text after what the backend looks for."""

    def start(self, core: int) -> subprocess.Popen[bytes]:
        """Begin; `result` waits for the end."""
        body = dict(self.body)
        if self.padding_bytes:
            body["messages"] = [{"role": "user", "content": "lorem ipsum " * (self.padding_bytes // 12)}]
        command = [
            "taskset", "-c", str(core), compiled("load"), self.mode, "--target", self.target, "-c", self.connections,
            "--seconds", self.seconds, "--warmup", self.warmup, "--path", self.path, "--rate", self.rate,
            "--chunks", self.chunks, "--ramp", self.ramp, "--body-file", "-", *(["--loop"] if self.loop else []),
        ]  # fmt: skip
        process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        process.stdin.write(json.dumps(body).encode())
        process.stdin.close()
        process.stdin = None  # or communicate() would use it
        return process

    def run(self, cores: Cores, pids: list[int]) -> "Measured":
        """Do it, and say what `pids` used meanwhile."""
        before = usage(pids)
        result = finish(self.start(cores.load))
        return Measured(result=result, used=usage(pids).since(before))

    def run_in_quiet(self, cores: Cores, pids: list[int], patience_seconds: float) -> "Measured":
        """The same, tried again while others use the machine."""
        return in_quiet(lambda: self.run(cores, pids), patience_seconds)


def finish(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What the load generator found."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"load ended with status {process.returncode}")
    found: dict[str, Any] = json.loads(output)
    return found


@attrs.frozen(kw_only=True)
class Measured:
    """A run's result, and what the measured server used from its start to its end."""

    result: dict[str, Any]
    used: Usage

    @property
    def answered(self) -> int:
        """Answers with 200, those of the warm-up included."""
        return int(self.result["statuses"].get("200", 0))

    @property
    def cpu_us(self) -> float:
        """Of the server, for each answer."""
        return self.used.cpu_seconds / max(1, self.answered) * 1e6

    @property
    def others(self) -> float:
        """How many cores' worth of time was used by who has nothing to do with us."""
        return self.used.others
