"""pagefold: same-page merging for Linux. Predict it, explain it, show that it is safe.

`Machine` is a simulated computer, `Engine` the merger over it. Both are loaded when first used, so that
`import pagefold` costs nothing and compiles nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagefold.engine import Counters, Engine, Intent
    from pagefold.machine import Area, Machine, Process

__all__ = ["Area", "Counters", "Engine", "Intent", "Machine", "Process", "__version__"]
__version__ = "0.1.0"
_HOMES = {"Counters": "engine", "Engine": "engine", "Intent": "engine"}
_HOMES |= {"Area": "machine", "Machine": "machine", "Process": "machine"}


def __getattr__(name: str) -> Any:
    """Load a public class from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pagefold' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pagefold.{_HOMES[name]}"), name)
