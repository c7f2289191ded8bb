import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backend.peer import descriptors
from trio_router.backend.address import (
    FOLDER_PREFIX,
    MAX_SOCKET_PATH,
    Address,
    private_folder,
    tcp_address,
    unix_address,
)

HOLD_A_FOLDER = """
import sys
from pathlib import Path
from trio_router.backend.address import private_folder
with private_folder() as folder:
    (folder.path / "0-1.sock").touch()
    print(folder.path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_the_folder_is_ours_alone_and_gone_at_the_end(base):
    before = os.umask(0)
    try:
        with private_folder() as made:
            folder = made.ensured()
            assert folder == made.path
            assert folder.parent == base
            assert folder.name.startswith(FOLDER_PREFIX)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert folder.stat().st_uid == os.getuid()
            assert stat.S_IMODE((folder / "lock").stat().st_mode) == 0o600
            (folder / "1-1.sock").touch()
    finally:
        os.umask(before)
    assert list(base.iterdir()) == []


def test_it_is_gone_after_an_error_too_and_no_descriptor_is_left(base):
    before = descriptors()
    with pytest.raises(ZeroDivisionError), private_folder():
        raise ZeroDivisionError
    assert descriptors() == before
    assert list(base.iterdir()) == []


def test_two_routers_have_two(base):
    with private_folder() as one, private_folder() as other:
        assert one.path != other.path
        assert one.path.is_dir()
        assert other.path.is_dir()


def test_one_that_was_taken_away_is_made_again(base, monkeypatch, tmp_path_factory):
    """Somewhere else, if it has to be."""
    before = descriptors()
    with private_folder() as folder:
        first = folder.path
        shutil.rmtree(first)
        second = folder.ensured()
        assert second.is_dir()
        assert second.parent == base
        assert stat.S_IMODE(second.stat().st_mode) == 0o700
        with private_folder():
            assert second.is_dir(), "it is locked, as the first was"
        shutil.rmtree(second)
        second.mkdir()
        (second / "lock").touch()
        assert folder.ensured() != second, "somebody else's"
        shutil.rmtree(base)
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
        assert folder.ensured().parent == elsewhere
        assert folder.ensured() == folder.path
    assert list(elsewhere.iterdir()) == []
    assert descriptors() == before


@pytest.mark.parametrize("runtime", ["", "/nowhere/at/all"])
def test_without_a_runtime_folder_it_is_the_temporary_one(tmp_path, monkeypatch, runtime):
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with private_folder() as folder:
        assert folder.path.parent == tmp_path


@pytest.mark.process
def test_a_killed_router_is_swept_and_a_living_one_is_not(base):
    def router() -> tuple[subprocess.Popen, Path]:
        process = subprocess.Popen([sys.executable, "-c", HOLD_A_FOLDER], stdin=-1, stdout=-1, text=True)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())

    living, living_folder = router()
    killed, killed_folder = router()
    try:
        assert (killed_folder / "0-1.sock").exists()
        killed.kill()
        killed.wait()
        assert killed_folder.is_dir()
        with private_folder():
            assert not killed_folder.exists()
            assert (living_folder / "0-1.sock").exists()
        living.communicate("", timeout=5)
        assert living.returncode == 0
        assert list(base.iterdir()) == []
    finally:
        for process in (living, killed):
            process.send_signal(signal.SIGKILL)
            process.communicate()


def test_what_is_not_a_routers_folder_is_left_alone(base):
    (base / "something-else").mkdir()
    (base / (FOLDER_PREFIX + "file")).write_text("kept")
    being_made = base / (FOLDER_PREFIX + "nolock")  # between mkdir and the lock of another router
    being_made.mkdir()
    precious = base / "precious"
    precious.mkdir()
    (precious / "lock").touch()
    (base / (FOLDER_PREFIX + "link")).symlink_to(precious)
    with private_folder():
        pass
    assert (base / "something-else").is_dir()
    assert (base / (FOLDER_PREFIX + "file")).read_text() == "kept"
    assert being_made.is_dir()
    assert (precious / "lock").exists()


def test_a_folder_that_is_locked_here_is_not_swept(base):
    folder = base / (FOLDER_PREFIX + "live")
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with private_folder():
            assert folder.is_dir()


def test_names_differ_by_model_and_incarnation(tmp_path):
    names = {unix_address(tmp_path, number, run).path for number in range(12) for run in range(12)}
    assert len(names) == 144
    assert all(name is not None and name.endswith(".sock") for name in names)


def test_the_longest_path_that_can_be_bound_is_accepted_and_one_more_is_not(sockets):
    room = MAX_SOCKET_PATH - len(str(sockets)) - len("//0-1.sock")
    longest = sockets / ("d" * room)
    longest.mkdir()
    address = unix_address(longest, 0, 1)
    assert address.path is not None
    assert len(address.path) == MAX_SOCKET_PATH
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(address.path)
    with pytest.raises(OSError, match=r"longer than 107 bytes: .*TMPDIR"):
        unix_address(longest, 0, 10)


def test_bytes_are_counted_not_characters(sockets):
    with pytest.raises(OSError, match="107 bytes"):
        unix_address(sockets / ("é" * 50), 0, 1)


def test_a_socket_left_behind_is_removed_and_a_missing_one_is_fine(tmp_path):
    address = unix_address(tmp_path, 3, 4)
    assert address.path is not None
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(address.path)
    address.remove()
    assert list(tmp_path.iterdir()) == []
    address.remove()
    Address(port=1).remove()


def test_tcp_has_a_free_port_and_a_key_that_is_not_shown():
    one, other = tcp_address(), tcp_address()
    assert one.port is not None
    assert one.key is not None
    assert one.key != other.key
    assert len(one.key) >= 32
    assert one.key not in repr(one)
    assert one.key not in str(one)
    assert str(one) == f"127.0.0.1:{one.port}"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", one.port))
