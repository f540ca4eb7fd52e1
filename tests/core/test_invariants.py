"""Break one field at a time and hear the judge name it; then let random worlds come to rest and hold what must be true."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest
from pair import CONTENTS, Pair, random_run

from pagefold import Engine, Machine
from pagefold.core import invariants, layout, merge
from pagefold.core.compiler import entry
from pagefold.core.layout import World
from pagefold.errors import CorruptionError, PagefoldError
from tests.conftest import scaled
from tests.core.worlds import copy_of, entries, free_runs, held, rich_world, rmap_slots, stable_slots, used_frames


@pytest.fixture(scope="module")
def rich() -> tuple[Machine, Engine, World]:
    machine, engine = rich_world()
    return machine, engine, copy_of(machine.world)


@pytest.fixture
def healthy(rich: tuple[Machine, Engine, World]) -> Engine:
    machine, engine, world = rich
    machine._arena.world = copy_of(world)
    engine.validate()
    return engine


@entry
def redirect(world: World, mm: int, vpn: int, pte: int, page: int, kpage: int) -> None:
    merge.redirect(world, mm, vpn, pte, page, kpage)


# --- what is where in the healthy world -----------------------------------------------------------------------------


def plain(world: World) -> int:
    """Return a plain tree node that is no root."""
    return next(n for n in stable_slots(world, layout.IN_TREE) if world.stables[n]["rb_parent"])


def root(world: World) -> int:
    return int(world.nodes[0]["stable_root"])


def dup(world: World) -> int:
    return stable_slots(world, layout.IN_CHAIN)[0]


def chain(world: World) -> int:
    return stable_slots(world, layout.CHAIN)[0]


def migrating(world: World) -> int:
    return stable_slots(world, layout.MIGRATING)[0]


def hung(world: World) -> int:
    return int(world.stables[plain(world)]["hlist"])


def kpfn(world: World) -> int:
    return int(world.stables[plain(world)]["kpfn"])


def loose(world: World) -> int:
    """Return an rmap_item in the unstable tree that is not its root."""
    return next(item for item in rmap_slots(world, layout.RMAP_UNSTABLE) if world.rmaps[item]["rb_parent"])


def free_frame(world: World) -> int:
    return int(world.nodes[0]["free_head"])


def page(world: World, flags: int, mask: int = -1) -> int:
    """Return the first page-table entry with these flags."""
    return next(pte for *_, pte in entries(world) if int(world.ptes[pte]["flags"]) & mask == flags)


def writable(world: World) -> int:
    return page(world, layout.PTE_PRESENT | layout.PTE_WRITABLE)


def own_frame(world: World) -> int:
    return int(world.ptes[writable(world)]["pfn"])


def sharer(world: World) -> int:
    """Return the first page-table entry of a KSM page."""
    return int(world.frames[kpfn(world)]["first_pte"])


Target = Callable[[World], int]


Change = Callable[[World, int], int]


def put(array: str, where: Target | int, field: str, change: Change) -> Callable[[World], None]:
    """Make the specimen that changes one field of one record."""

    def corrupt(world: World) -> None:
        records = getattr(world, array)
        index = where if isinstance(where, int) else where(world)
        before = int(records[index][field])
        records[index][field] = change(world, before)
        assert int(records[index][field]) != before

    return corrupt


def to(value: Target | int) -> Change:
    return lambda world, _: value if isinstance(value, int) else value(world)


def more(_: World, value: int) -> int:
    return value + 1


def flip(bits: int) -> Change:
    return lambda _, value: value ^ bits


def pass_over(world: World) -> None:
    """Let the scan have passed an item that is in no tree and yet says it is in an unstable one, as the counter does."""
    item = next(one for one in rmap_slots(world, -1) if not int(world.rmaps[one]["flags"]) & BOTH)
    world.rmaps[item]["flags"] |= layout.RMAP_UNSTABLE
    world.rmaps[item]["seqnr"] = int(world.ctl[0]["generation"]) - 1
    world.ctl[0]["pages_unshared"] += 1
    world.ctl[0]["cursor_mm"], world.ctl[0]["cursor_rmap"] = world.rmaps[item]["mm"], item


BOTH = layout.RMAP_STABLE | layout.RMAP_UNSTABLE
SPECIMENS: dict[str, dict[str, Callable[[World], None]]] = {
    "one-place": {
        "a tree node that says it waits": put("stables", plain, "place", to(layout.MIGRATING)),
        "a tree node in another node's tree": put("stables", plain, "nid", to(1)),
        "a waiting node that says it is in a tree": put("stables", migrating, "place", to(layout.IN_TREE)),
        "a waiting node that nobody finds": put("ctl", 0, "migrate_head", to(0)),
        "a waiting node that names a chain": put("stables", migrating, "chain", to(chain)),
        "a tree that nobody finds": put("nodes", 0, "stable_root", to(0)),
        "a dup that says it is in the tree": put("stables", dup, "place", to(layout.IN_TREE)),
        "a dup of another node": put("stables", dup, "nid", to(1)),
        "a chain that lost its dups": put("stables", chain, "hlist", to(0)),
        "a list of dups with a wrong link": put("stables", dup, "list_prev", more),
        "a chain that says it is plain": put("stables", chain, "place", to(layout.IN_TREE)),
        "a list that leads outside": put("ctl", 0, "migrate_head", to(1 << 30)),
    },
    "order": {
        "a KSM page that changed": put("contents", kpfn, "lo", to(1000)),
        "a dup that changed": put("contents", lambda w: int(w.stables[dup(w)]["kpfn"]), "hi", to(1)),
    },
    "red-black": {
        "a red root": put("stables", root, "rb_red", to(1)),
        "a wrong parent": put("stables", plain, "rb_parent", more),
        "a wrong colour": put("stables", plain, "rb_red", flip(1)),
        "a root with a parent": put("stables", root, "rb_parent", to(2)),
        "an unstable node of a wrong colour": put("rmaps", loose, "rb_red", flip(1)),
        "an unstable node with a wrong parent": put("rmaps", loose, "rb_parent", more),
        "a forgotten unstable tree": put("nodes", 0, "unstable_root", to(0)),
        "an item of another scan": put("rmaps", loose, "seqnr", flip(1)),
    },
    "lists": {
        "a wrong length": put("stables", plain, "rmap_hlist_len", more),
        "an item of another head": put("rmaps", hung, "head", to(migrating)),
        "an item not flagged STABLE": put("rmaps", hung, "flags", flip(layout.RMAP_STABLE)),
        "a wrong link back": put("rmaps", hung, "hlist_prev", more),
        "an item both STABLE and UNSTABLE": put("rmaps", hung, "flags", flip(layout.RMAP_UNSTABLE)),
        "an item of another mm": put("rmaps", hung, "mm", to(1)),
    },
    "counters": {
        **{
            f"a wrong {name}": put("ctl", 0, name, more)
            for name in ("pages_shared", "pages_sharing", "pages_unshared", "rmap_items", "ksm_zero_pages")
        },
        **{f"a wrong {name}": put("ctl", 0, name, more) for name in ("stable_node_chains", "stable_node_dups")},
        **{f"an mm's wrong {name}": put("mms", 1, name, more) for name in ("ksm_rmap_items", "ksm_merging_pages")},
        "items that nobody finds": put("mms", 2, "rmap_list", to(0)),
        "an mm's wrong ksm_zero_pages": put("mms", 1, "ksm_zero_pages", more),
    },
    "keyhole": {
        "a free frame that names a stable node": put("frames", free_frame, "mapping", to(plain)),
        "a page that names a node of another": put("frames", own_frame, "mapping", to(plain)),
        "a page that names no node at all": put("frames", own_frame, "mapping", to(1 << 30)),
        "a page that names a chain": put("frames", own_frame, "mapping", to(chain)),
        "a node that looks at another frame": put("stables", plain, "kpfn", more),
        "a key of another content": put("stables", plain, "key", flip(1 << 20)),
        "a key in an unstable tree of another content": put("rmaps", loose, "key", flip(1 << 20)),
        "a key that says the page is gone": put("stables", dup, "key", flip(layout.KEY_LOOK)),
    },
    "data": {
        "a page that changed by itself": put("contents", own_frame, "lo", more),
        "a merged page that is not what was written": put("shadow", sharer, "lo", more),
        "a swapped page that changed": put("shadow", lambda w: page(w, layout.PTE_SWAPPED), "hi", more),
        "a zero mapping of a page that is not zero": put("shadow", lambda w: page(w, layout.PTE_ZERO), "lo", more),
        "an absent page that was written": put("shadow", lambda w: page(w, 0), "lo", more),
    },
    "placement": {"a merge across nodes": put("ctl", 0, "placement_broken", more)},
    "refuse": {
        "a pinned page that was replaced": put("ctl", 0, "refuse_broken", more),
        "a KSM page that may be written": put("ptes", sharer, "flags", flip(layout.PTE_WRITABLE)),
    },
    "frames": {
        "a wrong mapcount": put("frames", own_frame, "mapcount", more),
        "a wrong number of free frames": put("nodes", 0, "free", more),
        "a free frame of another node": put("frames", free_frame, "nid", to(1)),
        "a used frame among the free": put("nodes", 0, "free_head", to(own_frame)),
        "an entry with a wrong link": put("ptes", sharer, "prev", more),
        "free frames that nobody finds": put("nodes", 1, "free_head", to(0)),
        "a free frame that is mapped": put("frames", free_frame, "mapcount", more),
    },
    "page-tables": {
        "a swapped page that says it is present": put(
            "ptes", lambda w: page(w, layout.PTE_SWAPPED), "flags", to(layout.PTE_PRESENT)
        ),
        "a present page that says it is swapped": put("ptes", writable, "flags", to(layout.PTE_SWAPPED)),
        "an absent page that names a frame": put("ptes", lambda w: page(w, 0), "pfn", to(own_frame)),
        "an area that ends before it starts": put("vmas", 1, "end", to(1)),
        "an area of another mm": put("vmas", 1, "mm", to(2)),
    },
    "ring": {
        "a wrong link back": put("mms", 1, "ring_prev", to(2)),
        "a mm that nobody finds": put("mms", 0, "ring_next", to(2)),
        "a cursor on a slot outside": put("ctl", 0, "cursor_mm", to(5)),
        "a wrong end": put("mms", 0, "ring_prev", to(1)),
    },
    "unstable": {"an item that a scan left in a tree that is no more": pass_over},
}


def test_every_invariant_has_a_specimen() -> None:
    assert set(SPECIMENS) == set(invariants.NAMES) - {""}


def test_the_healthy_world_has_something_of_everything(healthy: Engine) -> None:
    world = healthy.machine.world
    assert len(stable_slots(world, layout.IN_TREE)) == 6
    assert len(stable_slots(world, layout.IN_CHAIN)) == 2
    assert len(stable_slots(world, layout.CHAIN)) == 1
    assert len(stable_slots(world, layout.MIGRATING)) == 1
    assert len(rmap_slots(world, layout.RMAP_UNSTABLE)) > 5
    assert world.ctl[0]["cursor_mm"] != 0
    kinds = {int(world.ptes[pte]["flags"]) for *_, pte in entries(world)}
    wanted = {layout.PTE_PRESENT, layout.PTE_PRESENT | layout.PTE_WRITABLE, layout.PTE_SWAPPED, layout.PTE_ZERO, 0}
    assert kinds == wanted
    assert held(world).sum() == 1


@pytest.mark.parametrize(("invariant", "name"), [(one, name) for one, names in SPECIMENS.items() for name in names])
def test_one_broken_field_is_named(healthy: Engine, invariant: str, name: str) -> None:
    world = healthy.machine.world
    corrupt = SPECIMENS[invariant][name]
    before = copy_of(world)
    corrupt(world)
    changed = sum(int((one != other).sum()) for one, other in zip(before, world, strict=True))
    assert changed == (2 if corrupt is pass_over else 1), "a specimen changes one record, or an item and its counter"
    with pytest.raises(CorruptionError) as caught:
        healthy.validate()
    assert caught.value.invariant == invariant, caught.value.detail
    assert f"{invariant!r} is broken" in str(caught.value)


def test_a_merge_across_nodes_is_counted_when_it_happens(healthy: Engine) -> None:
    world = healthy.machine.world
    far = int(world.stables[migrating(world)]["kpfn"])
    redirect(world, 1, 16, writable(world), own_frame(world), far)
    with pytest.raises(CorruptionError, match="placement"):
        healthy.validate()


def test_replacing_a_pinned_page_is_counted_when_it_happens(healthy: Engine) -> None:
    world = healthy.machine.world
    pinned = int(held(world).argmax())
    redirect(world, 1, 18, int(world.frames[pinned]["first_pte"]), pinned, kpfn(world))
    with pytest.raises(CorruptionError, match="refuse"):
        healthy.validate()


def test_a_full_dup_that_migrates_may_pass_the_sharing_limit() -> None:
    """By 5.2 the scanned item leaves a full dup, so that a stranger may take its place before it returns (4.1 allows it)."""
    machine = Machine(nodes=2, frames=32, shadow=True)
    engine = Engine(machine, run=1, smart_scan=0, merge_across_nodes=0, max_page_sharing=2)
    process = machine.spawn()
    far, near, late = process.mmap(2, node=1), process.mmap(2, node=0), process.mmap(1, node=1)
    for area in (far, near):
        process.write(area, 0, 7)
        process.write(area, 1, 7)
        process.madvise(area, "MERGEABLE")
    process.madvise(late, "MERGEABLE")
    engine.scan_full(2)
    process.write(late, 0, 7)
    engine.scan_full()
    process.move_pages(near, {0: 1})
    assert not machine.world.ctl[0]["bypasses"] - 1, "one KSM page migrated, nobody forked"
    for _ in range(3):
        engine.scan_full()
        engine.validate()
    lengths = machine.world.stables["rmap_hlist_len"][machine.world.stables["place"] == layout.IN_CHAIN]
    assert lengths.max() == 3
    machine.world.ctl[0]["bypasses"] = 0  # as if nothing had migrated
    with pytest.raises(CorruptionError, match="lists"):
        engine.validate()


# --- no-leak and converges: random worlds that come to rest ----------------------------------------------------------


def at_rest(seed: int) -> Pair:
    """Run a random world, then let go of everything that others hold; pages are scanned, none is skipped."""
    pair = random_run(seed, 150)
    machine, engine = pair.machine, pair.engine
    if machine.world.ctl[0]["offlining"]:
        machine.offline_cancel()
    for nid in range(machine.nodes):
        machine.online(nid)
    for number, area, index, _ in pair.pins:
        pair.process(number).unpin(area, index)
    for number, area, index, _ in pair.locks:
        pair.process(number).unlock(area, index)
    if engine.get("run") != 1:
        engine.set("run", 1)
    if engine.rules == "mainline":
        engine.set("smart_scan", 0)
        engine.set("use_zero_pages", 0)
        engine.set("advisor_mode", "none")
    finish_scan(engine)
    engine.validate()
    return pair


def finish_scan(engine: Engine) -> None:
    """Bring the cursor to the ring's head."""
    if engine.machine.world.ctl[0]["cursor_mm"]:
        engine.scan_full()


