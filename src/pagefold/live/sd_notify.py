"""Own what systemd and a service tell each other: readiness, and descriptors that were opened for us. Must not know: what we serve."""

from __future__ import annotations

import contextlib
import os
import socket

_FIRST = 3  # the first descriptor that is passed


def notify(state: str) -> bool:
    """Say "READY=1", "STOPPING=1", "STATUS=..." to the service manager; False if there is none. A failure is nobody's problem."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        sender.send(state.encode())
        return True
    return False


def passed_descriptors() -> list[tuple[str, int]]:
    """Return what was passed to this very process as (name, descriptor), nameless ones as ""; a second call returns nothing.

    The descriptors will not go on to programs that we start.
    """
    values = [os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
    pid, count, names = values
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    descriptors = range(_FIRST, _FIRST + int(count))
    for fd in descriptors:
        os.set_inheritable(fd, False)
    told = names.split(":") if names else []
    return [(told[at] if at < len(told) else "", fd) for at, fd in enumerate(descriptors)]
