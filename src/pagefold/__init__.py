"""pagefold: same-page merging for Linux. Predict it, explain it, show that it is safe.

`Machine` is a simulated computer, `Engine` the merger over it; `merge`, `advise`, `unadvise`, `enable`, `stats` and `settled` merge the
real memory of this process with that of others. All are loaded when first used: `import pagefold` costs nothing and compiles nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagefold.engine import Counters, Engine, Intent
    from pagefold.live.client import Handle, Report, advise, enable, merge, settled, stats, unadvise
    from pagefold.machine import Area, Machine, Process

__all__ = [
    "Area",
    "Counters",
    "Engine",
    "Handle",
    "Intent",
    "Machine",
    "Process",
    "Report",
    "__version__",
    "advise",
    "enable",
    "merge",
    "settled",
    "stats",
    "unadvise",
]
__version__ = "0.1.0"
_HOMES = {"Counters": "engine", "Engine": "engine", "Intent": "engine"}
_HOMES |= {"Area": "machine", "Machine": "machine", "Process": "machine"}
_HOMES |= dict.fromkeys(
    ("Handle", "Report", "advise", "enable", "merge", "settled", "stats", "unadvise"), "live.client"
)


def __getattr__(name: str) -> Any:
    """Load a public class from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pagefold' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pagefold.{_HOMES[name]}"), name)


def _before_fork() -> None:
    """Load the agent, if this is the first fork: only then do parent and child know of each other's pages without a daemon."""
    from contextlib import suppress
    from importlib import import_module

    from pagefold.errors import PagefoldError

    with suppress(PagefoldError, ImportError):  # there is none; who calls it will be told
        import_module("pagefold.live.client")


os.register_at_fork(before=_before_fork)
