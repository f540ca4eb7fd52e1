"""Own `pagefold explain`: why the pages of processes do not merge."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from pagefold.cli.progress import progress


def explain(
    pids: Annotated[list[str], typer.Argument(metavar="PID...", help="Running processes.", show_default=False)],
    looks: Annotated[int, typer.Option(metavar="N", help="How often to look; pages that differ are volatile.")] = 2,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="Rest between two looks.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all areas.")] = False,
) -> None:
    """Say why the pages of processes do not merge: every resident page under one reason, with its areas and a remedy.

    The sums are the resident set, to the page. Above them: what on this machine keeps KSM from merging (see `pagefold doctor`).
    Never writes to a process and never stops one.

    Examples: `pagefold explain 1234`, `pagefold explain 1234 1235 --looks 5 --interval 10`, `pagefold explain --json 1234`.
    """
    from pagefold.errors import PagefoldError
    from pagefold.plan.explanation import explain as make_explanation
    from pagefold.plan.looks import check_looks, take_looks
    from pagefold.plan.machine_state import read_machine
    from pagefold.plan.reading import Reader
    from pagefold.view.explain import print_explanation, print_explanation_json
    from pagefold.view.line import one_line

    check_looks(looks)
    reader = Reader(interval=interval)
    reader.add(pids, [])
    fatal = ""
    try:
        with progress("pages") as show:
            looked = take_looks(reader, looks, show, time.sleep)
    except PagefoldError as error:
        fatal = str(error)
        raise
    finally:
        for skipped in reader.skipped:
            if skipped.why != fatal:
                print(f"pagefold: left out: {one_line(skipped.why)}", file=sys.stderr)
    answer = make_explanation(looked, read_machine(), looks=looks, interval=interval, skipped=reader.skipped)
    (print_explanation_json if as_json else print_explanation)(answer)
