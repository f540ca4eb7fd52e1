"""Own the table of scenarios by host at the end of docs/conformance.md: `python -m tests.conformance.table` writes it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from pagefold.scenario.files import LIBRARY, Scenario, load

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
TITLE = "## The scenarios\n"


def lines() -> Iterator[str]:
    """Yield the table: a part for each file, a line for each scenario, and on which hosts it is equal."""
    for path, scenarios in groupby(load(str(LIBRARY)), lambda scenario: scenario.path):
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        yield from ("", f"**{path.stem}.** {about.partition(chr(10))[0]}", "")
        yield "| scenario | shows | this kernel | 2 nodes | 4 nodes |"
        yield "|---|---|---|---|---|"
        for scenario in scenarios:
            marks = " | ".join("yes" if runs(scenario, nodes) else "-" for nodes in (1, 2, 4))
            yield f"| `{scenario.name}` | {scenario.shows} | {marks} |"


def runs(scenario: Scenario, nodes: int) -> bool:
    """Tell whether a host with so many nodes can run it; memory can go offline in guests alone."""
    return scenario.nodes <= nodes and not (nodes == 1 and "offline" in scenario.needs)


def text() -> str:
    """Return the page with the table as it should be."""
    return PAGE.read_text().partition(TITLE)[0] + TITLE + "\n".join(lines()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text())
