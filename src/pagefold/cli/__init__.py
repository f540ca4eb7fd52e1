"""Own the command line: one file per verb, and the one place that catches errors.

Every verb imports what it needs when it runs, so that `pagefold --help` loads nothing that is compiled.
"""

from __future__ import annotations

import os
import sys


def command() -> None:
    """Be the command `pagefold`: as `main`, in a process that is ours alone."""
    if sys.argv[1:2] == ["explain-design"]:
        # A handful of pages: the same code, uncompiled, is done before a compiler would have begun. Numba reads this when it is loaded.
        os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
    main()


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and an exit code."""
    from pagefold.cli.app import app
    from pagefold.errors import PagefoldError
    from pagefold.view.line import one_line

    try:
        sys.exit(app(prog_name="pagefold", standalone_mode=False))
    except PagefoldError as error:
        print(f"pagefold: {one_line(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        # typer's own errors of usage are of a class that moved between its versions; they know how to say themselves.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            getattr(error, "show")()  # noqa: B009  (typed as a plain exception)
        else:
            print(f"pagefold: {one_line(error.format_message())} (see pagefold --help)", file=sys.stderr)
        sys.exit(error.exit_code)
