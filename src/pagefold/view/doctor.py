"""Own how a machine's findings are shown: lines for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pagefold.plan.diagnosis import Finding, Severity
from pagefold.plan.machine_state import MachineState

_HEADS = {
    Severity.STOPS: "Nothing merges",
    Severity.LOSES: "Some pages never merge",
    Severity.SLOWS: "Slow",
    Severity.COSTS: "Costs",
    Severity.NOTE: "Note",
}


def finding_dicts(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return findings for JSON."""
    return [{**asdict(one), "severity": one.severity.name.lower()} for one in findings]


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the lines of findings: what, why, remedy."""
    for one in findings:
        yield f"{_HEADS[one.severity]}: {one.words}."
        yield f"    {one.why}."
        if one.remedy:
            yield f"    Remedy: {one.remedy}"


def print_doctor(state: MachineState, findings: Sequence[Finding]) -> None:
    """Print the machine's state in words; commands stay on one line, to be copied."""
    advised = state.advised
    if advised is not None:
        print(f"{advised.pages:,} pages of {advised.processes:,} processes are advised MERGEABLE "
              f"({advised.looked_at:,} processes could be read).")  # fmt: skip
    for line in finding_lines(findings):
        print(line)


def print_doctor_json(state: MachineState, findings: Sequence[Finding]) -> None:
    """Print one JSON object: the state as read, and the findings."""
    print(json.dumps({"format": 1, "machine": asdict(state), "findings": finding_dicts(findings)}, indent=2))
