"""Run the live merger on two NUMA nodes, and judge it by what the kernel says of every page: its frame and that frame's node.

Each case prints a line when it holds; the first that does not ends the program with its assertion. Slots of the store are moved between
nodes as an administrator would move them, by move_pages(2) with MPOL_MF_MOVE_ALL from a process that maps them.
"""

import errno
import os
import random
import signal
import sys
import time
from collections import Counter

from world import (
    PATIENCE,
    World,
    check_all_merged_that_can,
    check_no_page_joined_another_node,
    check_what_is_told,
    merged,
)


def equal_pages_stay_apart(world):
    """Under merge_across_nodes=0 pages merge within each node, and never between two."""
    common = list(range(1, 33))
    for node, lonely in ((0, 101), (0, 102), (1, 101), (1, 102)):
        world.spawn(node, [*common, lonely])  # 101 and 102 have an equal on the other node alone
    before = world.look()
    world.settle()
    after = world.look()
    check_no_page_joined_another_node(before, after)
    check_all_merged_that_can(after)
    assert Counter(len(pages) for pages in merged(after).values()) == {2: 64}
    counters = world.counters()
    assert (counters["pages_shared"], counters["pages_sharing"]) == (64, 64), counters
    assert world.ask("stat")["saved_bytes"] == 64 * 4096
    check_what_is_told(world, after)


def across_nodes_they_are_one(world):
    """merge_across_nodes is busy while pages are merged; run=2 gives them back where they were; then all become one."""
    common = list(range(1, 33))
    for node in (0, 0, 1, 1):
        world.spawn(node, common)
    before = world.look()
    world.settle()
    assert world.refused(merge_across_nodes=1) == errno.EBUSY
    world.set(run=2)
    world.wait(lambda: not merged(world.look()), "run=2 leaves pages merged")
    private = world.look()
    assert all(private[page][1] == row[1] for page, row in before.items()), "pages were given back elsewhere"
    assert len({row[0] for row in private.values()}) == len(private)
    world.set(merge_across_nodes=1, run=1)
    world.settle()
    groups = merged(world.look())
    assert sorted(map(len, groups.values())) == [4] * 32, groups
    world.set(run=2)
    world.wait(lambda: not merged(world.look()), "run=2 leaves pages merged")
    world.set(merge_across_nodes=0, run=1)
    world.settle()
    after = world.look()
    check_all_merged_that_can(after)
    check_no_page_joined_another_node(private, after)


def nothing_joins_a_misplaced_page(world):
    """Slots moved to node 1 are no longer node 0's: newcomers there get slots of their own, and those of node 1 may join the moved ones."""
    common = list(range(1, 33))
    moving = list(range(16))
    first, second = world.spawn(0, common), world.spawn(0, common)
    world.settle()
    world.set(run=0)
    assert first.ask("move", moving, 1) == [1] * 16
    view = world.look()
    for one in (first, second):
        assert (found := [view[one, index][1] for index in range(32)]) == [1] * 16 + [0] * 16, found
    newcomers = [world.spawn(node, common) for node in (0, 0, 1, 1)]
    before = world.look()
    world.set(run=1)
    world.settle()
    after = world.look()
    check_no_page_joined_another_node(before, after)
    check_all_merged_that_can(after)  # first's and second's moved pages are the slots that newcomers of node 1 joined
    check_what_is_told(world, after)
    for index in moving:
        assert after[first, index][0] == before[first, index][0], "a moved slot was left"
        assert after[newcomers[2], index][0] == after[first, index][0] != after[newcomers[0], index][0]


def moved_onto_its_equal(world):
    """A slot that comes to a node where its equal is a slot already, is not given up for it; nothing joins it on the node it left."""
    common = list(range(1, 17))
    here, there = [world.spawn(0, common) for _ in range(2)], [world.spawn(1, common) for _ in range(2)]
    world.settle()
    before = world.look()
    world.set(run=0)
    assert here[0].ask("move", list(range(16)), 1) == [1] * 16
    moved = world.look()
    late = [world.spawn(0, common), world.spawn(1, common)]
    early = world.look()
    world.set(run=1)
    world.settle()
    after = world.look()
    check_no_page_joined_another_node(early, after)
    for index in range(16):
        assert after[here[0], index][:2] == moved[here[0], index][:2] and after[here[0], index][1] == 1
        assert after[there[0], index] == before[there[0], index]
        assert after[late[1], index][0] in (after[here[0], index][0], after[there[0], index][0])
        assert not after[late[0], index][2], "the only one of its content on node 0 is merged"


