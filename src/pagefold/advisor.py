"""Own the scan-time advisor: after each full scan it sets how many pages the next batches look at (spec section 8).

All in integers, every divisor at least 1. Must not know clocks: the time and CPU a scan took are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

_WEIGHT = 30  # % of the newest change in the weighted average
_MIN_CPU = 10  # % below which the CPU bound is never applied


@dataclass
class Advisor:
    """Remember what the advisor needs from the scans before; a new one for each time the mode is switched on."""

    change: int = 0  # weighted average of 100 * scan time / scan time before
    scan_time: int = 0  # seconds, of the last scan; 0 before the first

    def advise(
        self, pages_to_scan: int, seconds: int, cpu_percent: int, *, target: int, max_cpu: int, max_pages: int
    ) -> int:
        """Return the new pages_to_scan after a full scan of `seconds` that used `cpu_percent` of one CPU."""
        seconds = max(seconds, 1)
        cpu_percent = max(cpu_percent, 1)
        factor = max(100 * target // seconds, 1)
        change = max(100 * seconds // (self.scan_time or seconds), 1)
        self.change = ((100 - _WEIGHT) * self.change + _WEIGHT * change) // 100
        self.scan_time = seconds
        pages = (pages_to_scan * 100 // factor) * self.change // 100
        per_percent = max(pages_to_scan // cpu_percent, 1)
        pages = max(min(pages, per_percent * max_cpu), per_percent * _MIN_CPU)
        return min(pages, max_pages)
