"""Own the one interface that scenarios speak, and what can be seen through it.

A host is something that can run a scenario: the simulated machine, this machine's kernel, or a kernel in a guest. Must not know which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from pagefold import settings
from pagefold.errors import PagefoldError
from pagefold.machine import Area

# The kernel's defaults, but for the clock: chains are pruned by what searches meet, not by the hour, unless a scenario says so.
# `run` is 1 from the begin: the host keeps the merger still between scans.
NEVER = 10**6  # ms
KNOBS: dict[str, int | str] = {
    "advisor_mode": "none",  # first: it rules pages_to_scan
    **{name: knob.default for name, knob in settings.KNOBS.items() if name not in ("run", "advisor_mode")},
    "stable_node_chains_prune_millisecs": NEVER,
}
COUNTERS = (
    *("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "full_scans", "pages_scanned"),
    *("pages_skipped", "ksm_zero_pages", "stable_node_chains", "stable_node_dups", "general_profit"),
)
STATS = ("ksm_rmap_items", "ksm_zero_pages", "ksm_merging_pages", "ksm_process_profit")  # of /proc/PID/ksm_stat
ZERO = -1  # the node of the zero page, which belongs to nobody
SWAP = -2
MOST_CONTENT = 2**64 - 1  # what `write` takes: its bytes, highest first, fill the page


class HostFailed(PagefoldError):  # noqa: N818
    """The host itself failed: what it ran on died, hung, or complained."""


class WrongFill(PagefoldError):  # noqa: N818
    """A page that was read is not one content's fill: data was lost."""


@dataclass(frozen=True)
class Place:
    """Where a page is: the node of its frame (ZERO: the zero page; SWAP), and its sharing group: equal frames, equal group."""

    node: int
    group: int


@dataclass(frozen=True)
class Observation:
    """All that can be seen at a moment.

    `counters` by the kernel's names; `processes` the counters of each living process; `pages` where each touched page is, by process
    number and page number. Groups are numbered in the order of their first page, so that they do not depend on frames.
    """

    counters: Mapping[str, int]
    processes: Mapping[int, Mapping[str, int]]
    pages: Mapping[tuple[int, int], Place]

    @classmethod
    def of(
        cls,
        counters: Mapping[str, int],
        processes: Mapping[int, Mapping[str, int]],
        pages: Iterable[tuple[int, int, int, int]],
    ) -> Observation:
        """Make it from (process, page number, node, frame) of every page."""
        groups: dict[tuple[int, int], int] = {}
        places = {}
        for number, vpn, node, frame in sorted(pages):
            key = (node, 0) if node < 0 else (0, frame)
            places[number, vpn] = Place(node, groups.setdefault(key, len(groups) + 1))
        return cls(dict(counters), {number: dict(stats) for number, stats in sorted(processes.items())}, places)

    def __getitem__(self, counter: str) -> int:
        """Return a counter."""
        return self.counters[counter]

    def place(self, process: HostProcess, area: Area, index: int) -> Place | None:
        """Return where a page is, None if it is not there."""
        return self.pages.get((process.number, area.vpn(index)))

    def sharers(self, process: HostProcess, area: Area, index: int) -> int:
        """Return how many pages map the frame of this one, itself included; 0 if it is not there."""
        place = self.place(process, area, index)
        return sum(other == place for other in self.pages.values()) if place else 0

    def differences(self, other: Observation) -> Iterator[tuple[str, str, str]]:
        """Yield (what, here, there) wherever two observations differ."""
        yield from _differ("", self.counters, other.counters)
        for number in sorted({*self.processes, *other.processes}):
            here, there = self.processes.get(number, {}), other.processes.get(number, {})
            yield from _differ(f"process {number} ", here, there)
        for page in sorted({*self.pages, *other.pages}):
            if self.pages.get(page) != other.pages.get(page):
                yield f"process {page[0]} page {page[1]}", _say(self.pages.get(page)), _say(other.pages.get(page))


