"""Own the list of verbs."""

from __future__ import annotations

from typing import Annotated

import typer

from pagefold import __version__
from pagefold.cli.check import check
from pagefold.cli.conform import conform
from pagefold.cli.doctor import doctor
from pagefold.cli.explain import explain
from pagefold.cli.explain_design import explain_design
from pagefold.cli.plan import plan
from pagefold.cli.run import run
from pagefold.cli.serve import serve
from pagefold.cli.set_knob import set_knob
from pagefold.cli.stat import stat
from pagefold.cli.stop import stop

app = typer.Typer(
    help="Same-page merging for Linux: let processes hold equal memory once, predict what that saves, and see that it is safe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(context_settings={"allow_interspersed_args": False})(run)  # the command's options are its own
app.command()(serve)
app.command()(stat)
app.command("set")(set_knob)
app.command()(stop)
app.command()(plan)
app.command()(explain)
app.command()(doctor)
app.command()(conform)
app.command()(check)
app.command("explain-design")(explain_design)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pagefold {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
