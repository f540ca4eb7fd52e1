"""Own the judge of all that a daemon keeps of its clients: what must be true between two packets. Must not know: how it came about.

The engine has a judge of its own, which is asked too.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from pagefold.errors import CorruptionError
from pagefold.live.merging import Merging
from pagefold.live.peer import Peer
from pagefold.live.region import FOREVER, SHIFT, Region
from pagefold.live.slots import hashes


def validate(merging: Merging) -> dict[str, Any]:
    """Raise CorruptionError if anything is not as it must be; else return figures that tests look at."""
    merging.mirror.engine.validate()
    _check_slots(merging)
    for mm, peer in merging.peers.items():
        _must(peer.process is not None and peer.process.mm == mm, "peers", f"client {peer.pid} is not at {mm}")
        _check_peer(merging, peer)
    tracked = sum(peer.tracked_pages for peer in merging.peers.values())
    _must(tracked == merging.mirror.pages, "pages", f"clients have {tracked}, the mirror {merging.mirror.pages}")
    regions = {region for peer in merging.peers.values() for region in peer.regions.values()}
    _must(merging.syncing <= regions, "syncing", "a region that is gone is waited for")
    return {
        "elsewhere": sum(_elsewhere(merging, peer) for peer in merging.peers.values()),
        "frames": merging.mirror.frame_count(),
        "extents": {str(extent.number): [extent.taken, extent.live] for extent in merging.store},
    }


def _must(condition: bool, invariant: str, detail: str) -> None:
    if not condition:
        raise CorruptionError(invariant, detail)


def _check_slots(merging: Merging) -> None:
    """Every slot in use belongs to one frame, and holds that frame's content."""
    merging.slots.sweep()
    frames = np.flatnonzero(merging.slots.of(np.arange(merging.mirror.frame_count())))
    where = merging.slots.of(frames)
    _must(len(np.unique(where)) == len(where), "slots", "two frames have one slot")
    contents = merging.mirror.contents_of(frames)
    for extent in merging.store:
        here = where >> SHIFT == extent.number
        slots = np.sort(where[here] & 0xFFFFFFFF)
        _must(np.array_equal(slots, extent.live_slots()), "slots", f"extent {extent.number} has others in use")
        _must(extent.live == len(slots) <= extent.taken, "slots", f"extent {extent.number} miscounts")
        if len(slots):
            found = hashes(np.ascontiguousarray(extent.memory[where[here] & 0xFFFFFFFF]))
            extent.forget()
            same = (found[:, 0] == contents["hi"][here]) & (found[:, 1] == contents["lo"][here])
            _must(bool(same.all()), "contents", f"a slot of extent {extent.number} is not what its frame is")
    known = {extent.number for extent in merging.store}
    _must(set((where >> SHIFT).tolist()) <= known, "slots", "a slot is of an extent that is gone")


def _check_peer(merging: Merging, peer: Peer) -> None:
    """What we keep of a client agrees with itself."""
    spans = sorted((region.start, region.end) for region in peer.regions.values())
    _must(spans == peer._spans, "regions", f"client {peer.pid} has regions that are not where they are looked for")
    _must(all(a[1] <= b[0] for a, b in pairwise(spans)), "regions", "two regions overlap")
    pages = sum(region.pages for region in peer.regions.values())
    _must(pages == peer.tracked_pages, "pages", f"client {peer.pid} has {pages}, counted are {peer.tracked_pages}")
    queued = sum(len(packet) for packet, _ in peer._queue)
    _must(queued == peer._queued, "queue", f"{queued} bytes wait for client {peer.pid}, counted are {peer._queued}")
    asked: dict[Region, list[np.ndarray[Any, Any]]] = {}
    for batch in peer.pending.values():
        for region, index in zip(batch.regions, batch.indices, strict=True):
            asked.setdefault(region, []).append(index)
    for number, region in peer.regions.items():
        _must(region.number == number, "regions", f"region {region.number} is found as {number}")
        _must(bool((region.where[region.broken] > 0).all()), "broken", "a page that maps no slot is broken")
        held = (region.held_until > 0) & (region.held_until < FOREVER)
        _must(region.holds or not held.any(), "holds", "a page that is held would not be released")
        still = np.ones(region.pages, np.bool_)
        for index in asked.get(region, []):
            still[index] = False
        _must(
            bool((region.wanted == region.where)[still].all()), "wanted", "a page waits for a window nobody asked for"
        )
    _must(set(peer.regions) & peer.ignored == set(), "regions", "a region is ignored and not")


def _elsewhere(merging: Merging, peer: Peer) -> int:
    """Return how many pages of a client map a slot that is not the one of their frame in the mirror."""
    assert peer.process is not None
    count = 0
    for region in peer.regions.values():
        frames = merging.mirror.frames_of(peer.process, region)
        slots = np.where(merging.mirror.is_ksm(frames), merging.slots.of(frames), 0)
        count += int(np.count_nonzero(region.merged() & (slots != region.where)))
    return count