SEEDS = range(scaled(60))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_leak_when_everybody_is_gone(seed: int) -> None:
    """All mms exit, two full scans: no rmap_item, an empty ring, all frames and slots free.

    Who scans an empty ring searches nothing, so stable nodes that lost their last rmap_item before (by a write) and
    their page now may stay; none has an rmap_item or a page, and run 2 frees the last of them.
    """
    pair = at_rest(seed)
    machine, engine = pair.machine, pair.engine
    for process in machine.processes:
        with contextlib.suppress(PagefoldError):
            process.exit()
    engine.scan_full(2)
    engine.validate()
    world, ctl = machine.world, machine.world.ctl[0]
    assert world.mms[0]["ring_next"] == 0
    assert (ctl["rmap_items"], ctl["pages_shared"], ctl["pages_unshared"], ctl["ksm_zero_pages"]) == (0, 0, 0, 0)
    assert used_frames(world) == []
    assert free_runs(world) in ([], [(1, int(ctl["ptes_used"]) - 1)])
    for node in stable_slots(world, layout.IN_TREE, layout.IN_CHAIN, layout.MIGRATING):
        assert world.stables[node]["hlist"] == 0
        assert world.frames[world.stables[node]["kpfn"]]["mapping"] != node
    engine.set("run", 2)
    assert stable_slots(machine.world) == []
    assert machine.world.ctl[0]["migrate_head"] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_no_leak_while_another_process_is_scanned(seed: int) -> None:
    """As above with a keeper that has one calm page of every content on every node: no stable node is left either.

    The keeper's searches pass every place where a stale node can be. Classic searches end at a stale node, having
    pruned it: each full scan prunes at least one per tree, and a tree has at most one per content.
    """
    pair = at_rest(seed)
    machine, engine = pair.machine, pair.engine
    for process in machine.processes:
        with contextlib.suppress(PagefoldError):
            process.exit()
    trees = 1 if engine.get("merge_across_nodes") else machine.nodes
    keeper = machine.spawn()
    for nid in range(trees):
        area = keeper.mmap(len(CONTENTS), node=nid)
        for index, content in enumerate(CONTENTS):
            keeper.write(area, index, content)
        keeper.madvise(area, "MERGEABLE")
    engine.scan_full(2 if engine.rules == "mainline" else 2 + len(CONTENTS))
    engine.validate()
    world, ctl = machine.world, machine.world.ctl[0]
    assert stable_slots(world) == []
    assert ctl["migrate_head"] == 0
    assert ctl["rmap_items"] == ctl["pages_unshared"] == len(used_frames(world)) == len(CONTENTS) * trees


