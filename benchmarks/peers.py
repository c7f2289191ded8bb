"""Everything that is measured: this router, what it is held against, and the backends behind them."""

import http.client
import json
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import attrs

from benchmarks.machine import Cores, descendants, find_nginx, pin, start_pinned, stop
from benchmarks.programs import compiled
from tests.harness.tiny_gguf import write_header_only
from tests.harness.toml import router_toml
from trio_router.config import LlamaServer

READY_SECONDS = 60.0
LOWEST_PORT = 10_240
MODEL = "m"
SLOTS = 4096
"""So many that no request waits for one: the way is measured, not the queue."""


@attrs.frozen(kw_only=True)
class Peer:
    """A server that takes requests for `MODEL` now."""

    name: str
    target: str
    """HOST:PORT, or the path of a Unix socket."""
    pids: list[int]
    """The processes of the server itself, none of its backends."""


@attrs.frozen(kw_only=True)
class Place:
    """A folder, and the cores to run on (None: anywhere)."""

    folder: Path
    cores: Cores | None

    @property
    def server_core(self) -> int | None:
        return None if self.cores is None else self.cores.server

    @property
    def load_core(self) -> int | None:
        return None if self.cores is None else self.cores.load

    def log(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.log"


Start = Callable[[Place], AbstractContextManager[Peer]]


@contextmanager
def a_place(cores: Cores | None) -> Iterator[Place]:
    """A folder with a short name: sockets live in it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Place(folder=Path(folder), cores=cores)


def free_port() -> int:
    """A port that was free a moment ago, and that the kernel gives to nobody who connects."""
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(LOWEST_PORT, first_given)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # somebody has it
                continue
        return port


def ask(
    target: str, path: str, body: Mapping[str, Any] | None = None, seconds: float = READY_SECONDS
) -> tuple[int, bytes]:
    """One request, GET without a body: status and answer. Raises OSError, http.client.HTTPException."""
    connection = http.client.HTTPConnection("127.0.0.1", timeout=seconds)
    if target.startswith("/"):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(seconds)
        connection.sock.connect(target)
    else:
        connection.port = int(target.rpartition(":")[2])
    try:
        headers = {"content-type": "application/json", "connection": "close"}
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def until_answered(target: str, path: str, body: Mapping[str, Any] | None = None, *, log: Path | None = None) -> None:
    """Return once `path` answers with 200."""
    give_up = time.monotonic() + READY_SECONDS
    seen: object = None
    while time.monotonic() < give_up:
        try:
            seen = status, _ = ask(target, path, body)
            if status == 200:
                return
        except (OSError, http.client.HTTPException) as error:
            seen = error
        time.sleep(0.01)  # nothing tells of a peer that is ready
    last = log.read_text(errors="replace")[-2000:] if log is not None and log.exists() else ""
    raise SystemExit(f"{target}{path} is not ready after {READY_SECONDS:.0f} s: {seen}\n{last}")


# --- backends -------------------------------------------------------------------------------------


@contextmanager
def mock(place: Place, *, unix: bool = False) -> Iterator[Peer]:
    """The mock backend by itself: what everybody's overhead is over."""
    name = "direct unix" if unix else "direct"
    port = free_port()
    target = str(place.folder / "mock.sock") if unix else f"127.0.0.1:{port}"
    where = ["--host", target] if unix else ["--host", "127.0.0.1", "--port", str(port)]
    process = start_pinned([compiled("mock_backend"), *where], place.load_core, log=place.log(name))
    try:
        until_answered(target, "/health", log=place.log(name))
        yield Peer(name=name, target=target, pids=[process.pid])
    finally:
        stop(process)


@contextmanager
def llama_server(place: Place, server: LlamaServer, model: Path, flags: list[str]) -> Iterator[Peer]:
    """A real llama-server by itself, on the backends' core."""
    port = free_port()
    target = f"127.0.0.1:{port}"
    command = [server.path, "--host", "127.0.0.1", "--port", port, "--model", model, "--alias", MODEL, *flags]
    process = start_pinned(command, place.load_core, log=place.log("child"), env=environment(server))
    try:
        until_answered(target, "/health", log=place.log("child"))
        yield Peer(name="direct", target=target, pids=[process.pid])
    finally:
        stop(process)


def environment(server: LlamaServer) -> dict[str, str]:
    """Ours less what llama-server would take for flags, and what its package asks for."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")},
        **server.environment,
    }


# --- routers --------------------------------------------------------------------------------------


def write_config(
    place: Place, name: str, models: Mapping[str, Any], system: Mapping[str, Any], api: Mapping[str, Any] | None = None
) -> tuple[Path, str]:
    """A router.toml, and the address it says."""
    port = free_port()
    text = router_toml(models=models, system={"gpu_devices": [], **system}, api={"port": port, **(api or {})})
    path = place.folder / f"{name.replace(' ', '-')}.toml"
    path.write_text(text)
    return path, f"127.0.0.1:{port}"


def serve_command(config: Path) -> list[str | Path]:
    """How our router is started. A benchmark may set flags in `TRIO_ROUTER_BENCH_PYTHON`, `-O` for example."""
    extra = os.environ.get("TRIO_ROUTER_BENCH_PYTHON", "").split()
    return [sys.executable, *extra, "-m", "trio_router", "serve", "--config", config]


@contextmanager
def trio_router(
    place: Place,
    *,
    name: str = "trio_router",
    models: Mapping[str, Any] | None = None,
    system: Mapping[str, Any] | None = None,
    body: Mapping[str, Any] | None = None,
    path: str = "/v1/chat/completions",
) -> Iterator[Peer]:
    """This project on one core, with `MODEL` loaded (`body` asks for it) and its llama-servers moved to the other."""
    if models is None:
        model = write_header_only(place.folder / "header.gguf")
        models = {MODEL: {"model_path": model, "flags": ["--parallel", str(SLOTS)]}}
        system = {"llama_server_path": compiled("mock_backend"), **(system or {})}
    config, target = write_config(place, name, models, system or {})
    process = start_pinned(serve_command(config), place.server_core, log=place.log(name))
    try:
        until_answered(target, "/health", log=place.log(name))
        if body is not None or MODEL in models:
            until_answered(target, path, body or {"model": MODEL}, log=place.log(name))
        if place.load_core is not None:
            pin(descendants(process.pid), place.load_core)
        yield Peer(name=name, target=target, pids=[process.pid])
    finally:
        stop(process)


NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log crit;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  client_body_temp_path {folder}/nginx-body;
  proxy_temp_path {folder}/nginx-proxy;
  fastcgi_temp_path {folder}/nginx-fastcgi;
  uwsgi_temp_path {folder}/nginx-uwsgi;
  scgi_temp_path {folder}/nginx-scgi;
  upstream backend {{ server {backend}; keepalive 2048; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    keepalive_requests 1000000000;
    client_max_body_size 100m;
    location / {{
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""


@contextmanager
def nginx(place: Place, backend: Peer, *, name: str = "nginx") -> Iterator[Peer]:
    """nginx before `backend`: one worker, upstream connections kept, nothing buffered."""
    program = find_nginx()
    assert program is not None
    port = free_port()
    address = f"unix:{backend.target}" if backend.target.startswith("/") else backend.target
    folder = place.folder / name.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)  # started by root, its worker is somebody else
    place.folder.chmod(0o755)
    config = folder / "nginx.conf"
    user = "user root;\n" if os.geteuid() == 0 else ""
    config.write_text(user + NGINX.format(folder=folder, backend=address, port=port))
    process = start_pinned([program, "-e", folder / "start.log", "-c", config], place.server_core, log=place.log(name))
    try:
        until_answered(f"127.0.0.1:{port}", "/health", log=place.log(name))
        yield Peer(name=name, target=f"127.0.0.1:{port}", pids=[process.pid, *descendants(process.pid)])
    finally:
        stop(process)


@contextmanager
def bare_trio(place: Place, backend: Peer) -> Iterator[Peer]:
    """Bytes passed on by trio to `backend`, on TCP, and nothing else: the floor of what we can add."""
    name, port = "bare trio", free_port()
    command = [sys.executable, "-m", "benchmarks.bare_trio", str(port), backend.target.rpartition(":")[2]]
    process = start_pinned(command, place.server_core, log=place.log(name))
    try:
        until_answered(f"127.0.0.1:{port}", "/health", log=place.log(name))
        yield Peer(name=name, target=f"127.0.0.1:{port}", pids=[process.pid])
    finally:
        stop(process)


@contextmanager
def llama_server_router(
    place: Place,
    server: LlamaServer,
    models: Mapping[str, Path],
    flags: list[str],
    *,
    most: int,
    body: Mapping[str, Any],
    path: str,
) -> Iterator[Peer]:
    """llama-server's own router mode, with real llama-servers as its children; `flags` are theirs."""
    port = free_port()
    preset = place.folder / "preset.ini"
    lines = []
    for alias, model in models.items():
        lines += [f"[{alias}]", f"model = {model}"]
    preset.write_text("\n".join(lines) + "\n")
    command = [
        server.path, "--host", "127.0.0.1", "--port", port, "--models-preset", preset, "--models-max", most, *flags,
    ]  # fmt: skip
    name = "llama-server router"
    process = start_pinned(command, place.server_core, log=place.log(name), env=environment(server))
    try:
        until_answered(f"127.0.0.1:{port}", "/health", log=place.log(name))
        until_answered(f"127.0.0.1:{port}", path, body, log=place.log(name))
        if place.load_core is not None:
            pin(descendants(process.pid), place.load_core)
        yield Peer(name=name, target=f"127.0.0.1:{port}", pids=[process.pid])
    finally:
        stop(process)


LLAMA_SWAP = """
healthCheckTimeout: 60
logLevel: error
models:
  {model}:
    cmd: {mock} --host 127.0.0.1 --port ${{PORT}}
    concurrencyLimit: 100000
"""


def find_llama_swap() -> str | None:
    """llama-swap takes part when it is on PATH."""
    return shutil.which("llama-swap")


@contextmanager
def llama_swap(place: Place) -> Iterator[Peer]:
    """llama-swap before a mock backend; its limit of 10 at once is raised."""
    program = find_llama_swap()
    assert program is not None
    config = place.folder / "llama-swap.yaml"
    config.write_text(LLAMA_SWAP.format(model=MODEL, mock=compiled("mock_backend")))
    port = free_port()
    command = [program, "--config", config, "--listen", f"127.0.0.1:{port}"]
    process = start_pinned(command, place.server_core, log=place.log("llama-swap"))
    try:
        target = f"127.0.0.1:{port}"
        until_answered(target, "/v1/chat/completions", {"model": MODEL}, log=place.log("llama-swap"))
        if place.load_core is not None:
            pin(descendants(process.pid), place.load_core)
        yield Peer(name="llama-swap", target=target, pids=[process.pid])
    finally:
        stop(process)
