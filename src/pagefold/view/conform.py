"""Own how a comparison is shown: a table of scenarios by host, then every difference; JSON for programs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagefold.scenario.conform import BAD, Row
from pagefold.scenario.files import Scenario
from pagefold.view.line import one_line

_STYLES = {"equal": "green", "ran": "green", "skipped": "dim", "different": "bold red", "failed": "bold red"}
_PIPE_WIDTH = 120  # columns, where there is no terminal to ask
_MOST_THINGS = 12  # of one difference; JSON has all


def print_json(rows: Sequence[Row]) -> None:
    """Print one JSON object: what came of every scenario on every host."""
    print(json.dumps({"format": 1, "rows": [_as_json(row) for row in rows]}, indent=2))


def _as_json(row: Row) -> dict[str, Any]:
    difference = row.difference and {
        "step": row.difference.step,
        "line": row.difference.line,
        "things": [
            {"what": what, "reference": reference, "host": host} for what, reference, host in row.difference.things
        ],
    }
    return {
        "scenario": row.scenario.name,
        "file": str(row.scenario.path),
        "host": row.kind,
        "nodes": row.nodes,
        "release": row.release,
        "state": row.state,
        "why": row.why,
        "reference": row.reference,
        "steps": row.steps,
        "difference": difference,
        "repeat": row.repeat,
    }


def print_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the table, why scenarios were skipped, and every difference with the line that repeats it."""
    console = console or Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    hosts = list(dict.fromkeys(map(_host, rows)))
    table = Table(title=_title(rows), title_justify="left", expand=True)
    table.add_column("scenario", no_wrap=True)
    for host in hosts:
        table.add_column(host, no_wrap=True)
    table.add_column("shows", style="dim", no_wrap=True, overflow="ellipsis", ratio=1)
    names = Counter(scenario.name for scenario in {row.scenario for row in rows})
    by_scenario: dict[Scenario, dict[str, Row]] = {}
    for row in rows:
        by_scenario.setdefault(row.scenario, {})[_host(row)] = row
    for scenario, found in by_scenario.items():
        name = f"{scenario.path.stem}::{scenario.name}" if names[scenario.name] > 1 else scenario.name
        states = [Text(found[host].state, _STYLES[found[host].state]) if host in found else Text("") for host in hosts]
        table.add_row(Text(one_line(name)), *states, Text(one_line(scenario.shows)))
    console.print(table)
    for line in _said(rows):
        console.print(Text(line), soft_wrap=line.startswith("  "))  # a command must stay one line


def _host(row: Row) -> str:
    return f"{row.kind}, {row.nodes} node{'s' if row.nodes > 1 else ''}"


def _title(rows: Sequence[Row]) -> str:
    releases = {f"{row.kind}: Linux {row.release}" for row in rows if row.release}
    return "; ".join(sorted(releases)) or "no real kernel took part"


def _said(rows: Sequence[Row]) -> Iterator[str]:
    skipped = Counter((_host(row), row.why) for row in rows if row.state == "skipped")
    for (host, why), count in skipped.items():
        yield f"Skipped on {host}: {count}, because it {why}."
    for row in rows:
        if row.state in BAD:
            yield ""
            yield f"{row.scenario.name} on {_host(row)}: {row.state}{f': {one_line(row.why)}' if row.why else ''}"
            yield from _differs(row)
            yield f"  Again: {row.repeat}"
    counted = {state: sum(row.state == state for row in rows) for state in _STYLES}
    yield ""
    counts = ", ".join(f"{count} {state}" for state, count in counted.items() if count)
    yield counts if any(row.reference for row in rows) else f"{counts}: nothing was compared"


def _differs(row: Row) -> Iterator[str]:
    if row.difference is None:
        return
    yield f"  Step {row.difference.step}: {row.difference.line}"
    wide = max(len(what) for what, _, _ in row.difference.things)
    for what, reference, host in row.difference.things[:_MOST_THINGS]:
        yield f"    {what:{wide}}  {row.reference}: {reference};  {row.kind}: {host}"
    if len(row.difference.things) > _MOST_THINGS:
        yield f"    and {len(row.difference.things) - _MOST_THINGS} more (--json has all)"
