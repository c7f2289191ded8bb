"""What outlives a router that is killed: nothing."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.backend.peer import descriptors, no_files_left
from tests.harness.processes import is_alive, wait_until
from trio_router.backend.reaper import Reaper, reaping

pytestmark = pytest.mark.process

FORKS = ["/bin/sh", "-c", "sleep 1000 & echo $!; trap '' TERM; wait"]
ROUTER = """
import os, subprocess, sys, time
from trio_router.backend.reaper import Reaper
reaper = Reaper()
reaper.start()
gone = subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True)
reaper.add(gone.pid)
child = subprocess.Popen(["/bin/sh", "-c", "sleep 1000 & echo $!; wait"], start_new_session=True, stdout=subprocess.PIPE)
reaper.add(child.pid)
reaper.remove(gone.pid)
print(reaper.pid, gone.pid, child.pid, child.stdout.readline().decode().strip(), flush=True)
time.sleep(1000)
"""


def group() -> tuple[subprocess.Popen[bytes], int]:
    process = subprocess.Popen(FORKS, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_killed_router_takes_the_whole_group_with_it():
    router = subprocess.Popen([sys.executable, "-c", ROUTER], stdout=subprocess.PIPE, start_new_session=True)
    assert router.stdout is not None
    reaper, gone, child, grandchild = map(int, router.stdout.readline().split())
    try:
        assert all(map(is_alive, (reaper, gone, child, grandchild)))
        router.kill()
        router.wait()
        wait_until(lambda: not is_alive(grandchild) and not is_alive(child), timeout_seconds=2)
        wait_until(lambda: not is_alive(reaper), timeout_seconds=2)
        assert is_alive(gone), "it was told that this group is gone: its number may be somebody else's now"
    finally:
        os.kill(gone, signal.SIGKILL)
        router.stdout.close()


def test_it_ends_with_its_owner_and_harms_nobody_it_was_told_of():
    before = descriptors()
    process, grandchild = group()
    with reaping() as reaper:
        reaper.add(process.pid)
        reaper.remove(process.pid)
        reaper.remove(12345)
        pid = reaper.pid
        assert pid is not None
        assert is_alive(pid)
    assert not is_alive(pid)
    assert is_alive(grandchild)
    end(process)
    assert descriptors() == before


def test_what_is_left_at_the_end_is_killed():
    process, grandchild = group()
    with reaping() as reaper:
        reaper.add(process.pid)
    wait_until(lambda: not is_alive(grandchild), timeout_seconds=2)
    end(process)


def test_signals_do_not_end_it_and_if_it_is_killed_there_is_another():
    process, grandchild = group()
    with reaping() as reaper:
        reaper.add(process.pid)
        first = reaper.pid
        assert first is not None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(first, number)
        reaper.add(process.pid)
        assert reaper.pid == first
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not is_alive(first))
        reaper.remove(54321)  # the word that cannot be said
        assert reaper.pid not in {None, first}
    wait_until(lambda: not is_alive(grandchild), timeout_seconds=2)
    end(process)


def test_one_that_stands_still_is_replaced_and_kills_nobody_when_it_goes_on():
    child, _ = group()
    try:
        with reaping() as reaper:
            reaper.add(child.pid)
            old = reaper.pid
            assert old is not None
            os.kill(old, signal.SIGSTOP)
            for number in range(20_000):
                reaper.remove(10**8 + number)  # nobody's
                if reaper.pid != old:
                    break
            assert reaper.pid != old
            assert not is_alive(old)
            assert is_alive(child.pid)
            reaper.remove(child.pid)
        assert is_alive(child.pid)
    finally:
        end(child)


def test_without_descriptors_the_router_goes_on():
    before = descriptors()
    reaper = Reaper()
    for more in range(3):
        with no_files_left(more):
            reaper.add(1_000_000 + more)
            assert reaper.pid is None
    assert descriptors() == before
    reaper.add(1_000_010)
    assert reaper.pid is not None
    for number in (*range(3), 10):
        reaper.remove(1_000_000 + number)
    reaper.close()


def test_without_a_shell_the_router_goes_on(monkeypatch):
    def none(*arguments, **options):
        raise FileNotFoundError("/bin/sh")

    before = descriptors()
    monkeypatch.setattr(subprocess, "Popen", none)
    reaper = Reaper()
    reaper.start()
    reaper.add(1)
    reaper.remove(1)
    reaper.close()
    assert descriptors() == before
