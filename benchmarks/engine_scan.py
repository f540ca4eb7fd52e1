"""Measure the engine's scan against the kernel's ksmd, both at full speed on as many pages, in one run.

The pages: two processes, half of all pages have one equal, the other half are unique. The engine gets them as hashes on two nodes, and
scans from nothing until counters stand still; so does ksmd with real pages (needs root; without, the engine is measured alone).

usage: python benchmarks/engine_scan.py [--pages N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from pagefold import Engine, Machine
from pagefold.core import layout
from pagefold.scenario.kernel_ksm import KernelKsm

WORKER = """
import ctypes, json, mmap, sys
import numpy as np
pages, seed, shared = (int(word) for word in sys.argv[1:])
block = mmap.mmap(-1, pages * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
data = np.frombuffer(block, np.uint8)
libc = ctypes.CDLL(None)
def advise(advice):
    assert libc.madvise(ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes), advice) == 0
advise(15)  # MADV_NOHUGEPAGE
words = data.view(np.uint64)
half = pages // 2 * 512
words[:half] = np.random.default_rng(shared).integers(0, 2**64, half, np.uint64)
words[half:] = np.random.default_rng(seed).integers(0, 2**64, len(words) - half, np.uint64)
advise(12)  # MADV_MERGEABLE
print("ready", flush=True)
sys.stdin.read()
"""


def contents(pages: int, seed: int) -> np.ndarray:
    """Return `pages` contents: the first half the same for every seed, the second half of this seed only."""
    answer = np.zeros(pages, layout.content)
    for name, start, end, one in (("hi", 0, pages // 2, 0), ("hi", pages // 2, pages, seed)):
        answer[name][start:end] = np.random.default_rng(one).integers(1, 2**63, end - start, np.uint64)
    return answer


def engine_round(pages: int) -> tuple[list[tuple[str, int, float]], float]:
    """Scan until settled; return (phase, pages looked at, seconds) of every full scan, and pages/s over all."""
    machine = Machine(nodes=2, frames=pages // 2 + 1, swap=0)
    engine = Engine(machine, smart_scan=0, run=1)
    for node in (0, 1):
        process = machine.spawn(node=node)
        area = process.mmap(pages // 2)
        process.load(area, contents(pages // 2, node + 1))
        process.madvise(area, "MERGEABLE")
    phases: list[tuple[str, int, float]] = []
    names = ("learn checksums", "fill trees and merge", "settle", "settled")
    before = None
    while True:
        began = time.perf_counter()
        scanned = engine.scan(2**62)
        seconds = time.perf_counter() - began
        phases.append((names[min(len(phases), 3)], scanned, seconds))
        counters = engine.counters()
        now = (counters.pages_shared, counters.pages_sharing, counters.pages_unshared)
        if now == before:
            break
        before = now
    assert now == (pages // 4, pages // 4, pages // 2), now
    return phases, sum(p for _, p, _ in phases) / sum(s for *_, s in phases)


def kernel_round(pages: int) -> float:
    """Let ksmd scan as many real pages until as much is merged; return pages/s."""
    with KernelKsm() as ksm:
        for knob, value in (("smart_scan", 0), ("sleep_millisecs", 0), ("pages_to_scan", 1_000_000)):
            ksm.set(knob, value)
        crew = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(pages // 2), str(seed), "0"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for seed in (1, 2)
        ]
        try:
            for worker in crew:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "ready\n"
            scanned, began = ksm.get("pages_scanned"), time.perf_counter()
            ksm.set("run", 1)
            ksm.wait_scans(4)  # as many full scans as the engine needs to see that nothing changes any more
            seconds = time.perf_counter() - began
            scanned = ksm.get("pages_scanned") - scanned
            ksm.set("run", 0)
            assert ksm.get("pages_sharing") == pages // 4, ksm.get("pages_sharing")
        finally:
            for worker in crew:
                worker.communicate()
    return scanned / seconds


def main() -> None:
    """Print the figures and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=1_048_576)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    engine_round(1024)  # compile
    ours, theirs, phases = [], [], []
    why_not = KernelKsm.why_not()
    for _ in range(options.rounds):
        phases, speed = engine_round(options.pages)
        ours.append(speed)
        if why_not is None:
            theirs.append(kernel_round(options.pages))
    result = {"pages": options.pages, "engine_pages_per_s": round(statistics.median(ours))}
    if theirs:
        result["ksmd_pages_per_s"] = round(statistics.median(theirs))
        result["ratio"] = round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.pages:,} pages on 2 nodes, half of them duplicates; median of {options.rounds} rounds")
    for name, scanned, seconds in phases:
        print(f"  engine, {name}: {scanned / seconds:,.0f} pages/s")
    print(f"  engine, from nothing to settled: {result['engine_pages_per_s']:,} pages/s")
    if theirs:
        print(f"  kernel's ksmd at full speed: {result['ksmd_pages_per_s']:,} pages/s")
        print(f"  engine / ksmd: {result['ratio']} (wanted: 3 or more)")
    else:
        print(f"  kernel not measured: {why_not}")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
