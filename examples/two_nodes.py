"""Two processes on two nodes: merge, migrate, and see where everything is."""

from pagefold import Engine, Machine
from pagefold.view.trees import draw

machine = Machine(nodes=2, frames=1024)
engine = Engine(machine, merge_across_nodes=0, smart_scan=0, run=1)

processes = [machine.spawn(node=0), machine.spawn(node=1)]
areas = [process.mmap(4) for process in processes]
for process, area in zip(processes, areas, strict=True):
    for page, content in enumerate([7, 7, 8, 9]):
        process.write(area, page, content)
    process.madvise(area, "MERGEABLE")

engine.scan_full(2)  # one look to learn the pages, one to merge them
print(draw(engine))
processes[0].move_pages(areas[0], {0: 1})  # the merged page of node 0 migrates to node 1 ...
engine.scan_full(2)  # ... and the scan finds its equal there
print("\nafter the migration:\n" + draw(engine))
counters = engine.counters()
print(f"\npages_shared {counters.pages_shared}, pages_sharing {counters.pages_sharing}")
