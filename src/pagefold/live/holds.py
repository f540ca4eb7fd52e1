"""Own which memory of this process the agent may touch, who wants that, and until when.

A *hold* is what one call of `merge` or `advise` took: it names pages. A *region* is what the agent knows: memory that does not overlap
another region's, with all the holds that want pages of it. Whether it can be merged the agent finds out when it must, for many at once:
`look`. Why no region outlives its memory, whatever threads and the collector do:

1. A hold of `advise`, and any hold of memory that no NumPy array owns, references the owner: the memory stays.
2. A hold of `merge` on a NumPy array's own memory only watches the array: a weak reference. NumPy clears it, and so calls `_gone`,
   before it frees the memory. `_gone` waits for no lock of ours: it ends the region at once; only the books are put right in turn.
3. Everything else that ends a region does so in turn, with strong references to all owners that the region watches; if one cannot
   be had, the array is on its way to `_gone`, and its region is left to that. So a region is ended by one thread, once.
4. `merge` asks the agent about a region out of turn, but with strong references too; if the region is ended meanwhile, the agent says so.
5. Regions of arrays that enable() serves are the agent's own: it ends them when the memory is freed. Holds only name them (`others`).
6. `_gone` marks its regions dead before the memory is freed, and so before it can be allocated again: a dead region in the place of a
   new one is of the past.

Must not know: kinds of buffers, reports.
"""

from __future__ import annotations

import _thread
import bisect
import errno
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

from pagefold.live import vmas
from pagefold.live.buffers import PAGE, Piece
from pagefold.live.hold import Agent, Hold, Other, Region, Watch
from pagefold.live.turn import Turn

ADVISED_TWICE = "advised by the memory handler of enable() already"
_TRIES = 3
_VERDICTS = (errno.EOPNOTSUPP, errno.ENOMEM)  # on a mapping; other errors of a look pass, and the next look asks again
ENDING = "the interpreter is about to end"
NO_MEMORY = "no memory for one more region, or the limit on mappings is reached (vm.max_map_count)"


