"""Judge the drawing of trees: every place a stable node can be in, word for word."""

from __future__ import annotations

from pagefold import Engine, Machine, Process
from pagefold.machine import Area
from pagefold.view.trees import draw


def player(machine: Machine, node: int, *contents: int) -> tuple[Process, Area]:
    """Start a process with an advised page for each content."""
    process = machine.spawn(node=node)
    area = process.mmap(len(contents))
    for index, content in enumerate(contents):
        process.write(area, index, content)
    process.madvise(area, "MERGEABLE")
    return process, area


def test_nothing() -> None:
    machine = Machine(nodes=2, frames=4)
    assert draw(Engine(machine)) == "stable tree (all nodes): empty\nmigrate_nodes: empty"
    assert draw(Engine(machine, merge_across_nodes=0)) == (
        "stable tree of node 0: empty\nstable tree of node 1: empty\nmigrate_nodes: empty"
    )


def test_a_chain_a_stale_node_and_a_misplaced_one() -> None:
    machine = Machine(nodes=2, frames=32, shadow=True)
    engine = Engine(machine, smart_scan=0, merge_across_nodes=0, max_page_sharing=2, run=1)
    p1, page1 = player(machine, 0, 7, 7, 7, 7, 8, 8)
    p2, page2 = player(machine, 1, 9, 9, 3)
    engine.scan_full(3)
    p1.write(page1, 4, 100)
    p1.write(page1, 5, 101)  # nobody maps the page of 8s any more
    assert p2.move_pages(page2, {0: 0}) == {0: 0}
    engine.validate()
    frames = [where.frame for _, where in p1.pages()]
    nines = dict(p2.pages())[page2.start].frame
    first, second = sorted({frames[0], frames[1], frames[2], frames[3]}, key=frames.index)
    pairs = {frame: [page1.start + i for i in range(4) if frames[i] == frame] for frame in (first, second)}
    lines = draw(engine).split("\n")
    assert lines[0] == "stable tree of node 0:"
    dups = [
        f"dup of the chain, content 7, frame f{frame} on node 0, shared by " + ", ".join(f"p1:{vpn}" for vpn in vpns)
        for frame, vpns in pairs.items()
    ]
    rows = [line.strip() for line in lines[1:4]]
    assert sorted(rows) == sorted([*dups, "stale: its page is gone"])
    assert lines[4:] == [
        "stable tree of node 1:",
        f"  content 9, frame f{nines} on node 0, shared by p2:16, p2:17  MISPLACED",
        "migrate_nodes: empty",
        "unstable tree of node 1: p2:18, content 3, now on node 1",
    ]


def test_one_tree_has_no_misplaced_nodes_and_depth_is_indented() -> None:
    machine = Machine(nodes=2, frames=32, shadow=True)
    engine = Engine(machine, smart_scan=0, run=1)
    p1, page1 = player(machine, 0, 1, 2, 3)
    player(machine, 0, 1, 2, 3)
    engine.scan_full(2)
    assert p1.move_pages(page1, {0: 1}) == {0: 1}
    lines = draw(engine).split("\n")
    where = dict(p1.pages())
    assert (lines[0], lines[4:]) == ("stable tree (all nodes):", ["migrate_nodes: empty"])
    for number, (line, indent) in enumerate(zip(lines[1:4], (6, 2, 6), strict=True)):
        page = where[page1.start + number]
        sharers = f"p1:{16 + number}, p2:{16 + number}"
        told = f"content {number + 1}, frame f{page.frame} on node {page.node}, shared by {sharers}"
        assert line == " " * indent + told
    assert "on node 1" in lines[1]


def test_a_migrating_node() -> None:
    machine = Machine(nodes=2, frames=16, shadow=True)
    engine = Engine(machine, rules="classic", merge_across_nodes=0, run=1)
    p1, page1 = player(machine, 0, 5)
    p2, page2 = player(machine, 0, 7)
    player(machine, 0, 7)
    engine.scan_full(2)
    assert p2.move_pages(page2, {0: 1}) == {0: 1}
    p1.write(page1, 0, 7)
    engine.scan(1)  # p1's search meets the misplaced node
    frame = dict(p2.pages())[page2.start].frame
    assert draw(engine).split("\n") == [
        "stable tree of node 0: empty",
        "stable tree of node 1: empty",
        "migrate_nodes:",
        f"  content 7, frame f{frame} on node 1, shared by p2:16, p3:16",
    ]


def test_pages_of_processes_that_are_gone() -> None:
    machine = Machine(frames=16, shadow=True)
    engine = Engine(machine, smart_scan=0, run=1)
    waits, _ = player(machine, 0, 1)
    shares, _ = player(machine, 0, 2)
    player(machine, 0, 2)
    engine.scan_full(2)
    waits.exit()
    shares.exit()
    text = draw(engine)
    assert "unstable tree: exited:16, gone" in text
    assert "shared by exited:16, p3:16" in text
