"""Own what happens at the start of a process for which `pagefold run --enable` set the environment: enable() with NumPy, not before.

Costs a worker that never loads NumPy nothing but this module. Must not know: what enable() does.
"""

from __future__ import annotations

import os
import sys

from pagefold.live import loading

VARIABLE = "PAGEFOLD_ENABLE"


def begin() -> None:
    """Do what the environment asks for; called by `site/sitecustomize.py`, and must never end the process."""
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        loading.when_loaded("numpy", _enable)


def _enable() -> None:
    try:
        from pagefold.live import client

        client.enable()
    except Exception as error:
        complain(error)


def complain(error: BaseException) -> None:
    """Say in one line on stderr that this process goes on without pagefold."""
    text = " ".join(str(error).split())
    print(f"pagefold: not enabled in process {os.getpid()}: {text or type(error).__name__}", file=sys.stderr)
