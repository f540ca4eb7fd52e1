"""Small scenarios for the twin alone, each with its expectation worked out by hand from spec/ksm.md."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from shape import RbNode, RbTree
from twin import Twin

from pagefold.errors import (
    EngineStopped,
    KnobBusy,
    KnobInvalid,
    OutOfMemory,
    PagefoldError,
    UnknownKnob,
    UsageError,
)

PAGE = 16  # the first page of a process's first area


def machine(contents, on=None, **options) -> Twin:
    """One mm for each content, one MERGEABLE page each, on node `on[i]`; scanning is on, smart scan off."""
    twin = Twin(**options)
    if twin.mainline:
        twin.set("smart_scan", 0)
    if twin.nodes > 1:
        twin.set("merge_across_nodes", 0)
    for i, content in enumerate(contents):
        add(twin, content, on[i] if on else 0)
    twin.set("run", 1)
    return twin


def add(twin: Twin, content: int, node: int = 0) -> int:
    mm = twin.spawn(node)
    assert twin.mmap(mm, 1) == PAGE
    twin.write(mm, PAGE, content)
    twin.madvise(mm, PAGE, 1, "MERGEABLE")
    return mm


def full(twin: Twin, times: int = 1) -> None:
    for _ in range(times):
        before = twin.full_scans
        twin.scan(10_000)
        assert twin.full_scans == before + 1
        twin._check()


def pages(twin: Twin) -> tuple[int, int, int, int]:
    counters = twin.counters()
    return tuple(counters[f"pages_{name}"] for name in ("shared", "sharing", "unshared", "volatile"))


def group(twin: Twin, mm: int, vpn: int = PAGE) -> tuple[int, set[int]]:
    nid, sharers = twin.observe()[mm, vpn]
    return nid, {number for number, _ in sharers}


def places(twin: Twin) -> list[tuple[int, int]]:
    """Tree and real node of every stable node that is in place."""
    twin._check()
    return sorted((n.nid, n.frame.nid) for n in twin._check_stable_nodes() if not n.migrating)


# the shape


def test_a_tree_keeps_order_and_balance_whatever_is_erased():
    rng = random.Random(1)
    tree, nodes = RbTree(), {}
    for _ in range(600):
        value = rng.randrange(80)
        if value in nodes:
            if rng.random() < 0.8:
                tree.erase(nodes.pop(value))
            else:
                new = RbNode(value)
                tree.replace(nodes[value], new)
                nodes[value] = new
        else:
            parent, side, place = None, "root", tree.root
            while place is not None:
                side = "left" if value < place.value else "right"
                parent, place = place, getattr(place, side)
            nodes[value] = RbNode(value)
            tree.insert(nodes[value], parent, side)
        tree.check()
        assert [node.value for node in tree] == sorted(nodes)


def test_the_successor_takes_the_place_of_an_erased_node():
    tree, nodes = RbTree(), {}
    for value, parent, side in ((2, None, ""), (1, 2, "left"), (4, 2, "right"), (3, 4, "left")):
        nodes[value] = RbNode(value)
        tree.insert(nodes[value], nodes.get(parent), side)
    tree.erase(nodes[2])
    assert tree.root is nodes[3] and (tree.root.left, tree.root.right) == (nodes[1], nodes[4])


# merging


def test_two_equal_pages_merge_in_the_second_scan_onto_the_page_scanned_last():
    twin = machine([7, 7], on=[0, 1], nodes=2)
    twin.set("merge_across_nodes", 1)
    full(twin)
    assert pages(twin) == (0, 0, 0, 2)
    full(twin)
    assert pages(twin) == (1, 1, 0, 0)
    assert group(twin, 1) == (1, {1, 2})
    assert twin.counters()["general_profit"] == 4096 - 2 * 64
    assert twin.mm_counters(1) == {
        "ksm_rmap_items": 1,
        "ksm_merging_pages": 1,
        "ksm_zero_pages": 0,
        "ksm_process_profit": 4096 - 64,
    }


def test_the_end_of_the_ring_is_noticed_when_a_page_is_asked_for():
    twin = machine([1, 2])
    twin.scan(2)
    assert (twin.full_scans, twin.pages_scanned) == (0, 2)
    twin.scan(2)
    assert (twin.full_scans, twin.pages_scanned) == (1, 2)
    Twin.set(twin, "run", 0)
    with pytest.raises(EngineStopped):
        twin.scan(1)


def test_an_empty_ring_makes_no_full_scan():
    twin = machine([])
    twin.scan(5)
    assert twin.full_scans == 0


def test_a_page_that_changes_between_scans_stays_volatile():
    twin = machine([7, 0])
    for content in range(5):
        twin.write(2, PAGE, content)
        full(twin)
    assert pages(twin) == (0, 0, 1, 1)


@pytest.mark.parametrize(("rules", "sharing"), [("classic", 2), ("mainline", 1)])
def test_a_new_page_equal_to_a_ksm_page_merges_at_first_sight_only_in_classic(rules, sharing):
    twin = machine([7, 7], rules=rules)
    full(twin, 2)
    add(twin, 7)
    full(twin)
    assert twin.counters()["pages_sharing"] == sharing
    full(twin)
    assert twin.counters()["pages_sharing"] == 2


def test_a_write_leaves_the_ksm_page_and_the_counters_follow_at_the_next_scan():
    twin = machine([7, 7])
    full(twin, 2)
    twin.write(1, PAGE, 8)
    assert (twin.read(1, PAGE), twin.read(2, PAGE)) == (8, 7)
    assert pages(twin) == (1, 1, 0, 0)
    full(twin)
    assert pages(twin) == (1, 0, 0, 1)


def test_pinned_and_locked_pages_are_not_merged():
    twin = machine([7, 7])
    pin = twin.pin(1, PAGE)
    full(twin, 3)
    assert group(twin, 1) == (0, {1})
    twin.unpin(pin)
    lock = twin.lock(2, PAGE)
    full(twin, 2)
    assert group(twin, 1) == (0, {1})
    twin.unlock(lock)
    full(twin)
    assert group(twin, 1) == (0, {1, 2})


def test_a_partner_that_fails_breaks_the_lone_ksm_page_back():
    twin = machine([7, 7])
    full(twin)
    lock = twin.lock(1, PAGE)
    full(twin)
    assert pages(twin) == (0, 0, 1, 1)
    entry = twin.mms[2].entries[PAGE]
    assert entry.writable and not entry.frame.ksm
    twin.unlock(lock)


def test_zero_pages_are_mapped_counted_and_broken():
    twin = machine([0, 0])
    twin.set("use_zero_pages", 1)
    full(twin, 2)
    assert twin.counters()["ksm_zero_pages"] == 2
    assert twin.observe()[1, PAGE] == (-1, frozenset({(1, PAGE)}))
    assert pages(twin) == (0, 0, 0, 2)
    child = twin.fork(1)
    assert twin.counters()["ksm_zero_pages"] == 3
    twin.write(1, PAGE, 5)
    twin.madvise(2, PAGE, 1, "UNMERGEABLE")
    assert (twin.zero_pages, twin.mm_counters(child)["ksm_zero_pages"]) == (1, 1)
    twin.exit(child)
    full(twin)
    assert twin.counters()["ksm_zero_pages"] == 0


def test_smart_scan_skips_one_two_four_eight():
    twin = machine([5])
    twin.set("smart_scan", 1)
    scanned = []
    for number in range(1, 15):
        before = twin.pages_scanned
        full(twin)
        if twin.pages_scanned > before:
            scanned.append(number)
        assert twin.pages_unshared == (1 if number in scanned and number > 1 else 0)
    assert scanned == [1, 2, 3, 4, 6, 9, 14]
    assert twin.counters()["pages_skipped"] == 7


# chains


def test_a_full_page_grows_a_chain_and_the_chain_collapses():
    twin = machine([7] * 4)
    twin.set("max_page_sharing", 2)
    full(twin, 2)
    assert pages(twin) == (2, 2, 0, 0)
    assert (twin.chains, twin.dups) == (1, 2)
    assert (group(twin, 1), group(twin, 3)) == ((0, {1, 2}), (0, {3, 4}))
    add(twin, 7)
    full(twin, 2)
    assert pages(twin) == (2, 2, 1, 0)
    twin.exit(3)
    twin.exit(4)
    full(twin)
    assert pages(twin) == (1, 1, 1, 0)
    assert (twin.chains, twin.dups) == (0, 0)


def test_a_pruning_walk_takes_the_fullest_with_room_and_moves_it_to_the_front():
    twin = machine([7] * 10)
    twin.set("max_page_sharing", 5)
    full(twin, 2)
    assert [len(dup.items) for dup in next(iter(twin.stable_trees[0])).value.dups] == [5, 5]
    for mm in (1, 2, 6, 7, 8):  # the older dup keeps 3, 4, 5 and the newer one, in front, 9 and 10
        twin.write(mm, PAGE, mm + 100)
    full(twin)
    late = add(twin, 7)
    full(twin)
    twin.now_ms = 1999
    full(twin)
    assert group(twin, late) == (0, {9, 10, late})
    twin.write(late, PAGE, 4)
    full(twin)
    last = add(twin, 7)
    full(twin)
    twin.now_ms = 2000  # the first search of the scan, for the page of 1, prunes and moves the older dup
    full(twin)
    assert group(twin, last) == (0, {3, 4, 5, last})


def test_max_page_sharing_is_exceeded_only_by_fork():
    twin = machine([7, 7])
    twin.set("max_page_sharing", 2)
    full(twin, 2)
    twin.fork(1)
    full(twin)
    assert pages(twin) == (1, 2, 0, 0)


# nodes


def test_nodes_do_not_share_when_merge_across_nodes_is_0():
    twin = machine([7, 7, 7, 7], on=[0, 1, 0, 1], nodes=2)
    full(twin, 2)
    assert (group(twin, 1), group(twin, 2)) == ((0, {1, 3}), (1, {2, 4}))


@pytest.mark.parametrize("rules", ["classic", "mainline"])
def test_a_misplaced_node_goes_to_the_tree_of_its_page(rules):
    twin = machine([7, 7], on=[0, 0], nodes=2, rules=rules)
    full(twin, 2)
    assert twin.move_page(1, PAGE, 1) == "moved"
    assert places(twin) == [(0, 1)]
    full(twin)
    assert places(twin) == [(1, 1)]
    assert pages(twin) == (1, 1, 0, 0)
    assert group(twin, 1) == (1, {1, 2})


def test_an_anonymous_page_is_never_merged_onto_a_misplaced_node():
    twin = machine([1, 7, 7], on=[0, 0, 0], nodes=2)
    full(twin, 2)
    twin.write(1, PAGE, 7)
    full(twin, 1)
    twin.move_page(2, PAGE, 1)
    twin.scan(1)
    twin._check()
    assert len(twin.migrate_nodes) == 1
    assert pages(twin) == (1, 1, 1, 0)
    twin.scan(9)
    assert places(twin) == [(1, 1)]
    assert group(twin, 1) == (0, {1})


def test_classic_two_misplaced_nodes_replace_each_other_in_place():
    twin = machine([7, 7, 7, 7], on=[0, 0, 1, 1], nodes=2, rules="classic")
    full(twin, 2)
    first, second = twin.stable_trees[0].root.value, twin.stable_trees[1].root.value
    twin.move_page(1, PAGE, 1)
    twin.move_page(3, PAGE, 0)
    twin.scan(1)
    twin._check()
    assert twin.stable_trees[1].root.value is first and twin.migrate_nodes == [second]
    full(twin)
    assert twin.stable_trees[0].root.value is second and not twin.migrate_nodes
    assert pages(twin) == (2, 2, 0, 0)


def test_mainline_replaces_in_place_when_the_waiting_page_is_mapped_once():
    twin = machine([7, 7, 7, 7], on=[0, 0, 1, 1], nodes=2)
    full(twin, 2)
    first, second = twin.stable_trees[0].root.value, twin.stable_trees[1].root.value
    twin.exit(2)
    twin.move_page(1, PAGE, 1)
    twin.move_page(3, PAGE, 0)
    twin.scan(1)
    twin._check()
    assert twin.stable_trees[1].root.value is first and twin.migrate_nodes == [second]
    twin.scan(9)
    assert places(twin) == [(0, 0), (1, 1)]


def test_mainline_hangs_a_waiting_page_with_many_mappings_into_a_chain():
    twin = machine([7, 7, 7, 7], on=[0, 0, 1, 1], nodes=2)
    full(twin, 2)
    twin.move_page(1, PAGE, 1)
    full(twin)
    assert places(twin) == [(1, 1), (1, 1)]
    assert (twin.chains, twin.dups) == (1, 2)
    assert pages(twin) == (2, 2, 0, 0)
    assert group(twin, 1) == (1, {1, 2})


def test_mainline_leaves_a_waiting_page_that_is_mapped_once_alone():
    twin = machine([7, 7, 7, 7], on=[0, 0, 1, 1], nodes=2)
    full(twin, 2)
    twin.exit(2)
    twin.move_page(1, PAGE, 1)
    full(twin)
    assert group(twin, 1) == (1, {1})  # a KSM page cannot be write-protected again
    assert pages(twin) == (1, 1, 0, 1)
    full(twin)
    assert places(twin) == [(1, 1)] and len(twin.migrate_nodes) == 1


def test_classic_moves_mapping_by_mapping_and_the_empty_node_is_pruned_later():
    twin = machine([7, 7, 7, 7], on=[0, 0, 1, 1], nodes=2, rules="classic")
    full(twin, 2)
    twin.move_page(1, PAGE, 1)
    twin.scan(1)
    assert (group(twin, 1), group(twin, 2)) == ((1, {1, 3, 4}), (1, {2}))
    assert pages(twin) == (2, 2, 0, 0)
    twin.scan(9)
    assert group(twin, 2) == (1, {1, 2, 3, 4})
    assert pages(twin) == (1, 3, 0, 0)
    assert len(twin.migrate_nodes) == 1
    full(twin)
    assert not twin.migrate_nodes


def test_a_stale_node_on_migrate_nodes_is_pruned_at_the_start_of_a_full_scan():
    twin = machine([7, 7, 7, 7], on=[0, 0, 1, 1], nodes=2, rules="classic")
    full(twin, 2)
    twin.move_page(1, PAGE, 1)
    lock = twin.lock(3, PAGE)
    full(twin)  # busy: the node keeps waiting, its rmap_items left it
    assert len(twin.migrate_nodes) == 1 and not twin.migrate_nodes[0].items
    assert pages(twin) == (1, 1, 0, 2)
    twin.unlock(lock)
    twin.exit(1)
    twin.exit(2)
    assert len(twin.migrate_nodes) == 1
    full(twin)
    assert not twin.migrate_nodes


def test_a_stale_node_without_rmap_items_stays_while_the_ring_is_empty():
    twin = machine([7, 7, 7, 7], on=[0, 0, 1, 1], nodes=2)
    full(twin, 2)
    twin.exit(2)
    full(twin)
    twin.move_page(1, PAGE, 1)
    lock = twin.lock(3, PAGE)
    twin.scan(1)  # busy: the node waits without rmap_items
    twin.unlock(lock)
    for mm in (1, 3, 4):
        twin.exit(mm)
    for _ in range(3):
        twin.scan(10)
    assert not twin.ring and not twin.used and len(twin.migrate_nodes) == 1
    add(twin, 1)
    full(twin)
    assert not twin.migrate_nodes


def test_a_migrated_page_of_the_unstable_tree_is_not_a_partner():
    twin = machine([7, 7], on=[0, 0], nodes=2)
    full(twin)
    twin.scan(1)
    twin.move_page(1, PAGE, 1)
    twin.scan(9)
    assert pages(twin) == (0, 0, 1, 1)
    assert group(twin, 2) == (0, {2})


# processes


def test_fork_shares_and_the_child_is_counted_when_scanned():
    twin = machine([7, 7, 3])
    full(twin, 2)
    child = twin.fork(1)
    other = twin.fork(3)
    assert group(twin, child) == (0, {1, 2, child})
    full(twin)
    assert pages(twin)[:2] == (1, 2)
    twin.write(other, PAGE, 4)
    assert (twin.read(3, PAGE), twin.read(other, PAGE)) == (3, 4)


def test_fork_copies_a_pinned_page_or_fails_as_a_whole():
    twin = machine([7], frames=2)
    pin = twin.pin(1, PAGE)
    child = twin.fork(1)
    assert group(twin, child) == (0, {child})
    with pytest.raises(OutOfMemory):
        twin.fork(1)
    twin._check()
    twin.unpin(pin)
    assert twin.fork(1) == child + 1


def test_exit_leaves_at_once_without_rmap_items_and_else_comes_next():
    twin = machine([1, 2, 3, 4])
    twin.exit(4)
    assert [mm.number for mm in twin.ring] == [1, 2, 3]
    full(twin)
    twin.scan(1)
    twin.exit(3)
    assert [mm.number for mm in twin.ring] == [1, 3, 2]
    twin.exit(1)
    assert [mm.number for mm in twin.ring] == [1, 3, 2]
    twin.scan(1)
    assert [mm.number for mm in twin.ring] == [2]
    assert twin.counters()["pages_unshared"] == 1


def test_a_new_mm_is_reached_last():
    twin = machine([1, 2])
    twin.scan(2)
    add(twin, 3)
    assert [mm.number for mm in twin.ring] == [1, 3, 2]
    twin.fork(1)
    assert [mm.number for mm in twin.ring] == [1, 3, 4, 2]


def test_an_mm_without_mergeable_areas_leaves_and_comes_back():
    twin = machine([1, 2])
    full(twin, 2)
    twin.madvise(1, PAGE, 1, "UNMERGEABLE")
    twin.munmap(2, PAGE, 1)
    assert twin.counters()["pages_unshared"] == 2
    full(twin)
    assert not twin.ring and pages(twin) == (0, 0, 0, 0)
    twin.madvise(1, PAGE, 1, "MERGEABLE")
    assert [mm.number for mm in twin.ring] == [1]


def test_merge_any_covers_present_and_future_areas_and_breaks_when_off():
    twin = machine([7])
    mm = twin.spawn()
    first = twin.mmap(mm, 2)
    twin.merge_any(mm, True)
    second = twin.mmap(mm, 1)
    shared = twin.mmap(mm, 1, kind="shared")
    assert (first, second, shared) == (16, 19, 21)
    for vpn in (first, second, shared):
        twin.write(mm, vpn, 7)
    full(twin, 2)
    assert group(twin, 1) == (0, {1, mm})
    assert pages(twin) == (1, 2, 0, 0)
    twin.merge_any(mm, False)
    assert len({twin.observe()[mm, vpn][1] for vpn in (first, second, shared)}) == 3


def test_swap_out_breaks_sharing_and_the_merger_finds_it_again():
    twin = machine([7, 7], swap=1)
    full(twin, 2)
    assert twin.swap_out(1, PAGE) == "moved"
    assert group(twin, 1) == (-2, {1, 2})
    assert (twin.swap_out(1, PAGE), twin.lock(1, PAGE)) == ("absent", None)
    assert (twin.read(1, PAGE), twin.read(2, PAGE)) == (7, 7)
    assert (group(twin, 1), group(twin, 2)) == ((0, {1}), (0, {2}))
    full(twin, 2)
    assert pages(twin) == (1, 1, 0, 0)
    full(twin)


def test_move_page_answers():
    twin = machine([7], nodes=2, frames=1)
    twin.mmap(1, 1)
    assert twin.move_page(1, 18, 1) == "absent"
    assert (twin.move_page(1, PAGE, 2), twin.move_page(1, PAGE, 0)) == ("no node", "same")
    lock = twin.lock(1, PAGE)
    assert (twin.move_page(1, PAGE, 1), twin.swap_out(1, PAGE)) == ("busy", "busy")
    twin.unlock(lock)
    twin.write(1, 18, 1)  # falls to node 1
    assert twin.move_page(1, PAGE, 1) == "no memory"
    twin.munmap(1, 18, 1)
    assert twin.move_page(1, PAGE, 1) == "moved"
    with pytest.raises(UsageError):
        twin.read(1, 18)


def test_unmerge_without_memory_keeps_what_was_done_and_the_advice():
    twin = machine([7, 7], frames=3)
    twin.mmap(2, 1)
    full(twin, 2)
    twin.write(2, 18, 1)
    mm = add(twin, 2)
    with pytest.raises(OutOfMemory):
        twin.madvise(1, PAGE, 1, "UNMERGEABLE")
    assert group(twin, 1) == (0, {1, 2})
    assert twin.mms[1].areas[0].mergeable
    with pytest.raises(OutOfMemory):
        twin.set("run", 2)
    assert twin.get("run") == 0
    twin.exit(mm)
    with pytest.raises(OutOfMemory):
        twin.set("run", 2)  # the page of 1 is private now; that of 2 needs a third frame for a moment
    assert group(twin, 1) == (0, {1})
    twin.munmap(2, 18, 1)
    twin.set("run", 2)
    assert places(twin) == []
    twin._check()


# knobs


def test_run_2_makes_everything_private_and_starts_anew():
    twin = machine([7, 7, 3])
    full(twin, 2)
    twin.exit(3)
    twin.set("run", 2)
    twin._check()
    assert pages(twin) == (0, 0, 0, 0)
    assert (twin.full_scans, [mm.number for mm in twin.ring]) == (0, [1, 2])
    assert group(twin, 1) == (0, {1}) and places(twin) == []
    twin.set("run", 1)
    full(twin, 2)
    assert pages(twin) == (1, 1, 0, 0)


def test_busy_invalid_and_unknown_knobs():
    twin = machine([7, 7], nodes=2)
    full(twin, 2)
    for knob, value in (("merge_across_nodes", 1), ("max_page_sharing", 3)):
        with pytest.raises(KnobBusy):
            twin.set(knob, value)
    for knob, value in (("run", 3), ("merge_across_nodes", 2), ("max_page_sharing", 1), ("smart_scan", 2)):
        with pytest.raises(KnobInvalid):
            twin.set(knob, value)
    with pytest.raises(UnknownKnob):
        twin.set("nothing", 1)
    with pytest.raises(KnobInvalid):
        Twin(rules="classic").set("smart_scan", 1)
    twin.set("run", 2)
    twin.set("merge_across_nodes", 1)
    assert twin.get("merge_across_nodes") == 1


def test_a_mapped_page_without_rmap_items_keeps_the_knob_busy():
    twin = machine([7, 7])
    child = twin.fork(2)
    twin.madvise(child, PAGE, 1, "UNMERGEABLE")  # it goes on sharing the anonymous frame of 2
    full(twin, 2)
    assert group(twin, child) == (0, {1, 2, child})
    twin.exit(1)
    twin.exit(2)
    full(twin)
    assert pages(twin) == (0, 0, 0, 0) and len(places(twin)) == 1
    with pytest.raises(KnobBusy):
        twin.set("max_page_sharing", 3)
    twin.exit(child)
    twin.set("max_page_sharing", 3)
    assert places(twin) == []


def test_the_advisor_in_integers():
    twin = machine([])
    twin.set("advisor_mode", "scan-time")
    assert twin.get("pages_to_scan") == 500
    with pytest.raises(KnobInvalid):
        twin.set("pages_to_scan", 5)
    twin.advise(100, 10)  # factor 200, change 30: 75 pages, held up to 50 * 10
    assert twin.get("pages_to_scan") == 500
    twin.advise(400, 50)  # factor 50, change 141: 1410 pages, held down to 10 * 70
    assert twin.get("pages_to_scan") == 700
    twin.set("advisor_mode", "none")
    assert twin.get("pages_to_scan") == 100


def test_offline_moves_pages_and_removes_stale_nodes():
    twin = machine([7, 7, 8, 8], on=[1, 1, 1, 1], nodes=2)
    full(twin, 2)
    twin.write(3, PAGE, 1)
    twin.write(4, PAGE, 2)  # the node of 8 is stale now
    twin.offline_begin(1)
    assert twin.get("run") == 5
    with pytest.raises(KnobBusy):
        twin.scan(1)
    with pytest.raises(KnobBusy):
        twin.set("run", 2)
    pin = twin.pin(3, PAGE)
    assert twin.offline_finish() == "busy"
    assert twin.get("run") == 1
    twin.unpin(pin)
    twin.offline_begin(1)
    assert twin.offline_finish() == "offline"
    assert places(twin) == [(1, 0)]
    assert {nid for nid, _ in twin.observe().values()} == {0}
    assert twin.move_page(1, PAGE, 1) == "no node"
    full(twin)
    assert places(twin) == [(0, 0)]
    twin.online(1)
    assert twin.move_page(1, PAGE, 1) == "moved"


# everything at once


@pytest.mark.parametrize("seed", range(40))
def test_random_operations_keep_the_data_and_the_counters(seed):
    rng = random.Random(seed)
    rules = rng.choice(["classic", "mainline"])
    nodes = rng.choice([1, 2, 3])
    twin = Twin(nodes=nodes, frames=rng.choice([12, 40]), swap=4, rules=rules)
    if rules == "mainline":
        twin.set("smart_scan", rng.randrange(2))
        twin.set("use_zero_pages", rng.randrange(2))
        twin.set("max_page_sharing", rng.choice([2, 3, 256]))
    twin.set("merge_across_nodes", rng.randrange(2))
    twin.set("run", 1)
    truth: dict[int, dict[int, int]] = {}
    tokens = []
    for _ in range(250):
        twin.now_ms += rng.choice([0, 100, 1500])
        with suppress(PagefoldError):
            one_random_operation(rng, twin, truth, tokens)
        twin._check()
    for pin, token in tokens:
        (twin.unpin if pin else twin.unlock)(token)
    for mm, contents in truth.items():
        for vpn, content in contents.items():
            assert peek(twin, mm, vpn) == content
        twin.exit(mm)
    if twin._going() is not None:
        twin.offline_cancel()
    if twin.get("run") == 1:
        for _ in range(3):
            twin.scan(1000)
        twin._check()
        assert pages(twin) == (0, 0, 0, 0)
        assert not twin.used and not twin.ring


def peek(twin, mm, vpn):
    entry = twin.mms[mm].entries[vpn]
    if isinstance(entry, str):
        return 0
    return getattr(entry, "frame", entry).content


def one_random_operation(rng, twin, truth, tokens):
    kind = rng.choice(["scan"] * 4 + ["write"] * 4 + ["move"] * 2 + ["swap", "fork", "exit", "spawn", "rare"])
    node = rng.randrange(twin.nodes)
    if kind == "scan":
        twin.scan(rng.choice([1, 3, 50]))
        return
    if kind == "spawn" or not truth:
        mm = twin.spawn(node)
        truth[mm] = {}
        twin.mmap(mm, 4)
        twin.madvise(mm, PAGE, 4, "MERGEABLE")
        return
    mm = rng.choice(list(truth))
    vpn = PAGE + rng.randrange(4)
    if kind == "write":
        content = rng.randrange(4)
        twin.write(mm, vpn, content)
        truth[mm][vpn] = content
    elif kind == "move":
        twin.move_page(mm, vpn, node)
    elif kind == "swap":
        twin.swap_out(mm, vpn)
    elif kind == "fork":
        truth[twin.fork(mm, node)] = dict(truth[mm])
    elif kind == "exit" and len(truth) > 3:
        twin.exit(mm)
        del truth[mm]
    elif kind == "rare":
        one_rare_operation(rng, twin, mm, vpn, node, tokens)


def one_rare_operation(rng, twin, mm, vpn, node, tokens):
    kind = rng.choice(["pin", "lock", "free", "free", "advice", "any", "run", "knob", "offline", "online"])
    if kind == "pin":
        tokens.append((True, twin.pin(mm, vpn)))
    elif kind == "lock":
        token = twin.lock(mm, vpn)
        if token is not None:
            tokens.append((False, token))
    elif kind == "free" and tokens:
        pin, token = tokens.pop()
        (twin.unpin if pin else twin.unlock)(token)
    elif kind == "advice":
        twin.madvise(mm, vpn, rng.randrange(1, 4), rng.choice(["MERGEABLE", "UNMERGEABLE"]))
    elif kind == "any":
        twin.merge_any(mm, rng.random() < 0.7)
    elif kind == "run":
        try:
            twin.set("run", 2)
        finally:
            twin.set("run", 1)
    elif kind == "knob":
        twin.set("merge_across_nodes", rng.randrange(2))
    elif kind == "offline":
        twin.offline_begin(node)
        assert twin.offline_finish() in ("offline", "busy", "no memory")
    elif kind == "online":
        twin.online(node)
