"""Own `pagefold stat`: what a daemon merged, its clients, and who shares what."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import Annotated, Any

import typer

_SECONDS = 2.0
_MOST = 86400


def stat(
    seconds: Annotated[
        float | None,
        typer.Argument(
            metavar="[SECONDS]", help="With --watch: the rest between two looks. None: 2.", show_default=False
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="None: the one of $PAGEFOLD_SOCKET, or default.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch, a line for each look.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until interrupted.")] = False,
) -> None:
    """Show what a daemon has merged, in the kernel's counter names, its clients, and who shares what.

    Examples: `pagefold stat`, `pagefold stat --domain web --watch 5`, `pagefold stat --json`.
    """
    from pagefold.errors import UsageError
    from pagefold.live.control import ask
    from pagefold.live.domain import socket_path
    from pagefold.view.live import draw_stat, new_console, print_json

    if seconds is not None and not watch:
        raise UsageError(f"{seconds:g} seconds between two looks, but there is only one; add --watch")
    rest = _SECONDS if seconds is None else seconds
    if not 0 <= rest <= _MOST or math.isnan(rest):
        raise UsageError(f"a rest of {rest:g} seconds cannot be; use 0 to {_MOST}")
    path = socket_path(domain)

    def look() -> dict[str, Any]:
        return ask(path, {"verb": "stat"})

    if not watch:
        if as_json:
            print_json(look())
        else:
            new_console().print(draw_stat(look()))
        return
    with contextlib.suppress(KeyboardInterrupt):
        if as_json or not sys.stdout.isatty():
            while True:
                if as_json:
                    print_json(look(), lines=True)
                else:
                    new_console().print(draw_stat(look()))
                time.sleep(rest)
        from rich.live import Live

        with Live(draw_stat(look()), console=new_console(), screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(rest)
                live.update(draw_stat(look()), refresh=True)