def slots_change_places(world):
    """Equal slots of both nodes swap: each is misplaced, and newcomers join the one that is on their node now."""
    common = list(range(1, 17))
    here, there = [world.spawn(0, common) for _ in range(2)], [world.spawn(1, common) for _ in range(2)]
    world.settle()
    world.set(run=0)
    assert here[0].ask("move", list(range(16)), 1) == [1] * 16
    assert there[0].ask("move", list(range(16)), 0) == [0] * 16
    late = [world.spawn(0, common), world.spawn(1, common)]
    before = world.look()
    world.set(run=1)
    world.settle()
    after = world.look()
    check_no_page_joined_another_node(before, after)
    check_all_merged_that_can(after)
    for index in range(16):
        assert after[late[0], index][0] == after[there[0], index][0] != after[late[1], index][0]


def moved_in_the_middle_of_a_pass(world):
    """Also while a pass is under way: what was merged before the move went along, what comes after it does not follow."""
    common = list(range(1, 13))
    first, second = world.spawn(0, common), world.spawn(0, common)
    world.settle()
    world.set(
        pages_to_scan=1, sleep_millisecs=1_000_000_000
    )  # from here on the daemon scans a page at each change of a knob
    late = world.spawn(0, common)
    pace = 1_000_000_000

    def joined(view):
        return sum(view[late, index][2] for index in range(len(common)))

    def step():
        nonlocal pace
        pace += 1
        world.set(sleep_millisecs=pace)
        world.wait(world.nothing_is_under_way, "windows are under way for ever")
        return world.look()

    before = world.look()
    for _ in range(20 * len(common)):
        if joined(before):
            break
        before = step()
    assert 0 < joined(before) < len(common) - 3, "the daemon was not stopped in the middle of a pass"
    assert first.ask("move", list(range(len(common))), 1) == [1] * len(common)
    before = world.look()
    for _ in range(5 * len(common)):
        after = step()
        check_no_page_joined_another_node(before, after)
        before = after
    world.set(pages_to_scan=16384, sleep_millisecs=20)
    world.settle()
    check_no_page_joined_another_node(before, world.look())
    assert second in world.neighbours


def private_pages_that_move(world):
    """A page that was moved before it merged belongs to the node where it is."""
    common = list(range(1, 17))
    world.set(run=0)
    here, there = [world.spawn(0, common) for _ in range(2)], [world.spawn(1, common) for _ in range(2)]
    assert here[0].ask("move", list(range(8)), 1) == [1] * 8
    before = world.look()
    world.set(run=1)
    world.settle()
    after = world.look()
    check_no_page_joined_another_node(before, after)
    check_all_merged_that_can(after)
    assert [after[here[0], index][1] for index in range(16)] == [1] * 8 + [0] * 8
    for index in range(8):
        assert after[here[0], index][0] == after[there[0], index][0] and not after[here[1], index][2]


def slots_move_while_others_die(world):
    """A slot that comes to a node does not mix with those that died there at the same time: none is lost."""
    leaving = [world.spawn(0, range(1, 17)) for _ in range(2)]
    dying = [world.spawn(1, range(101, 117)) for _ in range(2)]
    world.settle()
    world.set(run=0)
    assert leaving[0].ask("move", list(range(16)), 1) == [1] * 16
    for one in dying:
        one.kill()
        world.neighbours.remove(one)
    before = world.look()
    world.set(run=1)
    world.settle()
    check_no_page_joined_another_node(before, world.look())
    counters = world.counters()
    assert (counters["pages_shared"], counters["pages_sharing"]) == (16, 16), counters
    world.verify()


def emptied_extents_keep_their_nodes(world):
    """Slots that are copied, because few others of their extent live, stay on the node to which they were moved."""
    pair = [world.spawn(0, range(1, 129)) for _ in range(2)]
    world.settle()
    world.set(run=0)
    assert pair[0].ask("move", list(range(16)), 1) == [1] * 16
    for index in range(32, 128):
        for one in pair:
            one.write(index, one.pid * 1000 + index)
    before = world.look()
    world.set(run=1)
    world.wait(lambda: world.look()[pair[0], 0][0] != before[pair[0], 0][0], "the extent is not emptied")
    world.settle()
    after = world.look()
    check_no_page_joined_another_node(before, after)
    assert [after[pair[1], index][1:] for index in range(32)] == [(1, True)] * 16 + [(0, True)] * 16
    check_what_is_told(world, after)


