"""Own what the merger does with one page: stable trees, chains, migrate_nodes, unstable trees, merge, break.

Stale nodes ARE visible here: a search that walks past one prunes it and starts again, as in the engine. That
makes `pages_shared` and its kin depend on the paths of searches; the paths agree because `shape.py` is the
standard algorithm. Nothing runs beside the twin: what may happen in the middle (spec section 10) never does.
"""

from __future__ import annotations

from typing import Any

from shape import RbNode, RbTree
from twin_memory import ZERO, Frame, Mapped, Memory, Mm

from pagefold.errors import OutOfMemory

BUSY = "busy"


class StableNode:
    """One KSM page; in a tree (`rb`), in a chain (`chain`) or on `migrate_nodes` (`migrating`)."""

    def __init__(self, frame: Frame, nid: int) -> None:
        self.frame = frame  # kpfn: a Frame object stands for its number and follows migration
        self.nid = nid
        self.items: list[RmapItem] = []
        self.rb: RbNode | None = None
        self.chain: Chain | None = None
        self.migrating = False


class Chain:
    """A tree node that stands for one content and holds dups, the newest first."""

    def __init__(self, nid: int, now_ms: int) -> None:
        self.nid = nid
        self.prune_time = now_ms
        self.dups: list[StableNode] = []
        self.rb: RbNode | None = None


class RmapItem:
    """One scanned virtual page; `stable` or `unstable` says where it hangs, or neither."""

    def __init__(self, mm: Mm, vpn: int) -> None:
        self.mm = mm
        self.vpn = vpn
        self.checksum: int | None = None  # None: remembers nothing
        self.age = 0
        self.remaining_skips = 0
        self.stable: StableNode | None = None
        self.unstable: RbNode | None = None
        self.tree: RbTree | None = None
        self.seqnr = 0


