"""Own what one command saved and when: asked of the daemon now and then while the command runs, for afterwards nobody knows.

Must not know: how it is shown.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pagefold.errors import PagefoldError
from pagefold.live import control

_INTERVAL = 0.5  # seconds between two questions
_BYTES_PER_SECOND = (
    2 << 30
)  # of advised memory, more seconds between two: the daemon counts all its pages for an answer
_PATIENCE = 5.0
_MOST_HELD = 0.9  # of the most memory that was ever advised: with less the command is winding down


@dataclass
class Savings:
    """What a command saved; times are seconds since it was started."""

    peak_saved_bytes: int = 0
    peak_seconds: float | None = None
    saved_bytes: int = 0  # when last asked before the command gave its memory back
    settled_seconds: float | None = None  # the first time that something was saved and nothing more could be
    stat: dict[str, Any] = field(default_factory=dict)  # the daemon's answer then; empty if there never were clients
    most_tracked_bytes: int = 0

    def take(self, stat: dict[str, Any], seconds: float) -> None:
        """Note an answer that came so long after the start."""
        offset = seconds - float(stat["uptime_seconds"])  # of the daemon's clock
        for at, saved in [*stat["history"], [stat["uptime_seconds"], stat["saved_bytes"]]]:
            when = at + offset
            if saved > self.peak_saved_bytes and when >= 0:
                self.peak_saved_bytes, self.peak_seconds = saved, round(when, 2)
        tracked = stat["tracked_bytes"]
        self.most_tracked_bytes = max(self.most_tracked_bytes, tracked)
        if not stat["clients"] or tracked < self.most_tracked_bytes * _MOST_HELD:
            return
        self.stat = stat
        self.saved_bytes = stat["saved_bytes"]
        if self.settled_seconds is None and stat["settled"] and stat["saved_bytes"] > 0:
            settled = stat["settled_seconds"]
            self.settled_seconds = round(seconds if settled is None else max(settled + offset, 0.0), 2)


class Sampler:
    """Ask the daemon at a path until told to end."""

    def __init__(self, path: Path) -> None:
        self.savings = Savings()
        self._path = path
        self._began = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="savings", daemon=True)

    def start(self) -> None:
        """Begin; the command starts now."""
        self._began = time.monotonic()
        self._thread.start()

    def end(self) -> Savings:
        """Ask a last time, and return what was found."""
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()
            self._ask()
        return self.savings

    def _run(self) -> None:
        while not self._end.wait(max(_INTERVAL, self.savings.most_tracked_bytes / _BYTES_PER_SECOND)):
            self._ask()

    def _ask(self) -> None:
        try:
            stat = control.ask(self._path, {"verb": "stat"}, _PATIENCE)
            self.savings.take(stat, time.monotonic() - self._began)
        except (PagefoldError, LookupError, TypeError, ValueError):
            pass  # busy, gone, or of another version: what we know stays
