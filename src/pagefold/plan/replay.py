"""Own the other way to the same answer: the pages put into a machine, and the engine scanning them until nothing changes."""

from __future__ import annotations

import numpy as np

from pagefold.core import doors, layout
from pagefold.engine import Counters, Engine
from pagefold.errors import CorruptionError
from pagefold.machine import Area, Machine, Process
from pagefold.plan.table import PageTable

_MAX_SCANS = 10_000


def build_machine(table: PageTable) -> tuple[Machine, list[tuple[Process, dict[int, tuple[int, int]]]]]:
    """Make a machine that holds the table's pages on their nodes and frames.

    Return it with each source's process and its pages: index in the table -> (area start, index in the area).
    """
    nodes = int(table.node.max()) + 1 if len(table) else 1
    room = [int((table.node == nid).sum()) + 1 for nid in range(nodes)]
    machine = Machine(nodes=nodes, frames=room, swap=0)
    homes: dict[int, tuple[int, int]] = {}  # frame name -> (mm, vpn) of the page that has it
    processes = []
    for number in range(len(table.sources)):
        members = np.flatnonzero(table.source == number)
        process = machine.spawn()
        processes.append((process, {int(page): (0, 0) for page in members}))
        if not len(members):
            continue
        area = process.mmap(len(members))
        for index, page in enumerate(members):
            processes[-1][1][int(page)] = (area.start, index)
            name = int(table.frame[page])
            if name in homes:
                machine._arena.run(doors.share, process.mm, area.start + index, *homes[name])
                continue
            homes[name] = (process.mm, area.start + index)
            content = np.zeros(1, layout.content)
            content["hi"], content["lo"] = table.high[page], table.low[page]
            process.load(Area(area.start + index, 1), content, table.node[page : page + 1])
        process.madvise(area, "MERGEABLE")
    return machine, processes


def replay(
    table: PageTable, *, merge_across_nodes: int = 1, use_zero_pages: int = 0, max_page_sharing: int = 256
) -> Counters:
    """Return the engine's counters once settled; volatile pages are written before every scan."""
    machine, processes = build_machine(table)
    engine = Engine(
        machine,
        smart_scan=0,
        merge_across_nodes=merge_across_nodes,
        use_zero_pages=use_zero_pages,
        max_page_sharing=max_page_sharing,
        run=1,
    )
    restless = [
        (process, start, index)
        for process, pages in processes
        for page, (start, index) in pages.items()
        if table.volatile[page]
    ]
    fresh = 2**127  # contents that no hash of this run is likely to have
    before: tuple[int, ...] = ()
    calm_scans = 0
    for _ in range(_MAX_SCANS):
        for process, start, index in restless:
            fresh += 1
            process.write(Area(start, index + 1), index, fresh)
        engine.now_ms += 10_000
        engine.scan_full()
        counters = engine.counters()
        now = (counters.pages_shared, counters.pages_sharing, counters.pages_unshared, counters.ksm_zero_pages)
        calm_scans = calm_scans + 1 if now == before else 0
        before = now
        if calm_scans == 3 or not counters.full_scans:
            return counters
    raise CorruptionError("converges", f"counters still change after {_MAX_SCANS} scans: {counters}")
