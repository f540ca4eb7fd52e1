"""Own `pagefold conform`: the same scenarios on simulated and real kernels, compared."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from pagefold.cli.progress import progress


def conform(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Scenario files, folders of them, or FILE::NAME. None: the scenarios that come with pagefold.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="HOST,...",
            help="sim: simulated; kernel: this machine's own (root); guest: a kernel under QEMU. None: all that can be had.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="NUMA nodes of the simulated machine and the guest. None: 2, or what a scenario needs.",
            show_default=False,
        ),
    ] = None,
    kernel: Annotated[
        Path | None,
        typer.Option(
            metavar="VMLINUZ", help="Kernel of the guest. None: the one that was fetched last.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with every difference.")] = False,
) -> None:
    """Run scenarios on the simulated machine and on real kernels, and compare what can be seen after every step.

    A scenario is a function `scenario_*(host)` in a Python file; docs/conformance.md says how to write one. Compared are all of the
    kernel's counters, and of every page its node and whom it shares its frame with. The exit code is 1 if anything differs, or
    if nothing could be compared though several hosts were named.

    With `kernel` the settings in /sys/kernel/mm/ksm are borrowed under a lock, and restored however this ends.

    Examples: `pagefold conform`, `pagefold conform mine.py --host sim,guest --nodes 4`, `pagefold conform mine.py::scenario_x`.
    """
    from pagefold.errors import NotHere, UsageError
    from pagefold.scenario import files as scenario_files
    from pagefold.scenario.conform import BAD, arrange, check_kinds, check_nodes, conform
    from pagefold.scenario.places import KINDS, Kind, Place, why_not
    from pagefold.view.conform import print_json, print_rows
    from pagefold.view.line import one_line

    kinds = check_kinds(host.split(",") if host is not None else KINDS)
    wanted_nodes = check_nodes(nodes)
    if kernel is not None and not kernel.is_file():
        raise UsageError(f"{kernel}: there is no such kernel image")
    rows = []
    # What scenarios print is not our answer.
    with contextlib.redirect_stdout(sys.stderr):
        wanted = files or [str(scenario_files.LIBRARY)]
        scenarios = list(dict.fromkeys(one for path in wanted for one in scenario_files.load(path)))
        places: dict[Kind, Place] = {"guest": Place("guest", kernel=kernel)}
        for kind in list(kinds):
            if reason := why_not(places.get(kind, Place(kind))):
                if host is not None:
                    raise NotHere(f"{kind}: {reason}")
                print(f"pagefold: left out: {kind}: {one_line(reason)}", file=sys.stderr)
                kinds.remove(kind)
        arranged = arrange(scenarios, kinds, wanted_nodes, places)
        total = sum(map(len, arranged.values()))
        with progress("runs") as show:
            for row in conform(arranged, with_sim="sim" in kinds):
                rows.append(row)
                show(f"{row.kind}: {row.scenario.name}", len(rows), total)
    order = {one: number for number, one in enumerate(scenarios)}
    rows.sort(key=lambda row: order.get(row.scenario, len(order)))
    if as_json:
        print_json(rows)
    else:
        print_rows(rows)
    asked_to_compare = host is not None and len(kinds) > 1
    if any(row.state in BAD for row in rows) or (asked_to_compare and not any(row.reference for row in rows)):
        raise typer.Exit(1)
