"""Own `pagefold plan`: read pages, predict, show."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from pagefold.cli.progress import progress


def plan(
    pids: Annotated[
        list[str] | None, typer.Argument(metavar="[PID]...", help="Running processes.", show_default=False)
    ] = None,
    all_mine: Annotated[
        bool, typer.Option("--all-mine", help="All processes of this user (as root: of everybody).")
    ] = False,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="A memory image: a raw file or an ELF core. May be repeated."),
    ] = None,
    advised: Annotated[
        bool,
        typer.Option("--advised", help="Only memory that is advised MERGEABLE already, as KSM would look at it today."),
    ] = False,
    interval: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Rest between two looks; pages that differ are volatile. 0: one look."),
    ] = 1.0,
    max_page_sharing: Annotated[
        str | None,
        typer.Option(
            "--max-page-sharing", metavar="N", help="Instead of the kernel's present setting.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with the kernel's counter names.")] = False,
) -> None:
    """Say what KSM would do with the memory of processes or images, once settled.

    Reads the present anonymous pages, twice, and answers for merge_across_nodes 1 and 0 and for use_zero_pages 0 and 1.
    Never writes to a process and never stops one.

    Examples: `pagefold plan 1234 1235`, `pagefold plan --all-mine`, `pagefold plan --image guest.core`.
    """
    from pagefold.errors import PagefoldError
    from pagefold.plan.reading import Reader
    from pagefold.plan.report import make_report
    from pagefold.view.line import one_line
    from pagefold.view.plan import print_json, print_report

    reader = Reader(advised_only=advised, max_page_sharing=max_page_sharing, interval=interval)
    reader.add(pids or [], image or [], all_mine=all_mine)
    fatal = ""
    try:
        with progress("pages") as show:
            sources = reader.read(show, time.sleep)
    except PagefoldError as error:
        fatal = str(error)
        raise
    finally:
        for skipped in reader.skipped:
            if skipped.why != fatal:
                print(f"pagefold: left out: {one_line(skipped.why)}", file=sys.stderr)
    report = make_report(
        sources, reader.skipped, reader.max_page_sharing, interval=reader.interval, advised_only=reader.advised_only
    )
    if as_json:
        print_json(report)
    else:
        print_report(report)
