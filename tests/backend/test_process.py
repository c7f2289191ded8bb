import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.backend.peer import descriptors, no_files_left, until
from tests.harness.processes import command_line, is_alive, memory_bytes, wait_until
from trio_router.backend.logtail import MAX_LINES
from trio_router.backend.process import ServerProcess, is_exiting

pytestmark = pytest.mark.process

ENVIRONMENT = {"PATH": os.environ["PATH"]}
ROUTER = """
import os, sys, trio
from trio_router.backend.process import ServerProcess, is_exiting

async def main():
    process = ServerProcess.spawn(["/bin/sleep", "1000"], os.environ)
    print(process.pid, flush=True)
    await trio.to_thread.run_sync(lambda: None)   # trio's thread cache retires its threads after 10 s
    await trio.sleep(1000)

trio.run(main)
"""


def spawn(script: str) -> ServerProcess:
    return ServerProcess.spawn(["/bin/sh", "-c", script], ENVIRONMENT)


@asynccontextmanager
async def running(script: str) -> AsyncIterator[ServerProcess]:
    """A child whose log is read; whatever the test did, it is gone afterwards."""
    async with trio.open_nursery() as nursery:
        process = spawn(script)
        nursery.start_soon(process.read_log_until_stopped, "qwen")
        try:
            yield process
        finally:
            await process.stop_within(0)


def children() -> set[str]:
    """Of this process."""
    tasks = Path("/proc/self/task").iterdir()
    return {pid for task in tasks for pid in (task / "children").read_text().split()}


async def until_said(process: ServerProcess, line: str) -> None:
    await until(lambda: line in process.tail.lines)


async def until_gone(pid: int, seconds: float = 2.0) -> None:
    await until(lambda: not is_alive(pid), seconds)


# --- ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -ILL $$", -4), ("kill -9 $$", -9)])
async def test_an_exit_is_noticed_and_its_status_known(script, code):
    async with running("echo words >&2; echo more; " + script) as process:
        with trio.fail_after(5):
            await process.wait()
        assert process.has_exited()
        assert process.code is None  # not reaped before its group was signalled
        assert await process.stop_within() == code
        assert process.code == code
        assert process.has_exited()
    assert list(process.tail.lines) == ["words", "more"]


async def test_a_polite_child_ends_by_sigterm():
    async with running("trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.01; done") as process:
        await until_said(process, "up")
        assert not process.has_exited()
        began = time.monotonic()
        assert await process.stop_within(5) == 7
        assert time.monotonic() - began < 2
    assert process.tail.last(1) == "bye"


async def test_one_that_ignores_sigterm_is_killed_after_its_grace():
    async with running("trap '' TERM; echo up; while :; do sleep 0.01; done") as process:
        await until_said(process, "up")
        began = time.monotonic()
        assert await process.stop_within(0.3) == -9
        assert 0.3 <= time.monotonic() - began < 2


async def test_no_grace_is_sigkill_at_once():
    async with running("trap 'echo heard; exit 0' TERM; echo up; while :; do sleep 0.01; done") as process:
        await until_said(process, "up")
        assert await process.stop_within(0) == -9
    assert "heard" not in process.tail.lines


async def test_one_that_is_stopped_is_ended_too():
    async with running("echo up; while :; do sleep 0.01; done") as process:
        await until_said(process, "up")
        process.signal(signal.SIGSTOP)
        assert await process.stop_within(0.2) in {-9, -15}


async def test_before_its_exec_it_can_be_ended():
    for _ in range(5):
        async with running("sleep 100") as process:
            assert await process.stop_within(5) in {-15, -9}


async def test_stopping_cannot_be_cancelled_and_is_bounded():
    async with running("trap '' TERM; echo up; while :; do sleep 0.01; done") as process:
        await until_said(process, "up")
        with trio.CancelScope() as scope:
            scope.cancel()
            assert await process.stop_within(0.1) == -9
        assert process.code == -9


async def test_stopping_twice_and_signalling_the_dead_harm_nobody():
    async with running("exit 5") as process:
        await process.wait()
        assert await process.stop_within() == 5
        assert await process.stop_within() == 5
        process.signal(signal.SIGKILL)  # its number may be somebody else's by now


