"""Many processes with contents by chance, under several knobs: no data is lost, no page goes astray, and what may share does."""

from __future__ import annotations

import random

from pagefold.machine import Area
from pagefold.scenario.files import states
from pagefold.scenario.host import Host, HostProcess, Observation
from pagefold.scenario.library.stage import nodes_of

Page = tuple[HostProcess, Area, int]
PROCESSES, PAGES = 6, 3


class Crowd:
    """Processes with an advised area on each node, and what was written last to each of their pages.

    `rooted`: no scan may bring a page to another node.
    """

    def __init__(self, host: Host, seed: int, *, rooted: bool) -> None:
        self.host = host
        self.chance = random.Random(seed)
        self.rooted = rooted
        self.written: dict[Page, int] = {}
        for _ in range(PROCESSES):
            process = host.spawn()
            for node in range(host.nodes):
                area = process.mmap(PAGES, node=node)
                process.madvise(area, "MERGEABLE")
                for index in range(PAGES):
                    self.write((process, area, index))

    def write(self, page: Page) -> None:
        """Write a content by chance."""
        process, area, index = page
        self.written[page] = self.chance.randrange(6)
        process.write(area, index, self.written[page])

    def some(self, count: int) -> list[Page]:
        """Choose that many pages."""
        return self.chance.sample(list(self.written), count)

    def write_some(self, count: int) -> None:
        """Write that many pages."""
        for page in self.some(count):
            self.write(page)

    def move_some(self, count: int) -> None:
        """Move that many pages to nodes by chance; some cannot be moved."""
        for process, area, index in self.some(count):
            process.move_pages(area, {index: self.chance.randrange(self.host.nodes)})

    def exit_one(self) -> None:
        """Let one process exit."""
        process = self.chance.choice(list(dict.fromkeys(page[0] for page in self.written)))
        process.exit()
        self.written = {page: content for page, content in self.written.items() if page[0] is not process}

    def scan(self, passes: int = 1) -> Observation:
        """Scan; check that every page holds what was written last, and shares with its equals only; return what is seen."""
        before = nodes_of(self.host.observe())
        self.host.scan(passes)
        seen = self.host.observe()
        if self.rooted:
            assert nodes_of(seen) == before
        shared: dict[int, int] = {}
        for page, content in self.written.items():
            process, area, index = page
            assert process.read(area, index) == content
            place = seen.place(*page)
            assert place is not None
            assert shared.setdefault(place.group, content) == content
        return seen


def _calm_down(host: Host, seed: int, *, rooted: bool) -> None:
    """Write pages between scans, and let a process exit; after two quiet scans all equal pages (of a node) must be one."""
    crowd = Crowd(host, seed, rooted=rooted)
    for _ in range(4):
        crowd.write_some(6)
        crowd.scan()
    crowd.exit_one()
    seen = crowd.scan(2)
    groups: dict[tuple[int, int], set[int]] = {}
    for page, content in crowd.written.items():
        place = seen.place(*page)
        assert place is not None
        groups.setdefault((content, place.node if rooted else 0), set()).add(place.group)
    assert all(len(pages) == 1 for pages in groups.values())


@states(needs={"smart_scan"}, knobs={"smart_scan": 0})
def scenario_crowd_merges_all_it_can(host: Host) -> None:
    """Pages are written and a process exits between scans; after two quiet scans every two equal pages are one."""
    _calm_down(host, 1, rooted=False)


@states(nodes=2, knobs={"smart_scan": 0, "merge_across_nodes": 0})
def scenario_crowd_on_several_nodes(host: Host) -> None:
    """The same with a tree for each node: all equal pages of a node are one, and none of two nodes are."""
    _calm_down(host, 3, rooted=True)


def _restless(host: Host, seed: int, *, rooted: bool) -> None:
    """Write pages, move pages, and let processes exit between scans."""
    crowd = Crowd(host, seed, rooted=rooted)
    host.scan(2)
    for turn in range(5):
        crowd.write_some(4)
        crowd.move_some(6)
        seen = crowd.scan()
        if turn % 3 == 2:
            crowd.exit_one()
    assert seen["pages_sharing"] > 0


@states(nodes=2, knobs={"merge_across_nodes": 0, "max_page_sharing": 2, "smart_scan": 0})
def scenario_restless_crowd_in_pairs(host: Host) -> None:
    """Pages are written and migrate between scans, with chains everywhere: no data is lost, and no scan moves a page."""
    _restless(host, 5, rooted=True)


@states(nodes=2, knobs={"merge_across_nodes": 0, "max_page_sharing": 3, "stable_node_chains_prune_millisecs": 0})
def scenario_restless_crowd_with_chains_pruned_at_once(host: Host) -> None:
    """The same, every search pruning the chains that it meets, and old pages being skipped."""
    _restless(host, 6, rooted=True)


@states(nodes=2, knobs={"merge_across_nodes": 1, "use_zero_pages": 1})
def scenario_restless_crowd_with_one_tree(host: Host) -> None:
    """The same with one tree for all nodes, and the zero page for content 0."""
    _restless(host, 7, rooted=False)
