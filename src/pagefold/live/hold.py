"""Own the records of holds.py: what one call took, the regions it is made of, the owners that are watched; and what is asked of the agent.

Must not know: kinds of buffers, reports.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from pagefold.live.buffers import PAGE


class Agent(Protocol):
    """What is asked of the agent. Negative answers are errno."""

    advise: Callable[
        [int, int, int], int
    ]  # begin a region (start, size, quietly) and return its number; best no Python code

    def suits(self, region: int) -> int:
        """Tell whether a region can be merged: 0, or an errno."""

    def find(self, address: int) -> tuple[int, int, int]:
        """Return the region at an address, its start and its end; a negative number if there is none."""

    def unadvise(self, region: int, *, quietly: bool) -> int:
        """End a region, its pages private and anonymous; return how many could not be. `quietly`: nobody writes to it meanwhile."""

    def discard(self, region: int) -> int:
        """End a region whose content nobody wants: its merged pages become fresh memory."""


class Region:
    """Pages that the agent knows as one region."""

    __slots__ = ("dead", "end", "holds", "number", "quiet", "seen", "start", "watches")

    def __init__(self, start: int, end: int, number: int, *, quiet: bool) -> None:
        self.start = start
        self.end = end
        self.number = number
        self.quiet = quiet  # nothing in the background: only holds of merge want it
        self.dead = False  # the agent knows it no more
        self.seen = False  # the agent has looked at it, and it can be merged
        self.holds: dict[Hold, list[tuple[int, int]]] = {}  # and which pages of it each wants
        self.watches: set[Watch] = set()

    @property
    def pages(self) -> int:
        """Return how many pages it has."""
        return (self.end - self.start) // PAGE


class Other(NamedTuple):
    """Pages of a region that is the agent's own, for as long as the array is there."""

    number: int
    start: int
    end: int
    edges: int  # of its pages, next to those that are wanted: at its ends an array shares them with nobody


class Hold:
    """What one call took. `regions` may be more than its own pages, where another hold was there before."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.regions: set[Region] = set()
        self.keeps: list[object] = []  # strong references and exports
        self.others: list[Other] = []
        self.begun_anew: list[Region] = []  # for its sake: merged pages were private again for a moment
        self.why_not: dict[str, int] = {}

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Return the pages it wants and has, ascending."""
        own = [span for region in list(self.regions) for span in region.holds.get(self, ())]
        return sorted([*own, *((other.start, other.end) for other in list(self.others))])

    def refuse(self, reason: str, pages: int) -> None:
        """Count pages that it could not get."""
        self.why_not[reason] = self.why_not.get(reason, 0) + pages


class Watch(weakref.ref[Any]):
    """A weak reference to the array that owns the memory of regions."""

    __slots__ = ("dies", "key", "regions")

    def __init__(self, array: Any, gone: Callable[[Watch], None], *, dies: bool) -> None:
        self.key = id(array)
        self.dies = dies
        self.regions: set[Region] = set()

    def __new__(cls, array: Any, gone: Callable[[Watch], None], *, dies: bool) -> Watch:
        """As weakref.ref does it, which knows no further arguments."""
        return super().__new__(cls, array, gone)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other
