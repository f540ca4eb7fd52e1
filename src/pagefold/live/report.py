"""Own what the daemon says of itself: savings, clients, who shares what. Must not know: how any of it came about."""

from __future__ import annotations

import os
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pagefold import settings
from pagefold.live import messages
from pagefold.live.merging import Merging
from pagefold.live.messages import PAGE
from pagefold.live.peer import Counts, Peer
from pagefold.live.region import Region

_GROUPS = 64  # most groups of sharers that are told
_PEER_BITS = 14  # of a client's number, below a slot's


def saved_bytes(merging: Merging) -> int:
    """Return what merging saves: pages that map the store or nothing, less what the store itself holds."""
    regions = [region for peer in merging.peers.values() for region in peer.regions.values()]
    mapped = sum(int(np.count_nonzero(region.merged())) for region in regions)
    holes = sum(int(np.count_nonzero(region.where < 0)) for region in regions)
    return (mapped + holes) * PAGE - merging.store.backed_bytes()


def knobs(merging: Merging) -> dict[str, int | str]:
    """Return the engine's knobs by name."""
    return {name: merging.mirror.engine.get(name) for name in settings.KNOBS}


def stat(merging: Merging) -> dict[str, Any]:
    """Return what `pagefold stat` shows of the merging itself."""
    peers = list(merging.peers.values())
    ever = Counts()
    for counts in (merging.past, *(peer.counts for peer in peers)):
        ever.add(counts)
    refused = {
        name: int(count)
        for code, (name, count) in enumerate(zip(messages.STATUS_NAMES, ever.by_status, strict=True))
        if name and count and code not in (messages.MERGED, messages.ALREADY)
    }
    return {
        "counters": asdict(merging.mirror.engine.counters()),
        "saved_bytes": saved_bytes(merging),
        "store_bytes": merging.store.backed_bytes(),
        "tracked_bytes": sum(peer.tracked_pages for peer in peers) * PAGE,
        "daemon_bytes": _resident(),
        "windows": ever.windows,
        "merged": ever.by_status[messages.MERGED],
        "refused": refused,
        "cow_breaks": ever.cow_breaks,
        "settled": merging.settled,
        "clients": clients(merging),
        "groups": groups(merging),
    }


def clients(merging: Merging) -> list[dict[str, Any]]:
    """Return one row per client."""
    rows = []
    for peer in merging.peers.values():
        regions = list(peer.regions.values())
        refused = sum(int(np.count_nonzero(region.held_until)) for region in regions)
        rows.append(
            {
                "pid": peer.pid,
                "command": peer.command(),
                "node_pages": _node_pages(merging, peer),
                "regions": len(regions),
                "ignored_regions": len(peer.ignored),
                "pages": peer.tracked_pages,
                "merged_pages": sum(int(np.count_nonzero(region.merged())) for region in regions),
                "zero_pages": sum(int(np.count_nonzero(region.where < 0)) for region in regions),
                "broken_pages": sum(int(np.count_nonzero(region.broken)) for region in regions),
                "refused_pages": refused,
                "mappings": peer.mappings(),
                "background": peer.windows_safe,
                "why": peer.why,
            }
        )
    return rows


def _node_pages(merging: Merging, peer: Peer) -> dict[str, int]:
    """Return how many of a client's present pages are on each node."""
    counts = np.zeros(merging.nodes, np.int64)
    assert peer.process is not None
    for region in peer.regions.values():
        frames = merging.mirror.frames_of(peer.process, region)
        counts += np.bincount(merging.mirror.nodes_of(frames[frames > 0]), minlength=merging.nodes)
    return {str(node): int(count) for node, count in enumerate(counts) if count}


def groups(merging: Merging) -> list[dict[str, Any]]:
    """Return who shares what: the sets of processes that map the same slots, per node, the largest first."""
    slots, owners = [], []
    peers = list(merging.peers.values())
    for number, peer in enumerate(peers):
        for region in peer.regions.values():
            mapped = region.where[region.merged()]
            slots.append(mapped)
            owners.append(np.full(len(mapped), number))
    if not slots:
        return []
    slot, owner = np.concatenate(slots), np.concatenate(owners)
    if not len(slot):
        return []
    pairs = np.unique(slot << _PEER_BITS | owner)
    slot, owner = pairs >> _PEER_BITS, pairs & (1 << _PEER_BITS) - 1
    first = np.flatnonzero(np.append(True, np.diff(slot) != 0))
    found: dict[tuple[int, tuple[int, ...]], int] = {}
    bounds = [*first.tolist(), len(slot)]
    nodes = merging.mirror.nodes_of(merging.slots.frames_of(slot[first])).tolist()  # not its extent's, if it migrated
    for (begin, end), node in zip(pairwise(bounds), nodes, strict=True):
        key = (node, tuple(owner[begin:end].tolist()))
        found[key] = found.get(key, 0) + 1
    rows = [
        {"node": node, "pids": [peers[one].pid for one in members], "pages": pages, "bytes": pages * PAGE}
        for (node, members), pages in found.items()
    ]
    return sorted(rows, key=lambda row: -int(str(row["bytes"])))[:_GROUPS]


def merged_and_saved(merging: Merging, peer: Peer, region: Region) -> tuple[int, int]:
    """Return how many pages of a region are merged, and the bytes that saves: each has its share in the slot it maps."""
    assert peer.process is not None
    merged = region.merged()
    sharers = merging.mirror.sharers_of(merging.mirror.frames_of(peer.process, region)[merged])
    holes = int(np.count_nonzero(region.where < 0))
    saved = float((1 - 1 / np.maximum(sharers, 1)).sum()) + holes
    return int(np.count_nonzero(merged)) + holes, round(saved * PAGE)


def region_report(merging: Merging, peer: Peer, region: Region) -> dict[str, Any]:
    """Return the fields of SYNCED for a region; what was told before, or was merged before the call, is told as merged already."""
    merged = region.merged()
    holes = region.where < 0
    (now, saved), (before, saved_before) = merged_and_saved(merging, peer, region), region.told
    region.told = now, saved
    status = np.where(region.broken, messages.BROKEN, region.status)[~merged & ~holes]
    by_status = np.bincount(status, minlength=messages.STATUSES)
    by_status[messages.UNKNOWN] += by_status[messages.MERGED] + by_status[messages.ALREADY]  # merged once, not now
    by_status[messages.MERGED], by_status[messages.ALREADY] = max(now - before, 0), min(before, now)
    return {
        "pages": region.pages,
        "by_status": by_status.astype(np.uint64),
        "zero_pages": int(np.count_nonzero(holes)),
        "saved_bytes": max(saved - saved_before, 0),
    }


def _resident() -> int:
    """Return the resident memory of this process, in bytes; 0 if there is no descriptor left to ask."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
