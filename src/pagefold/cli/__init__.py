"""Own the command line: one file per verb, and the one place that catches errors.

Every verb imports what it needs when it runs, so that `pagefold --help` loads nothing that is compiled.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and an exit code."""
    from pagefold.cli.app import app
    from pagefold.errors import PagefoldError
    from pagefold.view.line import one_line

    try:
        app(prog_name="pagefold")
    except PagefoldError as error:
        print(f"pagefold: {one_line(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
