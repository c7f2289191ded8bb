"""A machine that has no more of something: said clearly, and served where it can be."""

import os
import socket
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.router import chat_body

pytestmark = pytest.mark.process

FILES = 128


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_the_log(start_router: StartRouter) -> None:
    router = start_router(shell='exec "$@" 2>/dev/full', qwen=[])
    assert router.chat("qwen").status_code == 200
    assert router.post("/v1/models/eject", {"model": "qwen"}).status_code == 200
    assert router.chat("qwen").status_code == 200


def test_nobody_reads_the_log(start_router: StartRouter, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # it holds 64 KiB
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        router = start_router(shell=f'exec "$@" 2>{pipe}', qwen=["-np", "8"])
        with httpx.Client() as client:
            for _ in range(700):
                assert client.post(f"{router.url}/v1/chat/completions", json=chat_body("qwen")).status_code == 200
        assert len(os.read(reading, 1 << 20)) > 30_000
    finally:
        os.close(reading)


def test_more_connections_than_files(start_router: StartRouter) -> None:
    router = start_router(shell=f'ulimit -n {FILES}; exec "$@"', one=[], two=[])
    assert router.chat("one").status_code == 200
    idle = [socket.create_connection(("127.0.0.1", router.port)) for _ in range(FILES)]
    try:
        wait_until(lambda: "cannot accept" in router.stderr)
        # who is connected is served, also by a model that has yet to be loaded
        raw = b'{"model":"two","messages":[]}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
        idle[0].settimeout(20)
        idle[0].sendall(head.encode() + raw)
        assert idle[0].recv(12) == b"HTTP/1.1 200"
        before = time.clock_gettime(process_clock(router.process.pid))
        time.sleep(1)
        assert time.clock_gettime(process_clock(router.process.pid)) - before < 0.5, "it spins"
    finally:
        for each in idle:
            each.close()
    assert router.chat("one").status_code == 200
    assert router.stderr.count("cannot accept") < 10


def process_clock(pid: int) -> int:
    """As clock_getcpuclockid(3) makes it."""
    return (~pid << 3) | 2


def test_the_port_is_taken(start_router: StartRouter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match="cannot listen"):
            start_router(arguments=("--port", str(port)), qwen=[])


def test_the_folder_for_sockets_cannot_be_written(start_router: StartRouter, tmp_path: Path) -> None:
    """A path that is no folder stands for one that cannot be written: root writes anywhere."""
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="trio-router: "):
        start_router(environment={"TMPDIR": str(tmp_path / "file"), "XDG_RUNTIME_DIR": str(tmp_path / "file")}, qwen=[])


@pytest.mark.parametrize("state", ["no folder", "no JSON"])
def test_state_that_cannot_be_kept_or_read_is_done_without(
    start_router: StartRouter, tmp_path: Path, state: str
) -> None:
    place = tmp_path / "state"
    if state == "no folder":
        place.touch()
    else:
        place.mkdir()
        (place / "memory.json").write_text("{half")
    router = start_router(qwen=[], system={"state_dir": place})
    assert router.chat("qwen").status_code == 200
    wait_until(lambda: "what was learned cannot be read" in router.stderr)