class Merger(Memory):
    """Memory with trees; `Twin` adds ring, scan and knobs."""

    def __init__(self, nodes: int, frames: int, swap: int, rules: str) -> None:
        super().__init__(nodes, frames, swap)
        self.mainline = rules == "mainline"
        self.stable_trees = [RbTree() for _ in range(nodes)]
        self.unstable_trees = [RbTree() for _ in range(nodes)]
        self.migrate_nodes: list[StableNode] = []
        self.knobs: dict[str, Any] = {}
        self.now_ms = 0
        self.full_scans = 0
        self.pages_shared = 0
        self.pages_sharing = 0
        self.pages_unshared = 0
        self.chains = 0
        self.dups = 0

    def _tree_nid(self, frame: Frame) -> int:
        return 0 if self.knobs["merge_across_nodes"] else frame.nid

    # stable nodes -------------------------------------------------------------------------------------------

    def _living(self, node: StableNode) -> bool:
        """Look through the keyhole; a stale node is unlinked and its rmap_items let go."""
        if node.frame.stable_node is node:
            return True
        self._remove_stable_node(node)
        return False

    def _remove_stable_node(self, node: StableNode) -> None:
        while node.items:
            self._leave_list(node.items[-1])
        self._unlink(node)

    def _unlink(self, node: StableNode) -> None:
        """Take the node from the one place it is in."""
        if node.migrating:
            self.migrate_nodes.remove(node)
            node.migrating = False
        elif node.chain is not None:
            node.chain.dups.remove(node)
            node.chain = None
            self.dups -= 1
        else:
            self.stable_trees[node.nid].erase(node.rb)
            node.rb = None

    def _set_aside(self, node: StableNode) -> None:
        """Put a misplaced node, already unlinked, on migrate_nodes."""
        node.migrating = True
        self.migrate_nodes.append(node)

    def _put_in_tree(self, node: StableNode | Chain, nid: int, parent: RbNode | None, side: str) -> None:
        node.nid = nid
        node.rb = RbNode(node)
        self.stable_trees[nid].insert(node.rb, parent, side)

    def _take_place(self, old: StableNode | Chain, new: StableNode | Chain) -> None:
        """Let `new` stand in the tree exactly where `old` stood."""
        new.nid = old.nid
        new.rb = RbNode(new)
        self.stable_trees[old.nid].replace(old.rb, new.rb)
        old.rb = None

    def _add_dup(self, chain: Chain, node: StableNode) -> None:
        node.nid = chain.nid
        node.chain = chain
        chain.dups.insert(0, node)
        self.dups += 1

    def _chain_of(self, owner: StableNode | Chain) -> Chain:
        """Return the chain at this tree node; a plain node becomes the first dup of a new one."""
        if isinstance(owner, Chain):
            return owner
        chain = Chain(owner.nid, self.now_ms)
        self._take_place(owner, chain)
        self._add_dup(chain, owner)
        self.chains += 1
        return chain

    def _free_chain(self, chain: Chain) -> None:
        assert not chain.dups
        self.stable_trees[chain.nid].erase(chain.rb)
        self.chains -= 1

    def _room(self, node: StableNode, more: int = 0) -> bool:
        return len(node.items) >= 1 and len(node.items) + more < self.knobs["max_page_sharing"]

    def _is_better(self, dup: StableNode, held: StableNode) -> bool:
        return self._room(dup) and (not self._room(held) or len(dup.items) > len(held.items))

    def _pick_dup(self, chain: Chain, may_prune: bool) -> StableNode | None:
        """Choose the dup to compare with; None when the chain was empty and has been freed."""
        pause = self.knobs["stable_node_chains_prune_millisecs"]
        pruning = may_prune and self.now_ms - chain.prune_time >= pause
        if pruning:
            chain.prune_time = self.now_ms
        held: StableNode | None = None
        for dup in list(chain.dups):
            if not self._living(dup):
                continue
            if held is None or self._is_better(dup, held):
                held = dup
            if self._room(held) and not pruning:
                break
        if held is None:
            self._free_chain(chain)
        elif len(chain.dups) == 1:
            self._unlink(held)
            self._take_place(chain, held)
            self.chains -= 1
        elif chain.dups[0] is not held and self._room(held, more=1):
            chain.dups.remove(held)
            chain.dups.insert(0, held)
        return held

    def _descend(self, nid: int, content: int, may_prune: bool) -> tuple[Any, str, StableNode | None] | None:
        """Walk down once: (last tree node, side, node met with this content or None).

        None: something stale was pruned on the way, so the path may be wrong: start again.
        """
        parent, side = None, "root"
        place = self.stable_trees[nid].root
        while place is not None:
            owner = place.value
            if isinstance(owner, Chain):
                node = self._pick_dup(owner, may_prune)
            else:
                node = owner if self._living(owner) else None
            if node is None:
                return None
            if node.rb is not None:
                place = node.rb  # a collapsed chain: the dup stands there now
            if content == node.frame.content:
                return place, "here", node
            side = "left" if content < node.frame.content else "right"
            parent, place = place, getattr(place, side)
        return parent, side, None

    def _stable_tree_search(self, frame: Frame) -> Frame | str | None:
        own: StableNode | None = frame.stable_node
        if own is not None and not own.migrating:
            return frame  # inherited by fork
        nid = self._tree_nid(frame)
        found = self._descend(nid, frame.content, may_prune=True)
        while found is None:
            if not self.mainline:
                return None
            found = self._descend(nid, frame.content, may_prune=True)
        place, side, match = found
        if match is None:
            if own is None:
                return None
            self._unlink(own)
            self._put_in_tree(own, nid, place, side)
            return self._placed(own)
        if self.mainline:
            if own is not None and len(frame.mappings) > 1:
                self._unlink(own)
                self._add_dup(self._chain_of(place.value), own)
                return self._placed(own)
            if not self._room(match):
                return None
        if match.frame.locked:
            return BUSY
        if self._tree_nid(match.frame) == match.nid:
            return match.frame
        return self._displace(match, own)

    def _displace(self, match: StableNode, own: StableNode | None) -> Frame | None:
        """Set a misplaced match aside; a waiting node of equal content takes its place."""
        if own is not None:
            self._unlink(own)
        if match.chain is not None:
            chain = match.chain
            self._unlink(match)
            if own is not None:
                self._add_dup(chain, own)
        elif own is not None:
            self._take_place(match, own)
        else:
            self._unlink(match)
        self._set_aside(match)
        return self._placed(own) if own is not None else None

    def _placed(self, node: StableNode) -> Frame | None:
        """The page of a node that has just found its place; in mainline nothing if no further page may join it."""
        return None if self.mainline and not self._room(node) else node.frame

    def _stable_tree_insert(self, frame: Frame) -> StableNode | None:
        nid = self._tree_nid(frame)
        found = None
        while found is None:
            found = self._descend(nid, frame.content, may_prune=False)
        place, side, match = found
        node = StableNode(frame, nid)
        if match is None:
            self._put_in_tree(node, nid, place, side)
        elif self.mainline:
            self._add_dup(self._chain_of(place.value), node)
        else:
            return None
        frame.stable_node = node
        return node

    # rmap_items ---------------------------------------------------------------------------------------------

    def _append(self, node: StableNode, item: RmapItem) -> None:
        if node.items:
            self.pages_sharing += 1
        else:
            self.pages_shared += 1
        node.items.append(item)
        item.stable = node
        item.mm.merging += 1

    def _leave_list(self, item: RmapItem) -> None:
        item.stable.items.remove(item)
        if item.stable.items:
            self.pages_sharing -= 1
        else:
            self.pages_shared -= 1
        item.stable = None
        item.mm.merging -= 1

    def _leave_tree(self, item: RmapItem) -> None:
        """Take the item off whatever it hangs on."""
        if item.stable is not None:
            if self._living(item.stable):
                self._leave_list(item)
        elif item.unstable is not None:
            same_scan = (self.full_scans - item.seqnr) & 0xFF == 0
            if same_scan and item.tree in self.unstable_trees:
                item.tree.erase(item.unstable)
            item.unstable = item.tree = None
            self.pages_unshared -= 1

    # merging and breaking -----------------------------------------------------------------------------------

    def _mapped(self, mm: Mm, vpn: int) -> Frame | None:
        """Return the frame of a present page of a living, mergeable area."""
        entry = mm.entries.get(vpn) if mm.mergeable_area(vpn) is not None else None
        return entry.frame if isinstance(entry, Mapped) else None

    def _protect(self, frame: Frame) -> bool:
        """Try to lock and write-protect: refused to a page that someone else locked or pinned, and in mainline to a KSM page."""
        return not frame.locked and not frame.pins and not (frame.ksm and self.mainline)

    def _merge_into(self, item: RmapItem, frame: Frame, target: Frame | None) -> bool:
        """Redirect the item's mapping from `frame` to `target`; None: mark `frame` itself a lone KSM page."""
        if self._mapped(item.mm, item.vpn) is not frame:
            return False
        if frame is not target:
            if not self._protect(frame):
                return False
            if target is None:
                frame.ksm = True
                frame.stable_node = None
                for number, vpn in frame.mappings:
                    self.mms[number].entries[vpn].writable = False
            elif frame.content != target.content:
                return False
            else:
                self._drop(item.mm, item.vpn)
                self._map(item.mm, item.vpn, target, writable=False)
        self._leave_tree(item)
        return True

    def _merge_with_zero(self, item: RmapItem, frame: Frame) -> bool:
        if not self._protect(frame):
            return False
        self._drop(item.mm, item.vpn)
        self._map_zero(item.mm, item.vpn)
        return True

    def _break(self, mm: Mm, vpn: int) -> None:
        """Make a KSM page or a merged zero page private again; needs a frame."""
        entry = mm.entries.get(vpn)
        if entry == ZERO:
            self._fresh(mm, vpn, 0)
        elif isinstance(entry, Mapped) and entry.frame.ksm:
            self._fresh(mm, vpn, entry.frame.content)

    def _break_back(self, item: RmapItem) -> None:
        """Break after a failed merge; without memory the lone KSM page stays."""
        try:
            self._break(item.mm, item.vpn)
        except OutOfMemory:
            return

    def _unstable_tree_search_insert(self, item: RmapItem, frame: Frame) -> RmapItem | None:
        tree = self.unstable_trees[self._tree_nid(frame)]
        parent, side = None, "root"
        place = tree.root
        while place is not None:
            other: RmapItem = place.value
            page = self._mapped(other.mm, other.vpn)
            if page is None or page is frame:
                return None
            if frame.content == page.content:
                if not self.knobs["merge_across_nodes"] and page.nid != frame.nid:
                    return None
                return other
            side = "left" if frame.content < page.content else "right"
            parent, place = place, getattr(place, side)
        item.unstable = RbNode(item)
        item.tree = tree
        item.seqnr = self.full_scans & 0xFF
        tree.insert(item.unstable, parent, side)
        self.pages_unshared += 1
        return None

    def _is_calm(self, item: RmapItem, frame: Frame) -> bool:
        calm = item.checksum == frame.content
        item.checksum = frame.content
        return calm

    def _cmp_and_merge_page(self, item: RmapItem, frame: Frame) -> None:
        own: StableNode | None = frame.stable_node
        if own is not None:
            if not own.migrating and self._tree_nid(own.frame) != own.nid:
                self._unlink(own)
                self._set_aside(own)
            if not own.migrating and item.stable is own:
                return
        elif self.mainline:
            self._leave_tree(item)
            if not self._is_calm(item, frame):
                return
            if self.knobs["use_zero_pages"] and frame.content == 0 and self._merge_with_zero(item, frame):
                return
        target = self._stable_tree_search(frame)
        if target is frame and item.stable is not None and item.stable is own:
            return
        self._leave_tree(item)
        if target == BUSY:
            return
        if target is not None:
            if self._merge_into(item, frame, target):
                self._append(target.stable_node, item)
            return
        if not self.mainline and own is None and not self._is_calm(item, frame):
            return
        self._merge_with_partner(item, frame)

    def _merge_with_partner(self, item: RmapItem, frame: Frame) -> None:
        """Find an equal page in the unstable tree and make one new KSM page of the two."""
        partner = self._unstable_tree_search_insert(item, frame)
        if partner is None or not self._merge_into(item, frame, None):
            return
        if not self._merge_into(partner, self._mapped(partner.mm, partner.vpn), frame):
            self._break_back(item)
            return
        node = self._stable_tree_insert(frame)
        if node is None:
            self._break_back(partner)
            self._break_back(item)
            return
        self._append(node, partner)
        self._append(node, item)
