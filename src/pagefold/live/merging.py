"""Own one domain's merging: clients' memory into the mirror, the engine's wishes into windows, and what became of them back.

One call of `step` does a bounded piece of work. Must not know: how packets arrive, when to rest.

Why the mirror may be wrong and nothing is lost: a client's bytes are looked at when its kernel says they were written, and may change the
next moment. The mirror only decides what is worth trying. Whether a page maps a slot is decided in the client's window, by its bytes;
what the mirror wanted and the window refused is taken back in the mirror, and left alone for a while.
"""

from __future__ import annotations

import contextlib

import numpy as np

from pagefold.live import messages
from pagefold.live.looking import Looking
from pagefold.live.messages import PAGE
from pagefold.live.mirror import Mirror
from pagefold.live.peer import MOST_PAGES, MOST_REGIONS, Batch, Counts, Peer
from pagefold.live.planner import Run, by_region, runs_of, within_budget
from pagefold.live.region import FOREVER, HOLE, SHIFT, Int64, Region
from pagefold.live.slots import Slots, Source
from pagefold.live.store import Store, StoreFull

_FOR_GOOD = (messages.UNSUITABLE, messages.BROKEN, messages.BAD, messages.OFF)
_QUIET = 3  # passes: one to learn a page, one to enter a tree, one to meet an equal there
_QUIET_SMART = 10  # smart scan leaves pages alone for up to 8
_PAUSE = 4  # looks until a full store is tried again
_SOURCES = (
    3  # pages that are tried, one after the other, to fill a slot from: any of them may have been written meanwhile
)
_SHARE = 4  # pages that are tracked at most, in shares of what the machine has: merged ones take no memory
STEP_PAGES = 8192  # most pages scanned in one step: their windows free memory for the next ones, while those are filled
_MOST_VPN = 1 << 44  # of a client's mirror: no page number is used twice


