"""Own the hunt for planted bugs: each is looked for in its own small world.

`python -m pagefold.check.hunt [NAME ...]` prints the table of docs/checking.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from pagefold.check.bugs import BUGS, Bug
from pagefold.check.explore import Result, explore
from pagefold.check.planted import number_of, planted_engine
from pagefold.check.worlds import as_options


def hunt(bug: Bug) -> Result:
    """Explore the bug's world with the bug switched on."""
    return explore(bug.world, engine=planted_engine(), bug=number_of(bug.name))


def row(bug: Bug, result: Result) -> str:
    """Return a bug's line of the table."""
    found = result.violation
    invariant, length = (found.invariant, str(len(found.path))) if found else ("not found", "")
    question = f" (question {bug.answers})" if bug.answers else ""
    return f"| `{bug.name}` | {bug.what}{question} | `{invariant}` | {result.states:,} | {length} | `{as_options(bug.world)}` |"


def table(bugs: Sequence[Bug] = BUGS) -> Iterator[str]:
    """Yield the lines of the table, each as soon as its bug was found."""
    yield "| bug | what is done instead | found by | states | path | world |"
    yield "|---|---|---|---:|---:|---|"
    for bug in bugs:
        yield row(bug, hunt(bug))


if __name__ == "__main__":
    wanted = [bug for bug in BUGS if bug.name in sys.argv[1:] or len(sys.argv) == 1]
    for line in table(wanted):
        print(line, flush=True)
