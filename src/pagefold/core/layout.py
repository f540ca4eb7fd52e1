"""Own every record, flag and status of the compiled core, in one place.

Units: addresses are page numbers (`vpn`), frames are indices into `frames` (`pfn`), times are milliseconds.
Index 0 of every array is reserved and means "none". Fields that share an offset are never valid together; the
comment of each says when it is valid. Indices are signed so that arithmetic is the same compiled and not.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Records: TypeAlias = npt.NDArray[Any]

PAGE_SIZE = 4096  # of the simulated machine, and of the unit in which profit is counted
RMAP_ITEM_BYTES = 64  # what the kernel's own rmap_item costs; general_profit is counted with it

# --- statuses: 0 or more is success, negative says why nothing (more) was done ---------------------------------
OK = 0
SAME = 1  # nothing to do: a move to the node where the page is, a write of what it holds
ABSENT = -1  # no present page at that address
BUSY = -2  # locked, pinned or referenced
NO_MEMORY = -3  # no free frame (or swap slot)
NO_AREA = -4  # the address is in no area
NO_NODE = -5  # no such node, or offline
BLOCKED = -6  # the merger holds that mm's mmap lock: the caller would have to wait
NO_PROCESS = -7  # that mm is not alive
THE_ZERO_PAGE = -8  # the zero page is mapped there, and belongs to nobody
NEED_MMS = -11  # an array is full: grow it and call again (nothing was changed, or the call can be repeated)
NEED_VMAS = -12
NEED_PTES = -13
NEED_RMAPS = -14
NEED_STABLES = -15
NEED_JOURNAL = -16

WARM_LANES = 16

# --- rule sets ----------------------------------------------------------------------------------------------------
CLASSIC = 0
MAINLINE = 1
PAGEFOLD = 2  # mainline, and what it takes to keep every promise (docs/checking.md)
RULES = {"classic": CLASSIC, "mainline": MAINLINE, "pagefold": PAGEFOLD}

# --- the machine's control block: one record ------------------------------------------------------------------------
ctl = np.dtype(
    [
        # knobs that the rules read (settings.py owns their names, limits and defaults)
        ("rules", "i4"),  # CLASSIC, MAINLINE or PAGEFOLD
        ("merge_across_nodes", "i4"),
        ("max_page_sharing", "i4"),
        ("use_zero_pages", "i4"),
        ("smart_scan", "i4"),
        ("chains_prune_millisecs", "i4"),
        ("unmerging", "i4"),  # 1 while run is 2: new mms enter the ring at its end
        ("offlining", "i4"),  # 1 + the node that is going offline, 0: none
        ("now", "i8"),  # ms, set by the caller before each scan
        # counters (spec section 2)
        ("pages_shared", "i8"),
        ("pages_sharing", "i8"),
        ("pages_unshared", "i8"),
        ("pages_scanned", "i8"),
        ("pages_skipped", "i8"),
        ("ksm_zero_pages", "i8"),
        ("stable_node_chains", "i8"),
        ("stable_node_dups", "i8"),
        ("rmap_items", "i8"),
        ("full_scans", "i8"),  # the kernel's seqnr
        (
            "trees_changed",
            "i4",
        ),  # 1: a page that may be in an unstable tree was written or went since the trees are new
        ("generation", "i8"),  # of the unstable trees: full scans ever begun
        # the cursor (ksm_scan)
        ("cursor_mm", "i4"),  # 0: the ring's head
        ("cursor_vma", "i4"),  # hint: the area of cursor_vpn, checked before use
        ("cursor_rmap", "i4"),  # last rmap_item passed in this mm, 0 at the list's head
        ("cursor_vpn", "i8"),  # next address to look at; 0 when no mergeable area was met in this mm
        ("scan_page", "i4"),  # frame of the page just returned, referenced
        # warm.py: how far it has looked ahead in this mm, and its lanes
        ("warm_until", "i8"),
        ("warm_key", "i8", (WARM_LANES,)),
        ("warm_node", "i4", (WARM_LANES,)),
        ("warm_nid", "i4", (WARM_LANES,)),
        # lists
        ("migrate_head", "i4"),  # first stable node of migrate_nodes
        # arenas: slots ever used (0 counts as used) and the head of the list of free ones
        ("spawned", "i4"),  # processes ever made
        ("mms_used", "i4"),
        ("mms_free", "i4"),
        ("vmas_used", "i4"),
        ("vmas_free", "i4"),
        ("ptes_used", "i4"),
        ("ptes_free", "i4"),  # first free run, ordered by index
        ("rmaps_used", "i4"),
        ("rmaps_free", "i4"),
        ("stables_used", "i4"),
        ("stables_free", "i4"),
        ("journal_used", "i4"),
        ("journal_on", "i4"),
        ("shadow_on", "i4"),  # 1: `shadow` follows `ptes` and holds the last value written to each page
        # what would be a broken promise, counted at the moment it happens (invariants: placement, refuse)
        ("placement_broken", "i4"),
        ("refuse_broken", "i4"),
        ("bypasses", "i8"),  # forks, and migrations of KSM pages: only after these may max_page_sharing be exceeded
        # checkpoints
        ("armed", "i4"),  # 0: checkpoint() is nothing; ARMED; JUDGED
        ("schedule_next", "i4"),
        ("schedule_used", "i4"),
        ("checkpoints", "i8"),  # passed since armed
        ("broken", "i4"),  # while JUDGED: the first invariant that an event broke, as `invariants.check` returns it
        ("broken_where", "i4"),
    ],
    align=True,
)

# --- nodes: one record per NUMA node, and one more that holds the swap slots ------------------------------------------
node = np.dtype(
    [
        ("stable_root", "i4"),
        ("unstable_root", "i4"),
        ("free_head", "i4"),  # first free frame, linked through first_pte
        ("free", "i4"),  # how many
        ("total", "i4"),
        ("online", "i4"),  # 0: nothing is allocated here (going offline or offline)
    ]
)

# --- frames: physical pages; swap slots are frames of a node of their own ---------------------------------------------
frame = np.dtype(
    [
        ("mapcount", "i4"),  # page-table entries that name this frame
        ("mapping", "i4"),  # 0 anonymous or free, KSM_LONE, or the stable node (the back pointer)
        ("first_pte", "i4"),  # used: first of the entries that name it; free: next free frame
        ("nid", "i2"),
        ("holds", "u2"),  # everything that holds it beyond mappings, one number as the kernel's page count: see below
    ]
)
HOLD_REF = 1  # a transient reference of the merger, up to 1023 of them
HOLD_PIN = 1024  # a long-term reference of others, up to MAX_PINS of them
HOLD_PINS = 0x7C00
MAX_PINS = HOLD_PINS // HOLD_PIN
HOLD_LOCK = 0x8000
HOLD_COUNT = 0x7FFF  # all references and pins
KSM_LONE = 1  # mapping: a KSM page without a stable node yet; stable node 1 is never handed out

content = np.dtype([("hi", "u8"), ("lo", "u8")])  # equal if and only if the bytes are; (0, 0) is the zero page

# --- page-table entries: an area owns a run of them -------------------------------------------------------------------
pte = np.dtype(
    [
        ("pfn", "i4"),  # frame or swap slot; in a free run's first entry: its length
        ("next", "i4"),  # next entry of the same frame; in a free run's first entry: next free run
        ("prev", "i4"),
        ("flags", "i4"),  # 0: absent
    ]
)
PTE_PRESENT = 1
PTE_WRITABLE = 2  # with PRESENT
PTE_SWAPPED = 4
PTE_ZERO = 8  # maps the zero page on the merger's behalf
PTE_MET = 16  # with PRESENT, only inside walk.py: counted already

vma = np.dtype(
    [
        ("start", "i8"),
        ("end", "i8"),  # one past the last page
        ("pte_base", "i4"),  # entry of `start`
        ("mm", "i4"),  # 0: slot is free
        ("next", "i4"),  # next area by address; free: next free slot
        ("node", "i2"),  # wished node, or -1: the mm's
        ("flags", "i2"),
    ]
)
VMA_MERGEABLE = 1
VMA_SHARED = 2  # shared, file, huge-TLB, PFN-mapped or I/O: never compatible; written in place

# --- address spaces and their mm_slots ---------------------------------------------------------------------------------
mm = np.dtype(
    [
        ("next_vpn", "i8"),  # where the next area starts
        ("ksm_rmap_items", "i8"),
        ("ksm_merging_pages", "i8"),
        ("ksm_zero_pages", "i8"),
        ("vma_first", "i4"),
        ("ring_next", "i4"),  # record 0 is the ring's head; free: next free slot
        ("ring_prev", "i4"),
        ("rmap_list", "i4"),  # first rmap_item by address
        ("parent", "i4"),  # the mm it was forked from, or that one's parent if it is gone, and so on; 0: none
        ("serial", "i4"),  # of the process that has this slot; slots are used again
        ("node", "i2"),
        ("flags", "i2"),
    ],
    align=True,
)
MM_LIVE = 1
MM_EXITED = 2  # gone, but the scanner still has to free its slot
MM_REGISTERED = 4  # has a slot in the ring
MM_MERGE_ANY = 8
MM_LOCKED = 16  # the merger holds its mmap lock for reading

# --- rmap_items: one per scanned virtual page ---------------------------------------------------------------------------
rmap = np.dtype(
    {
        "names": [
            *("vpn", "mm", "vma", "rmap_next", "oldchecksum", "flags", "seqnr", "age", "remaining_skips"),
            *("nid", "rb_red", "rb_left", "rb_right", "rb_parent", "hlist_next", "hlist_prev", "head", "key"),
        ],
        "formats": [
            *("i8", "i4", "i4", "i4", "u4", "i1", "u1", "u1", "u1"),
            *("i2", "i1", "i4", "i4", "i4", "i4", "i4", "i4", "u4"),
        ],
        # rb_*, nid, and seqnr (low 8 bits of ctl.generation at insertion): while UNSTABLE. hlist_*, head: while STABLE.
        # vma: a hint, checked before use. key: while UNSTABLE, the content's key at insertion (unstable.py says when it counts).
        # rmap_next: next item of the mm by address; free: next free slot. oldchecksum: while CALM_KNOWN.
        "offsets": [0, 8, 12, 16, 20, 24, 25, 26, 27, 28, 30, 32, 36, 40, 32, 36, 40, 44],
        "itemsize": 48,
    }
)
RMAP_UNSTABLE = 1
RMAP_STABLE = 2
RMAP_CALM_KNOWN = 4  # oldchecksum holds the checksum of the last look

# --- stable nodes -----------------------------------------------------------------------------------------------------------
stable = np.dtype(
    {
        "names": [
            *("kpfn", "chain_prune_time", "hlist", "rmap_hlist_len"),
            *("rb_left", "rb_right", "rb_parent", "list_next", "list_prev", "chain"),
            *("nid", "place", "rb_red", "key"),
        ],
        "formats": [
            *("i4", "i4", "i4", "i4"),
            *("i4", "i4", "i4", "i4", "i4", "i4"),
            *("i2", "i1", "i1", "u4"),
        ],
        # kpfn: not for a CHAIN; chain_prune_time (ms, low 31 bits): only for a CHAIN.
        # hlist: first rmap_item; for a CHAIN first dup; free: next free slot. rmap_hlist_len: not for a CHAIN.
        # key: of the content, or KEY_LOOK where only a look through the keyhole tells.
        # rb_*: IN_TREE and CHAIN. list_*: IN_CHAIN and MIGRATING. chain: IN_CHAIN, the chain it hangs on.
        "offsets": [0, 0, 4, 8, 12, 16, 20, 12, 16, 20, 24, 26, 27, 28],
        "itemsize": 32,
    }
)
KEY_LOOK = 1  # lowest bit of a key: the page is gone (or this is a CHAIN), the other bits say nothing
FREE = 0
IN_TREE = 1  # a plain node of the stable tree of `nid`
IN_CHAIN = 2  # a dup
MIGRATING = 3  # on migrate_nodes
CHAIN = 4  # stands in the tree for one content and holds dups

# --- the journal of intents -----------------------------------------------------------------------------------------------
intent = np.dtype(
    [
        ("vpn", "i8"),
        ("mm", "i4"),
        ("kind", "i4"),
        ("old_pfn", "i4"),  # 0 where there was none (a zero mapping that is broken)
        ("new_pfn", "i4"),  # 0 for INTENT_ZERO
        ("serial", "i4"),  # of the mm
        ("unused", "i4"),
    ]
)
INTENT_PROTECT = 1
INTENT_REDIRECT = 2
INTENT_ZERO = 3
INTENT_BREAK = 4

# --- scheduled events (checkpoint.py) -----------------------------------------------------------------------------------------
event = np.dtype(
    [
        ("at", "i8"),  # number of the checkpoint, from 1, counted since armed
        ("code", "i4"),
        ("gap", "i4"),  # out: the gap at which it happened
        ("status", "i8"),  # out: what it returned
        ("args", "i8", (4,)),
    ],
    align=True,
)

ARMED = 1  # ctl.armed: apply the schedule
JUDGED = 2  # and check every invariant after each event

# --- gaps (spec section 10) --------------------------------------------------------------------------------------------------
GAP_PAGE_CHOSEN = 1  # page chosen, its stable node not yet looked at
GAP_STABLE_NODE = 2  # at a node of a stable tree, before its content is compared
GAP_KEYHOLE = 3  # kpfn read, back pointer not yet
GAP_MATCH = 4  # content matched, page not yet locked
GAP_LOCKED = 5  # page locked once, node compared, not yet returned
GAP_SEARCHED = 6  # search done, merge not begun
GAP_WRITE_PROTECTED = 7  # write-protected, not yet compared
GAP_FIRST_MERGED = 8  # first page is KSM, its partner is not yet merged
GAP_MERGED = 9  # merged, not yet inserted or appended
GAP_UNSTABLE_NODE = 10  # at a node of an unstable tree, before its content is compared
GAP_NAMES = (
    *("", "page-chosen", "stable-node", "keyhole", "match", "locked", "searched", "write-protected"),
    *("first-merged", "merged", "unstable-node"),
)


class World(NamedTuple):
    """All arrays of one machine and its merger; record layouts are the dtypes of this module."""

    ctl: Records
    nodes: Records
    frames: Records
    contents: Records  # by pfn
    ptes: Records
    shadow: Records  # by pte, when ctl.shadow_on
    vmas: Records
    mms: Records
    rmaps: Records
    stables: Records
    journal: Records
    schedule: Records


# The promise of at most 64 bytes per tracked page and 64 per frame (a frame has at most one stable node of its own).
assert rmap.itemsize + pte.itemsize <= 64
assert frame.itemsize + content.itemsize + stable.itemsize <= 64
assert (ctl.itemsize % 8, vma.itemsize, frame.itemsize, pte.itemsize, event.itemsize) == (0, 32, 16, 16, 56)