class Merging:
    """The state of a domain's merging."""

    def __init__(self, nodes: int, knobs: dict[str, int | str]) -> None:
        self.nodes = nodes
        self.mirror = Mirror(nodes, knobs)
        self.store = Store(nodes)
        self.slots = Slots(self.store, self.mirror)
        self.peers: dict[int, Peer] = {}  # by mm of the mirror
        self.syncing: set[Region] = set()  # regions whose client waits in pagefold.merge
        self.full = ""  # why the store takes no more, empty if it does
        self.passes = 0  # over everything, ever
        self.calm_passes = 0  # passes in a row in which nothing merged
        self.still_passes = 0  # and in which nothing was written either
        self.looking = Looking(self.mirror)
        self.past = Counts()  # of clients that are gone
        self._looked = self._short = False  # since the last pass ended: looked at clients, had too little memory
        self._full_until = 0

    # --- clients ------------------------------------------------------------------------------------------------------------

    def join(self, peer: Peer) -> None:
        """Begin with a client."""
        peer.process = self.mirror.attach()
        self.peers[peer.process.mm] = peer

    def leave(self, peer: Peer) -> None:
        """End with a client: what it maps stays its own affair."""
        if peer.process is None:
            return
        self.peers.pop(peer.process.mm)
        self.past.add(peer.counts)
        self.syncing -= set(peer.regions.values())
        self.mirror.detach(peer.process)
        self.looking.forget(peer)
        peer.process = None
        self.stir()

    def advise(self, peer: Peer, said: np.void) -> bool:
        """Begin with a region of a client; False if it is too much for us: then nothing happens to it."""
        number, start, pages = peer.check_advise(said)
        assert peer.process is not None
        most = min(MOST_PAGES - peer.tracked_pages, _SHARE * MOST_PAGES - self.mirror.pages)
        if pages > most or len(peer.regions) >= MOST_REGIONS:
            peer.ignored.add(number)
            return False
        vpn = self.mirror.map(peer.process, pages)
        if vpn + pages > _MOST_VPN:
            raise messages.BadMessage(f"client {peer.pid} has advised more memory than there can be")
        tracked, quiet = bool(said["tracked"]), bool(said["quiet"])
        peer.add(Region(number, start, pages, tracked=tracked, quiet=quiet, vpn=vpn))
        self.stir()
        return True

    def unadvise(self, peer: Peer, number: int) -> None:
        """End with a region; its client gives the memory back by itself."""
        if number in peer.ignored:
            peer.ignored.remove(number)
            return
        region = peer.regions.get(number)
        if region is None or peer.process is None:
            raise messages.BadMessage(f"client {peer.pid} ended region {number}, which it does not have")
        peer.remove(region)
        self.mirror.unmap(peer.process, region)
        self.syncing.discard(region)
        self.looking.forget(peer, region)
        self.stir()

    def sync(self, peer: Peer, region: Region) -> None:
        """Try everything in a region anew, whatever was refused before; and what others gave to merge, where windows are safe."""
        others = (
            other
            for one in self.peers.values()
            if one.windows_safe and not self.syncing  # else they were freed for the one before
            for other in one.regions.values()
            if other.quiet and other.holds
        )
        freed = {region, *others}
        self.syncing.add(region)
        for other in freed:
            held = np.flatnonzero((other.held_until > 0) & ~other.broken)
            other.held_until[held] = 1
            other.refusals[held] = 0
        self.stir()

    def stir(self) -> None:
        """Note that something may merge that could not before."""
        self.calm_passes = self.still_passes = 0

    # --- one step --------------------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Tell whether nothing more can merge as memory is now: passes enough without a merge, and no answer outstanding.

        Nobody waits for the answer of a client that has been silent for long.
        """
        busy = self.reading or any(peer.pending and not peer.silent for peer in self.peers.values())
        return not busy and self.calm_passes >= self._quiet

    def find_broken(self) -> None:
        """Note what was written of what is merged; for a time in which nobody looks further."""
        for peer in self.peers.values():
            with contextlib.suppress(OSError):  # it ended; its connection says so soon
                self.looking.find_broken(peer)

    @property
    def idle(self) -> bool:
        """Tell whether a pass over the mirror would find it as the last ones left it."""
        return self.settled and self.still_passes >= self._quiet

    def settled_since(self, looks: int) -> bool:
        """Tell whether nothing more can merge as memory was after so many looks: whoever has just written wants that in."""
        return self.settled and self.looking.looks > looks + (0 if self.idle else self._quiet)

    @property
    def _quiet(self) -> int:
        """Return the passes without a merge after which none comes."""
        return _QUIET_SMART if self.mirror.engine.get("smart_scan") else _QUIET

    @property
    def reading(self) -> bool:
        """Tell whether pages wait to be read and hashed."""
        return self.looking.reading

    def step(self, pages: int) -> bool:
        """Read, or scan up to `pages` (at most STEP_PAGES) pages and ask for windows. False if there was nothing to do."""
        if self.reading:
            if self.looking.read():
                self.still_passes = 0
            for peer, region, index in self.looking.unreadable:
                self.refused(peer, region, index, np.full(len(index), messages.ABSENT, np.uint8))
            return True
        if self.mirror.at_start and not self._looked:
            self._looked = True
            changed = self.looking.look(list(self.peers.values()), self.syncing)
            if self.nodes > 1:
                self.slots.sweep()  # a frame that was freed may be taken for one that moves: its slot would be lost
                changed |= self.looking.follow_migrations(self.peers.values(), self.store, self.slots)
            if changed:
                self.still_passes = 0
            if self.reading:
                return True
        if self.mirror.at_start:
            nothing = self.idle or self.mirror.empty
            if nothing or (self.full and self.looking.looks < self._full_until):
                self._looked = False
                self.calm_passes += int(nothing)
                self.still_passes += int(nothing)
                return False
        before = self.mirror.passes
        self.mirror.engine.scan(min(pages, STEP_PAGES))
        self.carry_out()
        if self.mirror.passes != before:
            if not self._short:
                self.full = ""  # whoever wanted more is gone, or has it
            self._looked = self._short = False
            self.passes += 1
            self.calm_passes += 1
            self.still_passes += 1
        return True

    # --- wishes and windows ------------------------------------------------------------------------------------------------------

    def carry_out(self) -> None:
        """Ask clients for what the engine has decided since the last call."""
        pieces: list[tuple[Peer, Region, Int64, Int64, Int64]] = []
        for wish in self.mirror.wishes():
            peer = self.peers.get(wish.mm)
            if peer is not None:
                for region, at in peer.by_vpn(wish.vpns):
                    pieces.append((peer, region, wish.vpns[at] - region.vpn, wish.frames[at], wish.order[at]))
        if not pieces:
            return
        try:
            self._fill(pieces)
            self.full = ""
        except StoreFull as error:
            self._pause(str(error))
        by_peer: dict[Peer, list[tuple[Region, Int64, Int64]]] = {}
        apart = self.nodes > 1 and not self.mirror.engine.get("merge_across_nodes")
        for peer, region, index, frames, _ in pieces:
            target = np.where(frames > 0, self.slots.of(np.maximum(frames, 0)), frames)
            if apart:
                kept = self._still_there(peer, region, index, frames, target)
                index, frames, target = index[kept], frames[kept], target[kept]
            without = (frames > 0) & (target == 0)
            if without.any() and self.full:
                self._take_back(peer, region, index[without])
            elif without.any():
                self.refused(peer, region, index[without], np.full(int(without.sum()), messages.DIFFERS, np.uint8))
            by_peer.setdefault(peer, []).append((region, index[~without], target[~without]))
        for peer, wanted in by_peer.items():
            self.ask(peer, wanted)

    def _still_there(
        self, peer: Peer, region: Region, index: Int64, frames: Int64, target: Int64
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Tell which pages and slots are on the node where the last look found them, and take the other wishes back.

        The kernel too asks for the node when it has found an equal: nothing merges onto a page that is misplaced by then.
        """
        kept = np.ones(len(index), np.bool_)
        asked = np.flatnonzero(target > 0)
        address = region.start + index[asked] * PAGE
        kept[asked] = ~self.looking.astray(peer, address, frames[asked], self.store, self.slots)
        if not kept.all():
            self._take_back(peer, region, index[~kept])
        return kept

    def _fill(self, pieces: list[tuple[Peer, Region, Int64, Int64, Int64]]) -> None:
        """Give slots to frames that have none yet, each filled from the first page that shall map it."""
        frames = np.concatenate([piece[3] for piece in pieces])
        order = np.concatenate([piece[4] for piece in pieces])
        owner = np.repeat(np.arange(len(pieces)), [len(piece[2]) for piece in pieces])
        address = np.concatenate([piece[1].start + piece[2] * PAGE for piece in pieces])
        open_ = np.flatnonzero(frames > 0)
        open_ = open_[np.argsort(order[open_], kind="stable")]
        for _ in range(_SOURCES):
            open_ = open_[self.slots.of(frames[open_]) == 0]
            if not len(open_):
                return
            _, first = np.unique(frames[open_], return_index=True)
            new = open_[np.sort(first)]
            open_ = np.delete(open_, first)
            peers = [pieces[at][0] for at in owner[new].tolist()]
            sources = []
            begin = 0
            for at in range(1, len(new) + 1):
                if at == len(new) or peers[at] is not peers[begin]:
                    part = new[begin:at]
                    sources.append(Source(peers[begin].reader, frames[part], address[part]))
                    begin = at
            self.slots.fill(sources)

    def _pause(self, why: str) -> None:
        """Ask for no more slots for a while."""
        self.full, self._short = why, True
        self._full_until = self.looking.looks + _PAUSE

    def _take_back(self, peer: Peer, region: Region, index: Int64) -> None:
        """Take back in the mirror what will not be done (ascending)."""
        assert peer.process is not None
        self.still_passes = 0
        self.mirror.refuse(peer.process, region.vpn + index)

    def ask(self, peer: Peer, wanted: list[tuple[Region, Int64, Int64]]) -> None:
        """Ask a client to let pages map slots, HOLE or (0) pages of their own; refuse for it what it cannot do."""
        runs: list[Run] = []
        for region, index, target in wanted:
            giving_back = peer.windows_safe and not target.any()
            quiet = not giving_back and not self.may_ask(peer, region)
            news = (region.wanted[index] != target) | (region.broken[index] & (target != 0))
            index, target = index[news], target[news]
            if quiet or peer.crowded:
                status = messages.OFF if quiet else messages.BUSY
                self.refused(peer, region, index, np.full(len(index), status, np.uint8))
            else:
                runs += runs_of(region, index, target)
        budget = max(peer.max_mappings // 2 - peer.mappings(), 0)
        runs, beyond = within_budget(runs, budget)
        self._refuse_runs(peer, beyond, messages.NO_VMA)
        for at in range(0, len(runs), messages.BATCH_RUNS):
            part = runs[at : at + messages.BATCH_RUNS]
            if peer.crowded or not self._introduce(peer, part):
                self._refuse_runs(peer, part, messages.BUSY)
            else:
                self._send(peer, part)

    def may_ask(self, peer: Peer, region: Region) -> bool:
        """Tell whether windows may be asked for in a region now: a quiet one is for the time in which somebody waits in merge."""
        return region in self.syncing or (peer.windows_safe and bool(self.syncing or not region.quiet))

    def _introduce(self, peer: Peer, runs: list[Run]) -> bool:
        """Send a client the descriptors of extents that are new to it; False if we have none left."""
        for number in sorted({run.target >> SHIFT for run in runs if run.target > 0} - peer.extents):
            extent = self.store[number]
            try:
                fd = extent.descriptor_for(peer.pid)
            except OSError as error:
                self._pause(f"no descriptor for client {peer.pid} ({error.strerror}); raise the daemon's ulimit -n")
                return False
            packet = messages.pack(messages.EXTENT, extent=number, slots=extent.slots, node=extent.node)
            peer.send(packet, [fd])
            peer.extents.add(number)
        return True

    def _send(self, peer: Peer, runs: list[Run]) -> None:
        batch = Batch([], [], [])
        for region, index, target in by_region(runs):
            batch.regions.append(region)
            batch.indices.append(index)
            batch.targets.append(target)
            region.wanted[index] = target
        plain = not peer.windows_safe
        peer.ask(batch, [run.record for run in runs], plain=plain)

    def outcome(self, peer: Peer, said: np.void) -> None:
        """Note what a client did."""
        batch, statuses = peer.take_batch(said)
        at = 0
        for region, index, target in zip(batch.regions, batch.indices, batch.targets, strict=True):
            status = statuses[at : at + len(index)]
            at += len(index)
            if peer.regions.get(region.number) is not region:
                continue
            done = (status == messages.MERGED) | (status == messages.ALREADY)
            region.became(index[done], target[done])
            region.stayed(index[~done], target[~done])
            region.refusals[index[done & (target != HOLE)]] = 0  # zeros that are written again and again are left alone
            region.status[index[done]] = status[done]
            private, refused = done & (target == 0), ~done & (target != 0)
            if private.any():  # whatever held a page back is over
                region.held_until[index[private]] = 1
                region.holds = True
            if ((status == messages.MERGED) & ~private).any():
                self.stir()
            if refused.any():
                self.refused(peer, region, index[refused], status[refused])
            late = index[done & (target != 0)]
            if len(late) and self.mirror.engine.get("run") == 2:  # asked for before, and done after, all was given back
                self.ask(peer, [(region, late, np.zeros(len(late), np.int64))])

    def refused(
        self, peer: Peer, region: Region, index: Int64, status: np.ndarray[tuple[int], np.dtype[np.uint8]]
    ) -> None:
        """Take back what a client did not do, and leave those pages (ascending) alone: longer each time, or for good."""
        if not len(index) or peer.process is None:
            return
        self.still_passes = 0
        self.mirror.refuse(peer.process, region.vpn + index)
        region.status[index] = status
        until = region.refused(index, self.looking.looks)
        until[np.isin(status, _FOR_GOOD)] = FOREVER
        alone = (status != messages.DIFFERS) | (region.refusals[index] > 2)
        if alone.any():
            region.hold(index[alone], until[alone])
            self.mirror.hold(peer.process, region.vpn + index[alone])

    def _refuse_runs(self, peer: Peer, runs: list[Run], status: int) -> None:
        for region, index, _ in by_region(runs):
            self.refused(peer, region, index, np.full(len(index), status, np.uint8))