def mergeable_frames(engine: Engine) -> Iterator[tuple[tuple[int, int, int], int]]:
    """Yield ((content, tree), frame) of every present page that may be merged."""
    world = engine.machine.world
    across = engine.get("merge_across_nodes")
    for _, vma, _, pte in entries(world):
        if world.vmas[vma]["flags"] & layout.VMA_MERGEABLE and world.ptes[pte]["flags"] & layout.PTE_PRESENT:
            pfn = int(world.ptes[pte]["pfn"])
            if engine.rules == "mainline" and world.frames[pfn]["mapping"] == layout.KSM_LONE:
                continue  # it never merges (choices 26)
            content = world.contents[pfn]
            yield (int(content["hi"]), int(content["lo"]), 0 if across else int(world.frames[pfn]["nid"])), pfn


def pages_apart(engine: Engine) -> list[str]:
    """Say which equal pages could still be merged.

    Of the distinct frames of one content in one tree at most one may be without a stable node, and none if a stable
    node of that content has room. Classic: there is only one frame.
    """
    world, answer = engine.machine.world, []
    limit = engine.get("max_page_sharing") if engine.rules == "mainline" else 1 << 30
    groups: dict[tuple[int, int, int], set[int]] = defaultdict(set)
    for key, pfn in mergeable_frames(engine):
        groups[key].add(pfn)
    for key, frames in groups.items():
        lengths = [
            int(world.stables[world.frames[pfn]["mapping"]]["rmap_hlist_len"])
            for pfn in frames
            if world.frames[pfn]["mapping"] > layout.KSM_LONE
        ]
        alone = len(frames) - len(lengths)
        if alone > 1 or (alone and any(1 <= length < limit for length in lengths)):
            answer.append(f"content {key}: {alone} frames alone beside KSM pages with {lengths} sharers of {limit}")
        if engine.rules == "classic" and len(frames) > 1:
            answer.append(f"content {key}: {len(frames)} frames")
    return answer


