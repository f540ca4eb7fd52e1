"""Own where a domain's daemon is found: the socket of a user and a name, and that one daemon at a time has it.

A lock file beside the socket is held (flock) as long as the daemon lives; so a socket whose lock is free belongs to a dead daemon and may
be replaced. Standard library only: workers load this. Must not know: what is said through the socket.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
from pathlib import Path
from typing import Any

from pagefold.errors import NotPermitted, PagefoldError, UsageError

DEFAULT = "default"
PRIVATE = "run-"  # how the names of domains begin that live for one command
_MOST_PATH = 107  # bytes in sun_path
_BACKLOG = 128


class DomainBusy(PagefoldError):  # noqa: N818
    """Another daemon serves this socket, or is about to."""

    exit_code = 75


class Listening(socket.socket):
    """A listening socket of our own making: closing it takes its file and lock away, whatever became of them in the meantime."""

    path: Path
    lock: int

    def close(self) -> None:
        """Close, and leave nothing behind."""
        if self.fileno() >= 0:
            super().close()
            _unlink(self.path)
            _unlock(self.path, self.lock)


def check_name(domain: str) -> str:
    """Return the name of a domain, or raise UsageError."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", domain, re.ASCII):
        raise UsageError(
            f"{domain!r} cannot be the name of a domain; use 1 to 64 letters, digits, '-', '_' and '.', the first no '.'"
        )
    return domain


def private_name() -> str:
    """Return a new name for a domain of one command."""
    return f"{PRIVATE}{os.getpid()}-{os.urandom(4).hex()}"


def folder() -> Path:
    """Return where this user's sockets are: below $XDG_RUNTIME_DIR if it is ours, else in /tmp. It need not exist yet."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        with contextlib.suppress(OSError):
            if os.stat(runtime).st_uid == os.geteuid():  # noqa: PTH116  (sudo keeps the variable, and root is not its owner)
                return Path(runtime) / "pagefold"
    return Path(f"/tmp/pagefold-{os.geteuid()}")


def socket_path(domain: str | None = None) -> Path:
    """Return the socket of a domain. None: the one that $PAGEFOLD_SOCKET names, or the domain "default".

    Raises NotPermitted if the folder could be written to by others: what is found there would not be ours.
    """
    named = os.environ.get("PAGEFOLD_SOCKET", "")
    if domain is None and named:
        return _check_path(Path(named).absolute())
    path = folder() / f"{check_name(DEFAULT if domain is None else domain)}.sock"
    _check_folder(path.parent)
    return _check_path(path)


def listen(path: Path) -> Listening:
    """Bind and listen at this path, for this user alone. DomainBusy if a daemon has it; what a dead one left is replaced."""
    _check_path(path)
    if path.parent == folder():
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(0o700)
        _check_folder(path.parent)
    busy = DomainBusy(
        f"{path}: a daemon serves this already; join it with `pagefold run --domain`, or end it with `pagefold stop`"
    )
    try:
        lock = _lock(path)
        if lock is None:
            raise busy
        try:
            if _answers(path):  # without our lock: of systemd, or of something else
                raise busy
            _unlink(path)
            return _bind(path, lock)
        except BaseException:
            _unlock(path, lock)
            raise
    except OSError as error:
        raise NotPermitted(f"{path}: {error.strerror}; name another place for it in PAGEFOLD_SOCKET") from None


def sweep(path: Path) -> bool:
    """Remove what a dead daemon left at this path; False if one lives there."""
    lock = None
    with contextlib.suppress(OSError):
        if not path.exists() and not _lock_path(path).exists():
            return True
        lock = _lock(path)
    if lock is None:
        return False
    gone = not _answers(path)
    if gone:
        _unlink(path)
    _unlock(path, lock)
    return gone


def sweep_private() -> None:
    """Remove what dead daemons of single commands left in this user's folder."""
    with contextlib.suppress(OSError):
        for path in {path.with_name(path.name.removesuffix(".lock")) for path in folder().glob(f"{PRIVATE}*.sock*")}:
            sweep(path)


def _bind(path: Path, lock: int) -> Listening:
    made = Listening(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.path, made.lock = path, lock
    before = os.umask(0o177)  # no moment at which others could connect
    try:
        made.bind(str(path))
    except BaseException:
        super(Listening, made).close()
        raise
    finally:
        os.umask(before)
    made.listen(_BACKLOG)
    return made


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:  # its queue is full
            return True
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.EPROTOTYPE)
        return True


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _lock(path: Path) -> int | None:
    """Return a descriptor that holds the lock of a path, None if another process holds it."""
    name = _lock_path(path)
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if _same(fd, name):  # and not removed by its last holder since we opened it
            return fd
        os.close(fd)


def _unlock(path: Path, lock: int) -> None:
    """Remove the lock file while it is still ours, then let go."""
    if _same(lock, _lock_path(path)):
        _unlink(_lock_path(path))
    os.close(lock)


def _same(fd: int, name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(name))
    except OSError:
        return False


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _check_folder(path: Path) -> None:
    try:
        found: Any = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise NotPermitted(f"{path}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of your own") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise NotPermitted(
            f"{path}: not a folder that only you (uid {os.geteuid()}) may use; remove it, or set XDG_RUNTIME_DIR to a folder of your own"
        )


def _check_path(path: Path) -> Path:
    if len(os.fsencode(path)) > _MOST_PATH:
        raise UsageError(f"{path}: longer than the {_MOST_PATH} bytes a socket's name may have; use a shorter path")
    return path
