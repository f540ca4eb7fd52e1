"""Own `pagefold stop`: end a daemon."""

from __future__ import annotations

import contextlib
import os
import select
from typing import Annotated

import typer

_PATIENCE = 30.0  # seconds


def stop(
    domain: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="None: the one of $PAGEFOLD_SOCKET, or default.", show_default=False),
    ] = None,
) -> None:
    """End a daemon. Its clients keep their memory as it is, merged pages too, and go on.

    Examples: `pagefold stop`, `pagefold stop --domain web`.
    """
    from pagefold.live.control import NoAnswer, ask
    from pagefold.live.domain import socket_path

    path = socket_path(domain)
    pid = ask(path, {"verb": "stop"})["pid"]
    with contextlib.suppress(ProcessLookupError):  # it was that quick
        process = os.pidfd_open(pid)
        if not select.select([process], [], [], _PATIENCE)[0]:
            raise NoAnswer(f"{path}: daemon {pid} was told to end and has not; look what it does, or kill it")
    typer.echo(f"daemon {pid} has ended")
