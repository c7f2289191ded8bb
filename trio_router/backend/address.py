"""Where one llama-server listens, and the private folder its socket lives in."""

import fcntl
import os
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import attrs
import structlog

FOLDER_PREFIX = "trio-router-"
LOCK = "lock"
MAX_SOCKET_PATH = 107
"""Bytes of `sockaddr_un.sun_path` that can be used, unix(7)."""

log = structlog.get_logger("trio_router.backend")


@attrs.frozen(kw_only=True)
class Address:
    """A Unix socket (`path`), or a loopback TCP port with a key that only this incarnation knows."""

    path: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    key: str | None = attrs.field(default=None, repr=False)

    @property
    def is_gone(self) -> bool:
        """Whether somebody took the socket's name away: nobody can connect any more."""
        return self.path is not None and not Path(self.path).exists()

    def remove(self) -> None:
        """Take the socket's name away: llama-server leaves it behind, and would not bind to it again."""
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)

    def __str__(self) -> str:
        return self.path if self.path is not None else f"{self.host}:{self.port}"


@attrs.define(eq=False)
class PrivateFolder:
    """A 0700 folder for sockets, and the lock that says that it is in use."""

    path: Path
    _lock: int

    @classmethod
    def new(cls) -> "PrivateFolder":
        """Where there is room for one now. Raises OSError."""
        return cls(*_locked_folder(_base()))

    def ensured(self) -> Path:
        """Where it is: another one, if somebody took it away. Raises OSError.

        systemd-logind removes `$XDG_RUNTIME_DIR` at a user's last logout, whatever still runs; others clean up `/tmp`, where
        somebody else may then make one of that name. It is ours if the lock in it is.
        """
        try:
            found = (self.path / LOCK).lstat()
        except OSError:
            found = None
        if found is None or not os.path.samestat(found, os.fstat(self._lock)):
            path, lock = _locked_folder(_base())
            os.close(self._lock)
            log.warning("the folder of the sockets is gone: they get another", was=str(self.path), now=str(path))
            self.path, self._lock = path, lock
        return self.path

    def remove(self) -> None:
        """With all that is in it."""
        os.close(self._lock)
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def private_folder() -> Iterator[PrivateFolder]:
    """One for this router, gone at the end.

    Folders of routers that were killed are swept first: each living router holds a lock on its own, and the
    kernel drops that lock with the process, however it ends.
    """
    _sweep(_base())
    folder = PrivateFolder.new()
    try:
        yield folder
    finally:
        folder.remove()


def _base() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime if runtime and os.access(runtime, os.W_OK) else tempfile.gettempdir())


def _locked_folder(base: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=base))  # 0700 by mkdtemp's promise
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a router that starts beside us took it for a dead one's, and is removing it
            os.close(lock)
        else:
            return folder, lock


def _sweep(base: Path) -> None:
    for folder in base.glob(FOLDER_PREFIX + "*"):
        with suppress(OSError):  # another user's, or one being made or swept by another router right now
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def unix_address(folder: Path, number: int, incarnation: int) -> Address:
    """A socket name no other incarnation of any model has had; llama-server asks that it ends in `.sock`.

    Raises OSError when the folder's path leaves no room for it.
    """
    path = str(folder / f"{number}-{incarnation}.sock")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise OSError(f"socket path is longer than {MAX_SOCKET_PATH} bytes: {path}; set TMPDIR to a shorter one")
    return Address(path=path)


def tcp_address() -> Address:
    """A loopback port that was free a moment ago, and a fresh key.

    Another program may take the port before llama-server does: that is a failed load, which is tried again.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return Address(port=port, key=secrets.token_urlsafe(24))
