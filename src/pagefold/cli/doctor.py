"""Own `pagefold doctor`: the state of this machine's own merger."""

from __future__ import annotations

from typing import Annotated

import typer

from pagefold.cli.progress import progress


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what on this machine keeps KSM from merging, slows it down, or costs, each with a command that changes it.

    Only reads: sysfs, and of each process how much memory is advised MERGEABLE. Finding something is no error: the exit code is 0.

    Examples: `pagefold doctor`, `pagefold doctor --json`.
    """
    from pagefold.plan.diagnosis import diagnose
    from pagefold.plan.machine_state import count_advised, read_machine
    from pagefold.view.doctor import print_doctor, print_doctor_json

    with progress("processes") as show:
        state = read_machine(advised=count_advised(progress=show))
    findings = diagnose(state)
    (print_doctor_json if as_json else print_doctor)(state, findings)