class Holds:
    """All holds and regions of this process."""

    def __init__(self, agent: Agent) -> None:
        self.turn = Turn()
        self.closed = False  # the interpreter ends: the agent has stopped, and memory may go as it likes
        self._agent = agent
        self._starts: list[int] = []  # of the regions, ascending
        self._regions: dict[int, Region] = {}  # by start
        self._watches: dict[int, Watch] = {}  # by id of the array

    def take(self, pieces: list[Piece], *, quiet: bool) -> Hold:
        """Hold pieces. The caller references their owners until this returns."""
        hold = Hold(quiet=quiet)
        alive: list[Any] = []
        try:
            self.turn.run(lambda: self._take(hold, pieces, alive))
        except BaseException:
            self.release(hold)
            raise
        return hold

    def release(self, hold: Hold) -> int:
        """Let go; pages that nobody wants any more become private again. Returns how many could not become anonymous. Idempotent."""
        alive: list[Any] = []  # given up when this returns, and not in turn: that may run anybody's code
        stayed = self.turn.run(lambda: self._release(hold, alive))
        hold.keeps = []
        return int(stayed or 0)

    def look(self, hold: Hold) -> None:
        """Have the agent look at what this hold wants; what cannot be merged is let go, and counted in `why_not`."""
        regions = list(hold.regions)
        if self.closed or not (hold.others or (hold.keeps and not regions) or any(not one.seen for one in regions)):
            return
        alive: list[Any] = []  # as in release
        self.turn.run(lambda: self._look(hold, alive))

    def let_go(self, address: int, size: int) -> None:
        """End everything in this memory, which stays until this returns; its owner moves or frees it next."""
        if not self.closed:
            self.turn.run(lambda: [self._drop(region) for region in self._between(address, address + size)])

    def regions(self) -> list[Region]:
        """Return all regions, by address."""
        return sorted([*self._regions.values()], key=lambda region: region.start)

    # --- in turn --------------------------------------------------------------------------------------------------------------

    def _take(self, hold: Hold, pieces: list[Piece], alive: list[Any]) -> None:
        for piece in pieces:
            if self.closed:
                hold.refuse(ENDING, (piece.end - piece.start) // PAGE)
                continue
            watch = self._watch(piece)
            had = len(hold.regions), len(hold.others)
            if not hold.quiet:
                for region in self._between(piece.start, piece.end):
                    if region.quiet and self._reference(region, alive):
                        self._remake(region, [(region.start, region.end)], quiet=False)
                        hold.begun_anew += self._between(region.start, region.end)
            at = piece.start
            for region in self._between(piece.start, piece.end):
                self._fill(at, region.start, hold, watch)
                self._join(region, hold, [(max(at, region.start), min(piece.end, region.end))], watch)
                at = region.end
            self._fill(at, piece.end, hold, watch)
            if (len(hold.regions), len(hold.others)) != had and (watch is None or not hold.quiet):
                hold.keeps += [
                    piece.owner.keep,
                    watch,
                ]  # NumPy refuses to resize an array while there is a weak reference to it
            if watch is not None:
                self._drop_unused(watch)

    def _look(self, hold: Hold, alive: list[Any]) -> None:
        marks = functools.cache(vmas.Marks)  # read if it must be, and then once
        for region in [one for one in hold.regions if not one.seen]:
            if region.dead or not self._reference(region, alive):
                continue
            code = self._agent.suits(region.number)
            region.seen = code >= 0
            if -code in (*_VERDICTS, errno.ENOENT):
                reason = _why_refused(-code, region.start, region.end, marks)
                for one, wanted in region.holds.items():
                    one.refuse(reason, sum(end - start for start, end in wanted) // PAGE)
                self._drop(region)
        for other in hold.others[:]:
            code = self._agent.suits(other.number)
            if -code in _VERDICTS:
                hold.refuse(_why_refused(-code, other.start, other.end, marks), (other.end - other.start) // PAGE)
                hold.others.remove(other)
        if not hold.regions and not hold.others:
            alive += hold.keeps
            hold.keeps = []

    def _release(self, hold: Hold, alive: list[Any]) -> int:
        stayed = 0
        for region in list(hold.regions):
            region.holds.pop(hold, None)
            if region.dead or not self._reference(region, alive):
                continue
            loud = [span for one, spans in region.holds.items() if not one.quiet for span in spans]
            if not region.holds or (not loud and not hold.quiet):
                # What merge did to pages ends with their last advice: unadvise promises private copies.
                stayed += self._drop(region)
            elif not hold.quiet and _union(loud) != [(region.start, region.end)]:
                stayed += self._remake(region, _union(loud), quiet=False)
        hold.regions.clear()
        hold.others.clear()
        return stayed

    def _fill(self, start: int, end: int, hold: Hold, watch: Watch | None) -> None:
        """Make regions of memory that has none, as far as it can be merged."""
        for low, high, reason in list(vmas.split([(start, end)] if start < end else [])):
            if reason:
                hold.refuse(reason, (high - low) // PAGE)
                continue
            region = self._begin(low, high, {hold: [(low, high)]}, quiet=hold.quiet)
            if region and watch is not None:
                self._attach(region, watch)

    def _begin(self, start: int, end: int, holds: dict[Hold, list[tuple[int, int]]], *, quiet: bool) -> Region | None:
        """Make a region that these holds want, each these pages of it."""
        numbers: list[int] = []
        region = Region(start, end, 0, quiet=quiet)
        try:
            # In one go, so that not even Ctrl-C comes between the agent's answer and our knowing it.
            numbers += map(self._agent.advise, (start,), (end - start,), (int(quiet),))
            region.number = numbers[0]
            if region.number > 0:
                self._regions[start] = region
                bisect.insort(self._starts, start)
                for hold, spans in holds.items():
                    self._join(region, hold, spans, None)
                return region
        except BaseException:
            if numbers and numbers[0] > 0:
                region.number = numbers[0]
                self._drop(region)
            raise
        if -region.number == errno.EEXIST:
            other, low, high = self._agent.find(start)
            if other > 0 and low <= start and end <= high:
                for hold in holds:
                    hold.others.append(Other(other, start, end, (low < start) + (end < high)))
                return None
        reason = _why_refused(-region.number, start, end, vmas.Marks)
        for hold in holds:
            hold.refuse(reason, region.pages)
        return None

    def _join(self, region: Region, hold: Hold, spans: list[tuple[int, int]], watch: Watch | None) -> None:
        region.holds.setdefault(hold, []).extend(spans)
        hold.regions.add(region)
        if watch is not None:
            self._attach(region, watch)

    def _attach(self, region: Region, watch: Watch) -> None:
        region.watches.add(watch)
        watch.regions.add(region)
        self._watches[watch.key] = watch

    def _remake(self, region: Region, spans: list[tuple[int, int]], *, quiet: bool) -> int:
        """End a region and begin others with its holds: the agent cannot change one. Its merged pages begin anew."""
        watches = [*region.watches]
        stayed = self._drop(region)
        for low, high in spans:
            wanted = {
                hold: [(max(a, low), min(b, high)) for a, b in spans if a < high and low < b]
                for hold, spans in region.holds.items()
            }
            made = self._begin(low, high, {hold: spans for hold, spans in wanted.items() if spans}, quiet=quiet)
            if made:
                for watch in watches:
                    self._attach(made, watch)
        return stayed

    def _drop(self, region: Region) -> int:
        """End a region, its pages private and anonymous; returns how many could not be."""
        if region.dead:
            return 0
        stayed = self._agent.unadvise(region.number, quietly=region.quiet)
        region.dead = True
        self._remove(region)
        watches = [*region.watches]
        region.watches.clear()
        for watch in watches:
            watch.regions.discard(region)
            self._drop_unused(watch)
        return max(stayed, 0)

    def _remove(self, region: Region) -> None:
        if self._regions.get(region.start) is region:
            place = bisect.bisect_left(self._starts, region.start)
            if self._starts[place : place + 1] == [region.start]:
                del self._starts[place]
            del self._regions[region.start]
        for hold in region.holds:
            hold.regions.discard(region)

    def _between(self, start: int, end: int) -> list[Region]:
        """Return the regions that touch a range, ascending; dead ones are put away."""
        first = max(bisect.bisect_right(self._starts, start) - 1, 0)
        last = bisect.bisect_left(self._starts, end)
        found = [self._regions[one] for one in self._starts[first:last]]
        for region in found:
            if region.dead:
                self._remove(region)
        return [region for region in found if not region.dead and region.end > start]

    # --- owners ---------------------------------------------------------------------------------------------------------------

    def _watch(self, piece: Piece) -> Watch | None:
        array = piece.owner.array
        if array is None:
            return None
        watch = self._watches.get(id(array))
        if watch is None or watch() is not array:
            watch = self._watches[id(array)] = Watch(array, self._gone, dies=piece.owner.dies)
        return watch

    def _drop_unused(self, watch: Watch) -> None:
        # NumPy refuses to resize an array while there is a weak reference to it.
        if not watch.regions and self._watches.get(watch.key) is watch:
            del self._watches[watch.key]

    def _reference(self, region: Region, alive: list[Any]) -> bool:
        """Reference all owners that a region watches, in `alive`; False if one is going: then `_gone` ends the region."""
        owners = [watch() for watch in region.watches]
        alive += owners
        return all(owner is not None for owner in owners)

    def _gone(self, watch: Watch) -> None:
        """End the regions of an array that goes: called by its weak reference, in any thread, in the middle of anything."""
        interrupted = False
        for region in () if self.closed else [*watch.regions]:
            while not region.dead:
                try:
                    if watch.dies:
                        self._agent.discard(region.number)
                    else:
                        self._agent.unadvise(region.number, quietly=True)
                    region.dead = True
                except (
                    BaseException
                ):  # Ctrl-C: from here it would get no further, and the memory is not to be freed before this is done
                    interrupted = True
        self.turn.try_run(lambda: self._sweep(watch))
        if interrupted:  # from here it would be lost
            _thread.start_new_thread(_thread.interrupt_main, ())

    def _sweep(self, watch: Watch) -> None:
        for region in list(watch.regions):
            self._remove(region)
        watch.regions.clear()
        self._drop_unused(watch)


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ascending spans that do not touch, of the same pages."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return joined


def _why_refused(code: int, start: int, end: int, marks: Callable[[], vmas.Marks]) -> str:
    if code == errno.EEXIST:
        return ADVISED_TWICE
    if code == errno.ENOMEM:
        return NO_MEMORY
    if code == errno.EOPNOTSUPP:
        return marks().explain(start, end)
    return f"the agent refused it ({os.strerror(code)})"
