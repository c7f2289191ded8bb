"""Standard error that is full, gone, slow, or a test's."""

import io
import os
import socket
from pathlib import Path

import pytest

from trio_router.telemetry.output import KEPT_BYTES, Output

LINE = "x" * 999 + "\n"


def test_a_file(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        out = Output.of(file)
        out.write("one\n")
        out.write("tw\udc80o\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntw\\udc80o\n"


def test_something_that_is_no_file() -> None:
    text = io.StringIO()
    Output.of(text).write("one\n")
    assert text.getvalue() == "one\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_raises_nothing_and_keeps_a_bounded_rest() -> None:
    with open("/dev/full", "w") as file:  # noqa: PTH123
        out = Output.of(file)
        for _ in range(3000):
            out.write(LINE)
        assert len(out._kept) <= KEPT_BYTES
        assert out.lost == 3000 - KEPT_BYTES // len(LINE)
        out._kept.clear()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_who_reads_slowly_makes_nobody_wait(kind: str) -> None:
    if kind == "pipe":
        reading, writing = os.pipe()
        ours, theirs = None, None
    else:
        ours, theirs = socket.socketpair()
        reading, writing = theirs.fileno(), ours.fileno()
    with os.fdopen(writing, "w", closefd=kind == "pipe") as file:
        out = Output.of(file)
        for _ in range(3000):
            out.write(LINE)  # would stand still for ever
        assert out.lost > 1000
        lost = out.lost
        got = b""
        while out._kept:
            got += os.read(reading, 1 << 16)
            out.flush()
        out.write("at last\n")
        assert out.lost == 0
        os.set_blocking(reading, False)
        try:
            while piece := os.read(reading, 1 << 16):
                got += piece
        except BlockingIOError:
            pass
        lines = got.decode().splitlines(keepends=True)
        assert lines[-2:] == [f"--- {lost} messages lost: they were not taken ---\n", "at last\n"]
        assert lines[:-2] == [LINE] * (3000 - lost)
        assert os.get_blocking(writing), "the flag is not ours alone"
        out.close()
    if kind == "pipe":
        os.close(reading)
    for sock in (ours, theirs):
        if sock is not None:
            sock.close()


def test_who_reads_is_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as file:
        Output.of(file).write("nobody hears\n")
