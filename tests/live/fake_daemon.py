"""Own a daemon that says exactly what a test wants, sense or nonsense, and keeps what the agent answers."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
from tests.live.children import BOUND

from pagefold.live import messages
from pagefold.live.messages import PAGE

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10 | fcntl.F_SEAL_SEAL  # F_SEAL_FUTURE_WRITE


def extent(contents: np.ndarray[Any, Any], seals: int = SEALS) -> int:
    """Return a memory file with these pages, sealed as the daemon's are, read-only."""
    fd = os.memfd_create("extent", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, contents.nbytes)
    with mmap.mmap(fd, contents.nbytes) as memory:
        memory[:] = contents.tobytes()
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    return readable


class Connection:
    """One agent."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(BOUND)
        self._batches = 0
        self.hello = self.hear(messages.HELLO)

    def hear(self, *kinds: int) -> Any:
        """Return the next message, which must be of this kind (of several: with the kind)."""
        packet = self.socket.recv(messages.MOST_BYTES)
        assert packet, "the agent hung up"
        kind, said = messages.unpack(packet)
        assert kind in kinds, f"a message of type {kind} instead of {kinds}"
        return said if len(kinds) == 1 else (kind, said)

    def gone(self) -> bool:
        """Wait for the agent to hang up; what it still says is passed over."""
        try:
            while self.socket.recv(messages.MOST_BYTES):
                pass
        except ConnectionResetError:
            pass
        return True

    def say(self, kind: int, fds: tuple[int, ...] = (), **fields: Any) -> None:
        """Send a message, with descriptors, which are closed."""
        self.raw(messages.pack(kind, **fields), fds)

    def raw(self, packet: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send anything."""
        socket.send_fds(self.socket, [packet], list(fds))
        for fd in fds:
            os.close(fd)

    def welcome(self) -> None:
        """Welcome the agent, without a device."""
        self.say(messages.WELCOME)

    def give(self, number: int, contents: np.ndarray[Any, Any]) -> None:
        """Give it an extent with these pages."""
        self.say(messages.EXTENT, (extent(contents),), extent=number, slots=len(contents), node=0)

    def windows(self, *runs: tuple[int, int, int, int, int], plain: int = 0) -> list[str]:
        """Have runs swapped, (region, start, pages, extent, slot) each; return what became of the pages."""
        self._batches += 1
        self.say(
            messages.WINDOWS,
            batch=self._batches,
            count=len(runs),
            plain=plain,
            runs=np.array([(*run, 0) for run in runs], messages.run),
        )
        said = self.hear(messages.OUTCOME)
        assert said["batch"] == self._batches
        assert said["pages"] == sum(run[2] for run in runs)
        assert not said["status"][said["pages"] :].any()
        return [messages.STATUS_NAMES[status] for status in said["status"][: said["pages"]]]

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


class FakeDaemon:
    """A listening socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        self._socket.listen(16)
        self._socket.settimeout(BOUND)

    def accept(self) -> Connection:
        """Wait for an agent, and its HELLO."""
        return Connection(self._socket.accept()[0])

    def close(self) -> None:
        """End, as if killed: the socket's file stays."""
        self._socket.close()


__all__ = ["PAGE", "SEALS", "Connection", "FakeDaemon", "extent"]