async def test_it_is_abandoned_when_not_even_sigkill_ends_it(monkeypatch):
    monkeypatch.setattr("trio_router.backend.process.KILL_GRACE_SECONDS", 0.1)
    process = spawn("sleep 100")
    monkeypatch.setattr(ServerProcess, "signal", lambda self, number: None)
    try:
        with trio.fail_after(2):
            assert await process.stop_within(0.1) is None
    finally:
        process.popen.kill()
        process.popen.wait()
        os.close(process._output)


@pytest.mark.parametrize("more", range(6))
async def test_without_a_descriptor_for_it_there_is_no_process(more):
    """However far it gets: a pipe for the log, one for the child's error, a pidfd."""
    before, ours = descriptors(), children()
    with no_files_left(more), suppress(OSError):
        process = spawn("sleep 100")
        assert more > 3
        await process.stop_within(0)
        os.close(process._output)
    assert descriptors() == before
    assert children() == ours


# --- the group --------------------------------------------------------------------------------------


async def test_what_it_forked_goes_with_it():
    script = "trap 'exit 0' TERM; (trap '' TERM; echo child; while :; do sleep 0.05; done) & echo \"pid $!\"; wait"
    async with running(script) as process:
        await until(lambda: len(process.tail.lines) == 2)  # in either order
        assert "child" in process.tail.lines
        child = int(next(line for line in process.tail.lines if line.startswith("pid ")).split()[1])
        assert is_alive(child)
        assert await process.stop_within(5) == 0
        await until_gone(child)


async def test_what_an_already_dead_leader_forked_goes_too():
    async with running('sleep 1000 & echo "pid $!"; exit 1') as process:
        await process.wait()
        await until(lambda: process.tail.lines)
        child = int(process.tail.lines[0].split()[1])
        assert is_alive(child)
        assert await process.stop_within() == 1
        await until_gone(child)


