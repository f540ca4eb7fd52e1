"""Own `pagefold serve`: the daemon of one domain, in the foreground."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import Annotated

import typer

_DEVICE = Path("/dev/userfaultfd")


def serve(
    domain: Annotated[
        str | None, typer.Option(metavar="NAME", help="The domain to serve. None: default.", show_default=False)
    ] = None,
    knob: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A knob, by the kernel's name. May be repeated.", show_default=False),
    ] = None,
    max_cpu_percent: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Most processor time for merging; 100 is one processor. None: 50.", show_default=False
        ),
    ] = None,
    lifeline: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Merge the memory of this user's processes that join a domain, until stopped.

    Processes join by themselves: those below `pagefold run --domain NAME`, and those with PAGEFOLD_SOCKET that import pagefold.
    A service manager may pass a listening socket (LISTEN_FDS), and an open /dev/userfaultfd named "userfaultfd", which lets processes
    without any right have background merging; it is told READY=1 and STOPPING=1.

    Examples: `pagefold serve`, `pagefold serve --domain web --knob merge_across_nodes=0 --max-cpu-percent 20`.
    """
    from pagefold.live import domain as domains
    from pagefold.live import lifeline as lifelines
    from pagefold.live.knobs import MAX_CPU_PERCENT, read_words
    from pagefold.live.sd_notify import passed_descriptors

    words = [*(knob or []), *([f"{MAX_CPU_PERCENT}={max_cpu_percent}"] if max_cpu_percent is not None else [])]
    knobs: dict[str, int | str] = dict(read_words(words))
    passed, device = _sort_out(passed_descriptors())
    if device < 0:
        with contextlib.suppress(OSError):
            device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    # Until the daemon has its own handlers: no traceback, and no socket left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        if passed is None:
            path = domains.socket_path(domain)
            listening: socket.socket = stack.enter_context(domains.listen(path))
        else:
            listening = stack.enter_context(passed)
            path = Path(os.fsdecode(listening.getsockname()))
        name = domain or (domains.DEFAULT if path == domains.folder() / f"{domains.DEFAULT}.sock" else path.stem)
        if lifeline is not None:
            lifelines.watch(lifeline, name, path)
        from pagefold.live.daemon import Daemon  # late, for it takes a while: who connects meanwhile waits in the queue

        Daemon(name, knobs=knobs, device=device, socket=listening).serve()


def _sort_out(passed: list[tuple[str, int]]) -> tuple[socket.socket | None, int]:
    """Return the listening socket and the open /dev/userfaultfd among what a service manager passed: None, -1 if there is none."""
    from pagefold.errors import UsageError

    listening, device = None, -1
    for name, fd in passed:
        mode = os.fstat(fd).st_mode
        if stat.S_ISCHR(mode) and name == "userfaultfd":
            device = fd
        elif stat.S_ISSOCK(mode) and listening is None:
            listening = socket.socket(fileno=fd)
            if listening.family != socket.AF_UNIX or listening.type != socket.SOCK_SEQPACKET:
                raise UsageError("the socket that was passed is of another kind; use ListenSequentialPacket=PATH")
        else:
            raise UsageError(
                f"descriptor {fd} ({name or 'without a name'}) that was passed is of no use; pass one listening socket, "
                "and /dev/userfaultfd by the name userfaultfd"
            )
    return listening, device
