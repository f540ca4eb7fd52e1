"""Own `pagefold set`: change the knobs of a daemon."""

from __future__ import annotations

from typing import Annotated

import typer


def set_knob(
    words: Annotated[list[str], typer.Argument(metavar="KNOB=VALUE...", help="Knobs, by the kernel's names.")],
    domain: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="None: the one of $PAGEFOLD_SOCKET, or default.", show_default=False),
    ] = None,
) -> None:
    """Change knobs of a daemon: those of /sys/kernel/mm/ksm, with the kernel's limits and refusals, and max_cpu_percent.

    Examples: `pagefold set run=0`, `pagefold set pages_to_scan=2000 sleep_millisecs=100 max_cpu_percent=20`.
    """
    from pagefold.live.control import ask
    from pagefold.live.domain import socket_path
    from pagefold.live.knobs import read_words

    knobs = read_words(words)
    answer = ask(socket_path(domain), {"verb": "set", "knobs": knobs})
    for name in knobs:
        typer.echo(f"{name} = {answer['knobs'][name]}")