def written_and_given_back(world):
    """Who writes to a slot that was moved gets a copy at home, as does who un-advises; the others keep it."""
    common = list(range(1, 17))
    trio = [world.spawn(0, common) for _ in range(3)]
    world.settle()
    assert trio[0].ask("move", list(range(16)), 1) == [1] * 16
    before = world.look()
    for index in range(8):
        trio[0].write(index, 1000 + index)
    trio[1].unadvise()
    view = world.look()
    for index in range(16):
        assert view[trio[1], index][1:] == (0, False), "given back elsewhere than at home"
        assert view[trio[2], index] == before[trio[2], index]
        assert view[trio[0], index][1] == (0 if index < 8 else 1)
    world.settle()
    check_no_page_joined_another_node(view, world.look())


def storm(world, rounds=25, seed=int(os.environ.get("SEED", "1"))):
    """By chance, with restless pages in everybody: slots move while the daemon scans, pages are written, processes come and die."""
    chance = random.Random(seed)

    def contents():
        return [chance.randrange(1, 24) for _ in range(24)]

    for node in (0, 0, 1, 1):
        world.spawn(node, contents())
    for number in range(rounds):
        for one in world.neighbours:
            one.ask("restless", True)
        for _ in range(12):
            one = chance.choice(world.neighbours)
            deed = chance.random()
            if deed < 0.45:
                where = one.ask("move", chance.sample(range(24), chance.randrange(1, 24)), chance.randrange(2))
                assert set(where) <= {0, 1, -errno.EBUSY, -errno.EAGAIN}, where
            elif deed < 0.8:
                one.write(chance.randrange(24), chance.randrange(1, 24))
            elif deed < 0.85 and len(world.neighbours) > 3:
                one.kill()
                world.neighbours.remove(one)
            elif deed < 0.9 and len(world.neighbours) < 6:
                world.spawn(chance.randrange(2), contents())
            elif deed < 0.95:
                one.unadvise()
                one.advise()
            else:
                world.verify()
        went = sum(one.ask("restless", False) for one in world.neighbours)
        world.settle()
        # Now the daemon rests, and what it does next is judged: what merges after these moves, does so where it is.
        world.set(run=0)
        for one in world.neighbours:
            one.ask("move", chance.sample(range(24), 6), chance.randrange(2))
            one.write(chance.randrange(24), chance.randrange(1, 24))
        before = world.look()
        world.set(run=1)
        world.settle()
        check_no_page_joined_another_node(before, world.look())
        print(
            f"  round {number}: {len(world.neighbours)} processes, {went} restless rounds, {world.counters()}",
            flush=True,
        )


CASES = (
    *(equal_pages_stay_apart, across_nodes_they_are_one, nothing_joins_a_misplaced_page, moved_onto_its_equal),
    *(slots_change_places, moved_in_the_middle_of_a_pass, private_pages_that_move),
    *(written_and_given_back, slots_move_while_others_die, emptied_extents_keep_their_nodes, storm),
)


def end_with_the_host():
    """Let a process watch our input, and end us when it ends: then nobody is there to be told."""
    if os.fork() == 0:
        while os.read(0, 4096):
            pass
        os.kill(os.getppid(), signal.SIGKILL)


def main():
    """Run the cases that are named, or all."""
    wanted = sys.argv[1:]
    end_with_the_host()
    world = World()
    for case in CASES:
        if not wanted or case.__name__ in wanted:
            began = time.monotonic()
            world.afresh(merge_across_nodes=0)
            case(world)
            world.verify()
            print(f"{case.__name__}: holds ({time.monotonic() - began:.0f} s)", flush=True)
    world.afresh()
    world.ask("stop")
    assert world.daemon.wait(PATIENCE) == 0
    left = [path.name for path in world.path.parent.iterdir()]
    assert not left, f"the daemon left {left}"


if __name__ == "__main__":
    main()
