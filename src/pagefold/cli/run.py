"""Own `pagefold run`: a command whose Python processes hold equal memory once."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pagefold.live.lifeline import Started


def run(
    command: Annotated[list[str], typer.Argument(metavar="[--] COMMAND...", help="The command and its arguments.")],
    domain: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Share with this domain. None: with nobody outside the command.", show_default=False
        ),
    ] = None,
    enable: Annotated[
        bool,
        typer.Option(help="Advise every NumPy array of 64 KiB and more; else only what programs advise themselves."),
    ] = True,
    knob: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A knob, by the kernel's name. May be repeated.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was saved as one line of JSON (on stderr, like the text).")
    ] = False,
) -> None:
    """Run a command, and let all Python processes below it hold equal memory once.

    A daemon is started for the command and ends with the last of its processes; with --domain the daemon of that domain is joined, if one
    serves it. The command has the terminal, gets the signals, and its exit code is returned (128+n if signal n ended it). At the end
    it is said on stderr what was saved and when.

    Examples: `pagefold run -- python train.py`, `pagefold run --domain web --knob pages_to_scan=10000 -- gunicorn app:app -w 8`.
    """
    from pagefold.live import command as commands
    from pagefold.live import domain as domains
    from pagefold.live import lifeline
    from pagefold.live.knobs import read_words
    from pagefold.live.savings import Sampler

    knobs = read_words(knob or [])
    domains.sweep_private()
    name = domains.private_name() if domain is None else domains.check_name(domain)
    path = domains.socket_path(name)
    daemon = lifeline.join_or_start(name, knobs)
    sampler = Sampler(path)
    began = time.monotonic()
    try:
        code = commands.run(command, lifeline.client_environment(path, enable=enable), lambda pid: sampler.start())
        seconds = time.monotonic() - began
        savings = sampler.end()
        troubles = _let_go(daemon)
    except BaseException:
        if daemon:
            daemon.let_go()
        raise
    try:
        if as_json:
            from pagefold.view.live import savings_json

            said = savings_json(savings, command=command, exit_code=code, seconds=round(seconds, 2), domain=name)
            lines = [json.dumps({**said, "troubles": troubles})]
        else:
            from pagefold.view.live import draw_savings

            lines = [f"pagefold: {line}" for line in [*draw_savings(savings), *troubles]]
    except (
        Exception
    ) as error:  # whatever a daemon of another version says: the command's exit code is what the caller waits for
        lines = [f"pagefold: what was saved cannot be told: the daemon's answer is not as expected ({error!r})"]
    print(*lines, sep="\n", file=sys.stderr)
    raise typer.Exit(code)


def _let_go(daemon: Started | None) -> list[str]:
    """Let a daemon of ours end; return what must be told about it."""
    if daemon is None:
        return []
    early, why = daemon.ended(), daemon.let_go()
    if early:
        return [f"the daemon had ended early, and nothing was merged since: {early}"]
    return [why] if why else []
