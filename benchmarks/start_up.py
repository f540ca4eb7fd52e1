"""Measure how soon the command line answers: `--help`, the first compiled run on an empty cache, and one on a warm cache.

usage: python benchmarks/start_up.py [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST_USE = """
from pagefold import Engine, Machine
machine = Machine(frames=64)
engine = Engine(machine, run=1)
for _ in range(2):
    process = machine.spawn()
    area = process.mmap(1)
    process.write(area, 0, 7)
    process.madvise(area, "MERGEABLE")
engine.scan_full(2)
assert engine.counters().pages_sharing == 1
"""
PAGEFOLD = str(Path(sys.executable).parent / "pagefold")


def seconds(command: list[str], cache: str) -> float:
    """Run a command with a compile cache of its own; return how long it took."""
    began = time.perf_counter()
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    """Print the figures beside what is wanted and beside a bare interpreter, which tells how fast this machine is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as cache:
        use = [sys.executable, "-c", FIRST_USE]
        first = seconds(use, cache)
        warm = statistics.median(seconds(use, cache) for _ in range(rounds))
        help_ = statistics.median(seconds([PAGEFOLD, "--help"], cache) for _ in range(rounds))
        numpy = statistics.median(seconds([sys.executable, "-c", "import numba"], cache) for _ in range(rounds))
        bare = statistics.median(seconds([sys.executable, "-c", ""], cache) for _ in range(rounds))
    print(f"bare interpreter: {bare:.2f} s; import numba: {numpy:.2f} s")
    print(f"pagefold --help: {help_:.2f} s, {help_ / bare:.1f} x the bare interpreter (wanted: under 0.3 s)")
    print(f"first compiled run, empty cache: {first:.1f} s (wanted: under 20 s)")
    print(f"compiled run, warm cache: {warm:.2f} s, {warm / numpy:.1f} x the import of numba (wanted: under 1.5 s)")


if __name__ == "__main__":
    main()
