"""Own the five short stories that answer the reviewer's five questions (spec section 7), told by the engine itself.

Each story is a generator: it does something to a fresh engine and yields what it has just done, so that whoever tells it can draw the
trees in between. Classic rules, as in the patch that was reviewed, with merge_across_nodes 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pagefold.engine import Engine
from pagefold.errors import UsageError
from pagefold.machine import Area, Machine, Process

Told = Iterator[str]


@dataclass(frozen=True)
class Story:
    """A question, its answer in one sentence, and the steps that show it."""

    question: str
    answer: str
    tell: Callable[[Engine], Told]


def stage() -> Engine:
    """Make the machine of every story: two nodes with a tree each."""
    return Engine(Machine(nodes=2, frames=32, swap=0, shadow=True), rules="classic", merge_across_nodes=0, run=1)


def find(number: int) -> Story:
    """Return story 1 to 5, or raise UsageError."""
    if not 1 <= number <= len(STORIES):
        raise UsageError(f"there is no question {number}; use 1 to {len(STORIES)}")
    return STORIES[number - 1]


def _player(engine: Engine, node: int, content: int) -> tuple[Process, Area]:
    """Start a process on a node with one advised page."""
    process = engine.machine.spawn(node=node)
    area = process.mmap(1)
    process.write(area, 0, content)
    process.madvise(area, "MERGEABLE")
    return process, area


def _kept_off(engine: Engine) -> Told:
    p1, page1 = _player(engine, 0, 5)
    p2, page2 = _player(engine, 0, 7)
    _player(engine, 0, 7)
    engine.scan_full(2)
    yield "Three processes on node 0. p2 and p3 have equal pages (content 7), and the scan has merged them; p1 has another one."
    p2.move_pages(page2, {0: 1})
    yield "The merged page migrates to node 1. Its stable node still stands in the tree of node 0."
    p1.write(page1, 0, 7)
    engine.scan(1)
    yield (
        "p1 writes 7, and is scanned. Its search in the tree of node 0 matches the content, locks the page, and only then compares "
        "nodes: misplaced. Nothing is returned, p1 stays as it is, and the stable node goes to migrate_nodes, out of every search's way."
    )


def _leaves(engine: Engine) -> Told:
    yield from _kept_off(engine)
    engine.scan(1)
    yield (
        "The scan meets p2, a mapping of the waiting node. The tree of node 1, where the page is now, has no equal: the node is slotted "
        "in right where the search ended, with all its mappings. It has left migrate_nodes."
    )


def _pruned(engine: Engine) -> Told:
    p1, page1 = _player(engine, 0, 7)
    _player(engine, 0, 7)
    _player(engine, 1, 7)
    _player(engine, 1, 7)
    engine.scan_full(2)
    yield "p1 and p2 share a page on node 0; p3 and p4 share an equal one on node 1. Each is in the tree of its node."
    p1.move_pages(page1, {0: 1})
    engine.scan(1)
    yield (
        "The first page migrates to node 1, and the scan meets p1: its stable node goes to migrate_nodes. The tree of node 1 has an "
        "equal that is well placed, so p1 moves over to that one."
    )
    engine.scan(1)
    yield (
        "The scan meets p2, which moves over too. Nothing maps the first page any more: it is free, and its node is stale. "
        "No rmap_item names it, no search walks the list: nobody would ever notice."
    )
    engine.scan_full(1)
    engine.scan(1)
    yield "The next full scan begins with a look through the keyhole of every node on migrate_nodes: the stale one is gone."


def _unstable(engine: Engine) -> Told:
    p1, page1 = _player(engine, 0, 7)
    _player(engine, 0, 7)
    _player(engine, 1, 7)
    engine.scan_full(1)
    engine.scan(1)
    yield "p1 and p2 are on node 0, p3 is on node 1, all equal. In the second scan p1 has just entered the unstable tree of node 0."
    p1.move_pages(page1, {0: 1})
    engine.scan(1)
    yield (
        "p1's page migrates to node 1, then p2 is scanned. It finds p1's page by content, sees that it lives elsewhere, and does nothing: "
        "no merge across nodes, no repair."
    )
    engine.scan_full(1)
    engine.scan_full(1)
    yield (
        "The unstable trees were thrown away and built anew by the next scan: p1 was put where it belongs, on node 1, and merged with p3 "
        "there. p2 waits on node 0."
    )


def _displaced(engine: Engine) -> Told:
    p1, page1 = _player(engine, 0, 7)
    _player(engine, 0, 7)
    p3, page3 = _player(engine, 1, 7)
    _player(engine, 1, 7)
    engine.scan_full(2)
    yield "p1 and p2 share a page on node 0, p3 and p4 an equal one on node 1."
    p1.move_pages(page1, {0: 1})
    p3.move_pages(page3, {0: 0})
    yield "The two pages swap nodes. Both stable nodes stand in the wrong tree now."
    engine.scan(1)
    yield (
        "The scan meets p1. Its node waits on migrate_nodes for a moment; the search in the tree of node 1 matches the other node, which "
        "is misplaced itself. The first takes its very place. It is the displaced one that is marked, by its head, and put on the list: "
        "not the one that was just put into the tree."
    )
    engine.scan(1)
    engine.scan(1)
    yield "When the scan meets p3, the displaced node finds the tree of node 0 free, and is slotted in. Both are at home."


STORIES: tuple[Story, ...] = (
    Story(
        "How are other pages kept off a misplaced page?",
        "At the match: the page's node is compared with its tree's after the page was locked, and a misplaced page is never returned.",
        _kept_off,
    ),
    Story(
        "When does a node leave migrate_nodes?",
        "When the scan next meets one of its mappings: it takes a free place in the right tree, or that of a misplaced equal.",
        _leaves,
    ),
    Story(
        "Why is migrate_nodes pruned once per full scan?",
        "Because searches never walk that list: a node whose last mapping went would stay for ever, and the list would grow.",
        _pruned,
    ),
    Story(
        "What if a page of the unstable tree migrates?",
        "Nothing needs repair: the match is not used, and the unstable trees are built anew by every full scan.",
        _unstable,
    ),
    Story(
        "Why is head set to &migrate_nodes after a node was put into the tree?",
        "It is the displaced node that is marked, not the one that took its place.",
        _displaced,
    ),
)
