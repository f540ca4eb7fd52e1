"""Own the question how much memory the store may still take before the kernel's OOM killer would answer it.

A memory file cannot ask for memory and be refused: under a full memory cgroup the kernel kills a process rather than fail the
call. So the limits are read first, those of every cgroup above us and of the machine, and a reserve is left. Must not know: the store.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PAGE = 4096
_RESERVE = 64 << 20  # bytes left alone, where there is much; of small limits a 32nd
_BUDGET = 4096  # pages that may be taken on the strength of one look
_FRESH = 0.1  # seconds that a look holds
_NO_LIMIT = 1 << 62  # what cgroup v1 says if there is none is above this


class Headroom:
    """Tell whether so many more pages would do; looks at limits at most every tenth of a second, or after 4,096 pages."""

    def __init__(
        self,
        proc: Path = Path("/proc"),
        nodes: Path = Path("/sys/devices/system/node"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proc, self._nodes, self._clock = proc, nodes, clock
        self._groups = list(_groups(proc))
        self._seen: dict[
            int | None, tuple[float, int, str]
        ] = {}  # by node: when, pages that may be taken, by what limit

    def short_of(self, pages: int, node: int | None = None) -> str:
        """Return why that many pages more (of a node, if given) are too many, or "" and count them as taken."""
        when, left, limit = self._seen.get(node, (float("-inf"), 0, ""))
        if pages > left or self._clock() - when > _FRESH:
            when, (left, limit) = self._clock(), self._look(node)
        if pages > left:
            self._seen.pop(node, None)
            return limit
        self._seen[node] = (when, min(left, max(_BUDGET, pages)) - pages, limit)
        return ""

    def _look(self, node: int | None) -> tuple[int, str]:
        """Return how many pages may be taken, and the limit that says so, with its remedy."""
        found = [self._machine(), *map(_group, self._groups)]
        if node is not None:
            found.append(self._node(node))
        left, limit = min(found)
        return max(left, 0) // PAGE, limit

    def _machine(self) -> tuple[int, str]:
        meminfo = _numbers(self._proc / "meminfo")
        total, available = meminfo.get("MemTotal", 0) << 10, meminfo.get("MemAvailable", 0) << 10
        return available - _reserve(total), f"the machine has {available >> 20} MiB left; end something"

    def _node(self, node: int) -> tuple[int, str]:
        path = self._nodes / f"node{node}" / "meminfo"
        try:
            figures = {name: int(value) for name, value in re.findall(r"([\w()]+):\s+(\d+) kB", path.read_text())}
        except OSError:
            return _NO_LIMIT, ""
        left = (figures.get("MemFree", 0) + figures.get("Inactive(file)", 0)) << 10
        return left, f"node {node} has {left >> 20} MiB left; end something there"


def _groups(proc: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the memory cgroups we are in, up to the root that can be seen, and whether each is of the second version."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
        mounts = (proc / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            head, _, tail = mount.partition(" - ")
            kind, _, options = tail.split(" ", 2)
            if kind != ("cgroup" if controllers else "cgroup2") or (controllers and "memory" not in options.split(",")):
                continue
            root, top = head.split(" ")[3], Path(head.split(" ")[4])
            below = inside.removeprefix(root if root != "/" else "").lstrip("/") if inside.startswith(root) else ""
            folder = top / below
            while folder != top.parent:
                if folder.is_dir():
                    yield folder, not controllers
                folder = folder.parent


def _group(group: tuple[Path, bool]) -> tuple[int, str]:
    folder, second = group
    limits = ("memory.max", "memory.high") if second else ("memory.limit_in_bytes",)
    limit = min((number for name in limits if (number := _number(folder / name)) is not None), default=_NO_LIMIT)
    used = _number(folder / ("memory.current" if second else "memory.usage_in_bytes"))
    if limit >= _NO_LIMIT or used is None:
        return _NO_LIMIT, ""
    if limit - used < limit // 8:  # near the limit, what could be reclaimed counts too; reading it costs more
        used -= _numbers(folder / "memory.stat").get("inactive_file" if second else "total_inactive_file", 0)
    what = "memory.max" if second else "memory.limit_in_bytes"
    return limit - used - _reserve(limit), f"the memory cgroup {folder} is at its limit; raise its {what}"


def _reserve(total: int) -> int:
    return min(_RESERVE, total // 32)


def _number(path: Path) -> int | None:
    """Return the number in a file; None if there is none ("max")."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines "name number" or "name: number kB"."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}
