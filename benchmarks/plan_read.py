"""Measure how fast `ProcessReader.read` (find, copy, hash) is against merely copying the same pages.

    python benchmarks/plan_read.py [--mib 1024] [--rounds 7] [--huge] [--json]

A child process holds random pages. Each round runs, one after the other: the whole `read`; process_vm_readv
of the same pages in one thread and in chunks of the same size; /proc/PID/mem likewise; the median of the
rounds counts. The target is `read` at half the speed of plain process_vm_readv or better, with huge pages as well,
which the kernel copies three times as fast.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from pagefold.sources.hashing import CHUNK_PAGES, page_ranges
from pagefold.sources.memory_reader import MemoryReader
from pagefold.sources.process import ProcessReader

TARGET = 0.5
CHILD = """
import mmap, os, sys
size = int(sys.argv[1]) << 20
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(int(sys.argv[2]))
for at in range(0, size, 1 << 20):
    memory[at : at + (1 << 20)] = os.urandom(1 << 20)
print("ready", flush=True)
sys.stdin.read()
"""


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class VmReader:
    """Copy by process_vm_readv: the fastest copy there is, which pagefold must not use (see `memory_reader`)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.call = ctypes.CDLL(None, use_errno=True).process_vm_readv
        self.call.restype = ctypes.c_ssize_t
        self.call.argtypes = [ctypes.c_int, *[ctypes.c_void_p, ctypes.c_ulong] * 2, ctypes.c_ulong]

    def copy(self, ranges: np.ndarray, buffer: np.ndarray) -> int:
        """Copy ranges into the buffer and return the number of bytes."""
        local = np.array([buffer.ctypes.data, buffer.nbytes], np.uint64)
        return self.call(self.pid, local.ctypes.data, 1, ranges.ctypes.data, len(ranges), 0)


def copy_all(reader: VmReader | MemoryReader, ranges: np.ndarray, first: np.ndarray, page_size: int) -> None:
    """Copy every chunk into the same buffer, and do nothing with it."""
    buffer = np.empty(CHUNK_PAGES * page_size, np.uint8)
    for begin, end in zip(first[:-1].tolist(), first[1:].tolist(), strict=True):
        part = ranges[begin:end]
        size = int(part[:, 1].sum())
        if reader.copy(part, buffer[:size]) != size:
            raise SystemExit("the child's memory could not be read in full")


def measure(pid: int, rounds: int) -> dict[str, float]:
    """Return median bytes per second of each way, and the ratios."""
    pages = ProcessReader(pid).read()
    size = len(pages) * pages.page_size
    ranges, first = page_ranges(pages.address, pages.page_size)
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    ways: dict[str, Callable[[], object]] = {
        "read": lambda: ProcessReader(pid).read(),
        "process_vm_readv": lambda: copy_all(VmReader(pid), ranges, first, pages.page_size),
        "proc_mem": lambda: copy_all(MemoryReader(fd, living=True), ranges, first, pages.page_size),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    os.close(fd)
    result = {f"{name}_bytes_per_second": size / statistics.median(taken) for name, taken in times.items()}
    for other in ("process_vm_readv", "proc_mem"):
        pairs = zip(times[other], times["read"], strict=True)
        result[f"ratio_to_{other}"] = statistics.median(alone / read for alone, read in pairs)
    return {"pages": len(pages), "rounds": rounds, **result}


def main() -> None:
    """Start the child, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="memory of the child in MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--huge", action="store_true", help="let the child use transparent huge pages")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    advice = mmap.MADV_HUGEPAGE if options.huge else mmap.MADV_NOHUGEPAGE
    command = [sys.executable, "-c", CHILD, str(options.mib), str(int(advice))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise SystemExit("the child did not start")
        result = measure(child.pid, options.rounds)
        child.communicate("")
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['pages']} pages, median of {options.rounds} rounds")
    for name in ("read", "process_vm_readv", "proc_mem"):
        print(f"  {name:<18} {result[f'{name}_bytes_per_second'] / 1e9:6.2f} GB/s")
    ratio = result["ratio_to_process_vm_readv"]
    verdict = "reached" if ratio >= TARGET else "MISSED"
    print(f"  read / process_vm_readv {ratio:.2f} (target {TARGET}: {verdict})")
    print(f"  read / proc_mem         {result['ratio_to_proc_mem']:.2f}")


if __name__ == "__main__":
    main()
