"""Own one domain's merging: clients' memory into the mirror, the engine's wishes into windows, and what became of them back.

One call of `step` does a bounded piece of work. Must not know: how packets arrive, when to rest.

Why the mirror may be wrong and nothing is lost: a client's bytes are looked at when its kernel says they were written, and may change the
next moment. The mirror only decides what is worth trying. Whether a page maps a slot is decided in the client's window, by its bytes;
what the mirror wanted and the window refused is taken back in the mirror, and left alone for a while.
"""

from __future__ import annotations

import numpy as np

from pagefold.live import messages
from pagefold.live.looking import Looking
from pagefold.live.messages import PAGE
from pagefold.live.mirror import Mirror
from pagefold.live.peer import Batch, Peer
from pagefold.live.planner import Run, runs_of, within_budget
from pagefold.live.region import FOREVER, SHIFT, Int64, Region
from pagefold.live.slots import Slots, Source
from pagefold.live.store import Store, StoreFull

_LONGEST_HOLD = 6  # looks to wait double with every refusal, up to 2**this
_FOR_GOOD = (messages.UNSUITABLE, messages.BROKEN, messages.BAD, messages.OFF)
_QUIET = 3  # passes: one to learn a page, one to enter a tree, one to meet an equal there
_QUIET_SMART = 10  # smart scan leaves pages alone for up to 8


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
        self._looked = False  # since the last pass ended
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
        self.syncing -= set(peer.regions.values())
        self.mirror.detach(peer.process)
        self.looking.forget(peer)
        peer.process = None
        self.stir()

    def advise(self, peer: Peer, said: np.void) -> None:
        """Begin with a region of a client."""
        number, start, pages = peer.check_advise(said)
        assert peer.process is not None
        vpn = self.mirror.map(peer.process, pages)
        tracked, quiet = bool(said["tracked"]), bool(said["quiet"])
        peer.regions[number] = Region(number, start, pages, tracked=tracked, quiet=quiet, vpn=vpn)
        self.stir()

    def unadvise(self, peer: Peer, number: int) -> None:
        """End with a region; its client gives the memory back by itself."""
        region = peer.regions.pop(number, None)
        if region is None or peer.process is None:
            raise messages.BadMessage(f"client {peer.pid} ended region {number}, which it does not have")
        self.mirror.unmap(peer.process, region)
        self.syncing.discard(region)
        self.looking.forget(peer, region)
        self.stir()

    def sync(self, peer: Peer, region: Region) -> None:
        """Try everything in a region anew, whatever was refused before."""
        self.syncing.add(region)
        held = np.flatnonzero((region.held_until > 0) & ~region.broken)
        region.held_until[held] = 1
        region.refusals[held] = 0
        self.stir()

    def stir(self) -> None:
        """Note that something may merge that could not before."""
        self.calm_passes = self.still_passes = 0

    # --- one step --------------------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Tell whether nothing more can merge as memory is now: passes enough without a merge, and no answer outstanding."""
        need = _QUIET_SMART if self.mirror.engine.get("smart_scan") else _QUIET
        busy = self.reading or any(peer.pending for peer in self.peers.values())
        return not busy and self.calm_passes >= need

    @property
    def idle(self) -> bool:
        """Tell whether a pass over the mirror would find it as the last ones left it."""
        need = _QUIET_SMART if self.mirror.engine.get("smart_scan") else _QUIET
        return self.settled and self.still_passes >= need

    @property
    def reading(self) -> bool:
        """Tell whether pages wait to be read and hashed."""
        return self.looking.reading

    def step(self, pages: int) -> bool:
        """Read, or scan up to `pages` pages and ask for windows. False if there was nothing to do."""
        if self.reading:
            if self.looking.read():
                self.still_passes = 0
            return True
        if self.mirror.at_start and not self._looked:
            self._looked = True
            changed = self.looking.look(list(self.peers.values()))
            if self.nodes > 1:
                changed |= self.looking.follow_migrations(self.peers.values(), self.store, self.slots)
            if changed:
                self.still_passes = 0
            if self.reading:
                return True
        if self.mirror.at_start:
            nothing = self.idle or not any(peer.regions for peer in self.peers.values())
            if nothing or (self.full and self.looking.looks < self._full_until):
                self._looked = False
                self.calm_passes += int(nothing)
                self.still_passes += int(nothing)
                return False
        before = self.mirror.passes
        self.slots.sweep()
        self.mirror.engine.scan(pages)
        self.carry_out()
        if self.mirror.passes != before:
            self._looked = False
            self._end_pass()
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
            self.full = str(error)
            self._full_until = self.looking.looks + 16
        by_peer: dict[Peer, list[tuple[Region, Int64, Int64]]] = {}
        for peer, region, index, frames, _ in pieces:
            target = np.where(frames > 0, self.slots.of(np.maximum(frames, 0)), frames)
            without = (frames > 0) & (target == 0)
            if without.any():
                self.refused(peer, region, index[without], np.full(int(without.sum()), messages.DIFFERS, np.uint8))
            by_peer.setdefault(peer, []).append((region, index[~without], target[~without]))
        for peer, wanted in by_peer.items():
            self.ask(peer, wanted)

    def _fill(self, pieces: list[tuple[Peer, Region, Int64, Int64, Int64]]) -> None:
        """Give slots to frames that have none yet, each filled from the first page that shall map it."""
        frames = np.concatenate([piece[3] for piece in pieces])
        order = np.concatenate([piece[4] for piece in pieces])
        owner = np.repeat(np.arange(len(pieces)), [len(piece[2]) for piece in pieces])
        address = np.concatenate([piece[1].start + piece[2] * PAGE for piece in pieces])
        new = np.flatnonzero((frames > 0) & (self.slots.of(np.maximum(frames, 0)) == 0))
        new = new[np.argsort(order[new], kind="stable")]
        _, first = np.unique(frames[new], return_index=True)
        new = new[np.sort(first)]
        peers = [pieces[at][0] for at in owner[new].tolist()]
        sources = []
        begin = 0
        for at in range(1, len(new) + 1):
            if at == len(new) or peers[at] is not peers[begin]:
                part = new[begin:at]
                sources.append(Source(peers[begin].reader, frames[part], address[part]))
                begin = at
        self.slots.fill(sources)

    def ask(self, peer: Peer, wanted: list[tuple[Region, Int64, Int64]]) -> None:
        """Ask a client to let pages map slots, HOLE or (0) pages of their own; refuse for it what it cannot do."""
        runs: list[Run] = []
        for region, index, target in wanted:
            quiet = (region.quiet or not peer.windows_safe) and region not in self.syncing
            news = (region.where[index] != target) | (region.broken[index] & (target != 0))
            index, target = index[news], target[news]
            if quiet or peer.crowded:
                status = messages.OFF if quiet else messages.BUSY
                self.refused(peer, region, index, np.full(len(index), status, np.uint8))
            else:
                runs += runs_of(region, index, target)
        budget = max(peer.max_mappings // 2 - peer.mappings(), 0)
        runs, beyond = within_budget(runs, budget)
        for run in beyond:
            index = np.arange(run.index, run.index + run.pages, dtype=np.int64)
            self.refused(peer, run.region, index, np.full(run.pages, messages.NO_VMA, np.uint8))
        for at in range(0, len(runs), messages.BATCH_RUNS):
            self._send(peer, runs[at : at + messages.BATCH_RUNS])

    def _send(self, peer: Peer, runs: list[Run]) -> None:
        for number in sorted({run.target >> SHIFT for run in runs if run.target > 0} - peer.extents):
            extent = self.store[number]
            packet = messages.pack(messages.EXTENT, extent=number, slots=extent.slots, node=extent.node)
            peer.send(packet, [extent.descriptor_for(peer.pid)])
            peer.extents.add(number)
        batch = Batch([], [], [])
        for run in runs:
            batch.regions.append(run.region)
            batch.indices.append(np.arange(run.index, run.index + run.pages, dtype=np.int64))
            ascending = np.arange(run.pages) if run.target > 0 else 0
            batch.targets.append(np.full(run.pages, run.target, np.int64) + ascending)
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
            region.where[index[done]] = target[done]
            region.broken[index[done]] = False
            region.refusals[index[done]] = 0
            region.status[index[done]] = status[done]
            if target[0] == 0:  # private again: whatever held a page back is over
                region.held_until[index[done]] = 1
                region.holds = True
            if (status == messages.MERGED).any() and target[0] != 0:
                self.stir()
            if not done.all() and target[0] != 0:
                self.refused(peer, region, index[~done], status[~done])

    def refused(
        self, peer: Peer, region: Region, index: Int64, status: np.ndarray[tuple[int], np.dtype[np.uint8]]
    ) -> None:
        """Take back what a client did not do, and leave those pages (ascending) alone: longer each time, or for good."""
        if not len(index) or peer.process is None:
            return
        self.still_passes = 0
        self.mirror.refuse(peer.process, region.vpn + index)
        region.status[index] = status
        region.refusals[index] = np.minimum(region.refusals[index] + 1, _LONGEST_HOLD)
        until = self.looking.looks + (1 << region.refusals[index].astype(np.int32))
        until[np.isin(status, _FOR_GOOD)] = FOREVER
        alone = (status != messages.DIFFERS) | (region.refusals[index] > 2)
        if alone.any():
            region.held_until[index[alone]] = until[alone]
            region.holds = True
            self.mirror.hold(peer.process, region.vpn + index[alone])

    # --- between passes --------------------------------------------------------------------------------------------------------------

    def _end_pass(self) -> None:
        self.passes += 1
        self.calm_passes += 1
        self.still_passes += 1
        for extent in self.store.sparse():
            self._empty(extent.number)

    def tidy(self) -> None:
        """Let slots of frames that are gone die, and free what nobody has; called now and then."""
        self.slots.sweep()
        for extent in self.store:
            if extent.live == 0:
                self.store.retire(extent)
                for peer in self.peers.values():
                    if extent.number in peer.extents:
                        peer.extents.discard(extent.number)
                        peer.send(messages.pack(messages.RELEASE, extent=extent.number))
        self.store.free_extents()

    def _empty(self, number: int) -> None:
        """Let an extent's last pages be merged elsewhere."""
        try:
            moved = self.slots.relocate(self.store[number])
        except StoreFull:
            return
        for peer in self.peers.values():
            wanted = []
            for region in peer.regions.values():
                index = np.flatnonzero((region.where >> SHIFT == number) & ~region.broken)
                target = moved[region.where[index] & 0xFFFFFFFF]
                wanted.append((region, index[target > 0], target[target > 0]))
            self.ask(peer, [one for one in wanted if len(one[1])])