def misplaced(engine: Engine) -> list[int]:
    """Return the living stable nodes that wait, or whose page is not on the node of their tree.

    Mainline: one whose page is mapped once waits for ever if its proper place is taken (choices 26).
    """
    world, answer = engine.machine.world, []
    for node in stable_slots(world, layout.IN_TREE, layout.IN_CHAIN, layout.MIGRATING):
        entry_ = world.stables[node]
        page = world.frames[entry_["kpfn"]]
        if page["mapping"] == node:
            nid = 0 if engine.get("merge_across_nodes") else page["nid"]
            if engine.rules == "mainline" and entry_["place"] == layout.MIGRATING and page["mapcount"] == 1:
                taken = {(s.content, s.tree) for s in engine.stable_nodes() if s.place != "migrating"}
                content = world.contents[entry_["kpfn"]]
                if (int(content["hi"]) << 64 | int(content["lo"]), nid) in taken:
                    continue
            if entry_["place"] == layout.MIGRATING or entry_["nid"] != nid:
                answer.append(node)
    return answer


def disturb(pair: Pair, seed: int) -> None:
    """Make everything mergeable, let it merge, then move, write, fork and swap much without a scan in between."""
    generator = random.Random(seed)
    for number in pair.live:
        with contextlib.suppress(PagefoldError):
            pair.process(number).merge_any(True)
    pair.engine.scan_full(3)
    for name in generator.choices(("move", "write", "read", "fork", "swap_out", "exit"), (12, 6, 3, 1, 1, 0.3), k=80):
        if not pair.live:
            return
        with contextlib.suppress(PagefoldError):
            a, b, c, d = (generator.randrange(1 << 16) for _ in range(4))
            number = pair.pick(a)
            process = pair.process(number)
            areas = pair.areas[number]
            if name == "exit":
                process.exit()
                pair.live.remove(number)
            elif name == "fork":
                child = process.fork()
                pair.live.append(child.pid)
                pair.areas[child.pid] = areas
            elif areas:
                area = areas[b % len(areas)]
                index = c % area.pages
                if name == "move":
                    process.move_pages(area, {index: d % pair.machine.nodes})
                elif name == "write":
                    process.write(area, index, CONTENTS[d % len(CONTENTS)])
                else:
                    getattr(process, name)(area, index)


@pytest.mark.parametrize("seed", SEEDS)
def test_converges_within_three_full_scans(seed: int) -> None:
    pair = at_rest(seed)
    engine = pair.engine
    disturb(pair, seed)
    engine.scan_full(3)
    engine.validate()
    assert pages_apart(engine) == []
    assert misplaced(engine) == []
    states = []
    for _ in range(3):
        state = asdict(engine.counters())
        del state["full_scans"], state["pages_scanned"]
        states.append((state, [process.ksm_stat() for process in engine.machine.processes if process.alive]))
        engine.scan_full()
    assert states[0] == states[1] == states[2]
    engine.validate()