async def test_one_that_has_begun_to_end():
    """The first thread is gone, another one not yet: nothing can be waited for."""
    script = (
        "import ctypes, platform, threading, time; threading.Thread(target=time.sleep, args=(100,)).start();"
        "ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[platform.machine()], 0)"
    )
    async with running(f'exec {sys.executable} -c "{script}"') as process:
        await until(lambda: is_exiting(process.pid))
        assert not process.has_exited()
    async with running("sleep 100") as process:
        assert not is_exiting(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        assert is_exiting(process.pid), "not reaped yet"
        pid = process.pid
    assert not is_exiting(pid), "nobody's any more"


async def test_it_has_a_session_of_its_own():
    async with running("echo up; sleep 100") as process:
        await until_said(process, "up")
        assert os.getpgid(process.pid) == os.getsid(process.pid) == process.pid != os.getsid(0)


async def test_who_escapes_the_group_and_holds_the_log_does_not_hold_us(tmp_path):
    """setsid: not in the group any more. The reader gives up on the pipe, the router goes on."""
    before = descriptors()
    marker = tmp_path / "pid"
    script = (
        f"setsid sh -c 'echo $$ > {marker}; exec sleep 1000' & while ! [ -s {marker} ]; do sleep 0.01; done; exit 1"
    )
    began = time.monotonic()
    async with running(script) as process:
        await process.wait()
        await process.stop_within()
    assert 0.9 < time.monotonic() - began < 4
    escaped = int(marker.read_text())
    assert command_line(escaped) == ["sleep", "1000"]
    os.kill(escaped, signal.SIGKILL)
    assert descriptors() == before


# --- the log ----------------------------------------------------------------------------------------


async def test_a_flood_of_log_neither_blocks_it_nor_fills_memory():
    script = (
        "dd if=/dev/zero bs=1M count=64 2>/dev/null | tr '\\0' 'x'; echo; yes 'line of log' | head -n 200000; echo done"
    )
    before = memory_bytes(os.getpid())
    async with running(script) as process:
        with trio.fail_after(20):
            await process.wait()
        assert await process.stop_within() == 0
    assert len(process.tail.lines) == MAX_LINES
    assert process.tail.last(1) == "done"
    assert process.tail.written == 200_002
    assert memory_bytes(os.getpid()) - before < 30 * 1024 * 1024


async def test_the_last_words_of_one_that_is_told_to_stop_are_kept():
    async with running(
        "trap 'yes last | head -n 30000; echo really; exit 0' TERM; echo up; while :; do sleep 0.01; done"
    ) as process:
        await until_said(process, "up")
        assert await process.stop_within(10) == 0
    assert process.tail.last(1) == "really"
    assert process.tail.written >= 30_002  # the shell may tell of its own child


async def test_the_log_is_read_on_while_the_reader_is_cancelled():
    """Shielded: a child that is told to stop still writes, and a full pipe would block it."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            process = spawn(
                "trap 'yes x | head -n 100000; echo end; exit 0' TERM; echo up; while :; do sleep 0.01; done"
            )
            nursery.start_soon(process.read_log_until_stopped, "qwen")
            try:
                await until_said(process, "up")
                scope.cancel()
                await trio.lowlevel.checkpoint()
            finally:
                assert await process.stop_within(5) == 0
    assert process.tail.last(1) == "end"


# --- starting ---------------------------------------------------------------------------------------


async def test_a_program_that_is_none_says_so(tmp_path):
    text = tmp_path / "text"
    text.write_text("no program")
    for path, why in (
        (tmp_path / "none", "No such file"),
        (text, "Permission denied"),
        (tmp_path, "Permission denied"),
    ):
        async with trio.open_nursery() as nursery:
            process = ServerProcess.spawn([str(path)], ENVIRONMENT)
            nursery.start_soon(process.read_log_until_stopped, "qwen")
            await process.wait()
            assert await process.stop_within() == 126
        assert process.tail.last(1).startswith(f"cannot execute {path}: {why}")


async def test_standard_input_is_empty_and_no_descriptor_is_inherited():
    extra = os.dup(2)
    os.set_inheritable(extra, True)
    try:
        async with running("cat; ls /proc/self/fd | tr '\\n' ' '; echo; echo end") as process:
            await until_said(process, "end")
    finally:
        os.close(extra)
    assert process.tail.lines[0].split()[:3] == ["0", "1", "2"]
    assert len(process.tail.lines[0].split()) == 4  # and the one `ls` reads with


async def test_no_signal_is_blocked_or_ignored():
    """Python ignores SIGPIPE, and what is ignored stays so across exec."""
    async with running("exec grep -E 'Sig(Blk|Ign)' /proc/self/status") as process:
        await process.wait()
    blocked, ignored = (
        int(line.split()[1], 16) & 0x7FFF_FFFF for line in process.tail.lines
    )  # above 31: the C library's
    assert not blocked
    ours = {number for number in range(1, 32) if signal.getsignal(number) is signal.SIG_IGN}  # SIGHUP, under nohup
    assert ignored == sum(1 << (number - 1) for number in ours - {signal.SIGPIPE, signal.SIGXFSZ})


async def test_a_second_of_starting_and_stopping_leaves_no_descriptor():
    await (await trio.lowlevel.open_process(["/bin/true"])).wait()  # whatever trio opens once
    before = descriptors()
    for number in range(15):
        async with running("echo hi; exit 1" if number % 2 else "exec sleep 100"):
            pass
    assert descriptors() == before
    with pytest.raises(OSError, match="Argument list too long"):
        ServerProcess.spawn(["/bin/true", "x" * 3_000_000], ENVIRONMENT)
    assert descriptors() == before


async def test_spawning_does_not_stop_the_loop_for_long():
    fastest = 1.0
    for _ in range(5):
        began = time.perf_counter()
        process = spawn("exit 0")
        fastest = min(fastest, time.perf_counter() - began)
        await process.stop_within(0)
        os.close(process._output)
    assert fastest < 0.05


# --- the router dies --------------------------------------------------------------------------------


def router() -> tuple[subprocess.Popen, int]:
    """A process that has spawned a child, and the child."""
    process = subprocess.Popen([sys.executable, "-c", ROUTER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    wait_until(lambda: command_line(child) == ["/bin/sleep", "1000"])
    return process, child


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_its_child_dies_with_a_killed_router():
    process, child = router()
    try:
        assert is_alive(child)
    finally:
        end(process)
    wait_until(lambda: not is_alive(child), timeout_seconds=2)


def test_its_child_outlives_trios_threads():
    """The parent-death signal comes when the *thread* that forked ends; trio's end after 10 s idle."""
    process, child = router()
    try:
        time.sleep(11)
        assert is_alive(child)
        assert process.poll() is None
    finally:
        end(process)
    wait_until(lambda: not is_alive(child), timeout_seconds=2)


def test_a_router_that_died_before_the_guard_asked_is_noticed():
    from trio_router.backend.process import GUARD

    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", GUARD, "1" if os.getpid() != 1 else "2", "/bin/true"], check=False
    )
    assert ran.returncode == 125