def _differ(prefix: str, here: Mapping[str, int], there: Mapping[str, int]) -> Iterator[tuple[str, str, str]]:
    """Yield what differs of two sets of counters; one that an older kernel does not have is not compared."""
    for name in [name for name in here if name in there] if here and there else [*here, *there]:
        if here.get(name) != there.get(name):
            yield prefix + name, str(here.get(name)), str(there.get(name))


def _say(place: Place | None) -> str:
    if place is None:
        return "absent"
    where = {ZERO: "the zero page", SWAP: "in swap"}.get(place.node, f"node {place.node}")
    return f"{where}, group {place.group}"


class HostProcess(Protocol):
    """A process of a host. Errors: UsageError for what is not mapped, OSError as the kernel's calls."""

    @property
    def number(self) -> int:
        """1 for the first process of the scenario, then in the order of `spawn` and `fork`."""

    def fork(self) -> HostProcess:
        """Fork; areas keep their names in the child."""

    def exit(self) -> None:
        """End it; its pins end with it."""

    def mmap(self, pages: int, node: int | None = None) -> Area:
        """Map private anonymous memory, bound to a node if given, not yet touched."""

    def munmap(self, area: Area, first: int = 0, count: int | None = None) -> None:
        """Unmap `count` pages (default: the rest) of an area from its page `first`."""

    def write(self, area: Area, index: int, content: int) -> None:
        """Fill a page with a number from 0 (the zero page) to MOST_CONTENT; memcmp orders pages as the numbers are."""

    def read(self, area: Area, index: int) -> int:
        """Return a page's content, 0 if it was never touched (and stays so); WrongFill if it is not one content's fill."""

    def madvise(self, area: Area, advice: str) -> None:
        """Advise `MERGEABLE` or `UNMERGEABLE`."""

    def merge_any(self, on: bool) -> None:
        """Let all compatible memory of the process merge, now and in future, or end that."""

    def move_pages(self, area: Area, wishes: Mapping[int, int]) -> dict[int, int]:
        """Move pages to nodes, one by one; per page the node where it is now, or a negative errno (MPOL_MF_MOVE_ALL)."""

    def pin(self, area: Area, index: int) -> None:
        """Hold a long-term reference on a page, as a registered I/O buffer does."""

    def unpin(self, area: Area, index: int) -> None:
        """Give back the last pin of that page."""


class Host(Protocol):
    """Something that runs a scenario. `nodes` is how many NUMA nodes it has."""

    @property
    def nodes(self) -> int:
        """How many NUMA nodes."""

    def set(self, knob: str, value: int | str) -> None:
        """Set a knob; OSError with errno EBUSY or EINVAL as the kernel gives, UnknownKnob if there is none."""

    def get(self, name: str) -> int | str:
        """Return a knob or a counter; `pages_scanned` and `pages_skipped` count from the scenario's begin."""

    def spawn(self) -> HostProcess:
        """Start a process whose memory is wanted on node 0."""

    def offline(self, node: int) -> None:
        """Take a node's memory away; OSError EBUSY if some of it cannot be moved elsewhere, EINVAL for node 0 or a node without."""

    def online(self, node: int) -> None:
        """Put it back."""

    def scan(self, passes: int = 1) -> None:
        """Let that many further full scans complete; at once if nothing is advised. EngineStopped unless `run` is 1."""

    def observe(self) -> Observation:
        """Return all counters, and where every touched page of every process is."""


class FreshHost(Host, Protocol):
    """What the runner asks of a host besides: to say what it is, to begin afresh, and whether it is still sane."""

    @property
    def name(self) -> str:
        """What it is, as in `sim`, `kernel`, `guest`."""

    @property
    def release(self) -> str:
        """The kernel's release, "" if there is none."""

    @property
    def features(self) -> frozenset[str]:
        """Which needs of scenarios it meets: `pin`, `merge_any`, `offline`, and every knob that it has."""

    def begin(self, knobs: Mapping[str, int | str]) -> None:
        """Forget everything, and begin a scenario with KNOBS and these."""

    def end(self) -> None:
        """End the scenario: its processes are gone, nothing is merged."""

    def complaints(self) -> list[str]:
        """Return what went wrong beside the scenario (kernel warnings, broken invariants) since this was last asked."""
