"""Own frames: allocation by node, references, mappings, and the journal of mapping changes.

A frame is free exactly when nothing maps or holds (references, pins, locks) it. Must not know areas or rules of merging.
"""

from __future__ import annotations

import numpy as np

from pagefold.core import layout
from pagefold.core.compiler import jit
from pagefold.core.layout import World

_HALF = np.uint64(32)
INTENTS_PER_PAGE = 4  # the most one step of the scan can write: protect, redirect, and two breaks


@jit
def swap_nid(world: World) -> int:
    """Return the index of the node that holds the swap slots."""
    return len(world.nodes) - 1


@jit
def take_frame_on(world: World, nid: int) -> int:
    """Take a free frame of that very node; 0 if it has none or is not online."""
    node = world.nodes[nid]
    pfn = node["free_head"]
    if pfn == 0 or not node["online"]:
        return 0
    frame = world.frames[pfn]
    node["free_head"] = frame["first_pte"]
    node["free"] -= 1
    frame["first_pte"] = 0
    return pfn


@jit
def take_frame(world: World, wished: int) -> int:
    """Take a free frame on the wished node, else on the next ones round; 0 if there is none (choices 1)."""
    nodes = swap_nid(world)
    for step in range(nodes):
        pfn = take_frame_on(world, (wished + step) % nodes)
        if pfn:
            return pfn
    return 0


@jit
def is_idle(world: World, pfn: int) -> bool:
    """Tell whether nobody has a claim on the frame."""
    frame = world.frames[pfn]
    return frame["mapcount"] == 0 and frame["holds"] == 0


@jit
def forget_stable_node(world: World, pfn: int) -> None:
    """Let the frame name no stable node any more; the node is stale from here on, and its key tells searches to look."""
    mapping = world.frames[pfn]["mapping"]
    if mapping > layout.KSM_LONE:
        world.stables[mapping]["key"] = layout.KEY_LOOK
    world.frames[pfn]["mapping"] = 0


@jit
def free_if_idle(world: World, pfn: int) -> None:
    """Put the frame back if nobody has a claim on it; it forgets its stable node (the keyhole closes)."""
    if is_idle(world, pfn):
        frame = world.frames[pfn]
        node = world.nodes[frame["nid"]]
        forget_stable_node(world, pfn)
        frame["first_pte"] = node["free_head"]
        node["free_head"] = pfn
        node["free"] += 1


@jit
def get_page(world: World, pfn: int) -> None:
    """Take a transient reference."""
    world.frames[pfn]["holds"] += layout.HOLD_REF


@jit
def put_page(world: World, pfn: int) -> None:
    """Drop a transient reference."""
    world.frames[pfn]["holds"] -= layout.HOLD_REF
    free_if_idle(world, pfn)


@jit
def map_page(world: World, pte: int, pfn: int, flags: int) -> None:
    """Let an empty page-table entry name the frame (or swap slot)."""
    frame = world.frames[pfn]
    entry = world.ptes[pte]
    entry["pfn"] = pfn
    entry["flags"] = flags
    entry["prev"] = 0
    entry["next"] = frame["first_pte"]
    if frame["first_pte"]:
        world.ptes[frame["first_pte"]]["prev"] = pte
    frame["first_pte"] = pte
    frame["mapcount"] += 1


@jit
def unmap_page(world: World, pte: int) -> None:
    """Empty a page-table entry that names a frame (or swap slot); the frame goes if that was its last claim."""
    entry = world.ptes[pte]
    pfn = entry["pfn"]
    frame = world.frames[pfn]
    if entry["prev"]:
        world.ptes[entry["prev"]]["next"] = entry["next"]
    else:
        frame["first_pte"] = entry["next"]
    if entry["next"]:
        world.ptes[entry["next"]]["prev"] = entry["prev"]
    entry["pfn"] = 0
    entry["next"] = 0
    entry["prev"] = 0
    entry["flags"] = 0
    frame["mapcount"] -= 1
    free_if_idle(world, pfn)


@jit
def content_order(world: World, one: int, other: int) -> int:
    """Compare the contents of two frames: negative, 0 or positive, as memcmp would."""
    a = world.contents[one]
    b = world.contents[other]
    if a["hi"] != b["hi"]:
        return -1 if a["hi"] < b["hi"] else 1
    if a["lo"] != b["lo"]:
        return -1 if a["lo"] < b["lo"] else 1
    return 0


@jit
def content_key(world: World, pfn: int) -> int:
    """Return the top 31 bits of the content, shifted left: contents whose keys differ are ordered as their keys are."""
    return int(world.contents[pfn]["hi"] >> _HALF) & ~layout.KEY_LOOK


@jit
def copy_content(world: World, to: int, source: int) -> None:
    """Copy what is in one frame to another."""
    world.contents[to]["hi"] = world.contents[source]["hi"]
    world.contents[to]["lo"] = world.contents[source]["lo"]


@jit
def nid_of(world: World, pfn: int) -> int:
    """Return the node for the choice of a tree: 0 while pages merge across nodes, else where the frame is."""
    if world.ctl[0]["merge_across_nodes"]:
        return 0
    return world.frames[pfn]["nid"]


@jit
def stable_node_of(world: World, pfn: int) -> int:
    """Return the stable node the frame points back to, 0 for anonymous and lone KSM pages."""
    mapping = world.frames[pfn]["mapping"]
    return mapping if mapping > layout.KSM_LONE else 0


@jit
def journal_room(world: World, wanted: int) -> bool:
    """Tell whether `wanted` intents can be written (always, while the journal is off)."""
    ctl = world.ctl[0]
    return not ctl["journal_on"] or ctl["journal_used"] + wanted <= len(world.journal)


@jit
def write_intent(world: World, kind: int, mm: int, vpn: int, old_pfn: int, new_pfn: int) -> None:
    """Note a mapping change that the engine has made; the caller asked `journal_room` before."""
    ctl = world.ctl[0]
    if not ctl["journal_on"]:
        return
    intent = world.journal[ctl["journal_used"]]
    intent["kind"] = kind
    intent["mm"] = mm
    intent["serial"] = world.mms[mm]["serial"]
    intent["vpn"] = vpn
    intent["old_pfn"] = old_pfn
    intent["new_pfn"] = new_pfn
    ctl["journal_used"] += 1
