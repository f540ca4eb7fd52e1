"""Be a process that merges as users' do: `import pagefold`, memory made and advised. Run as a program, told what to do on stdin.

usage: real_client.py MIB SEED EVERY     one page in EVERY is the same for all seeds
lines: "check", "write COUNT", "unadvise", "pss", "quit"
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np

import pagefold

PAGE = 4096


def contents(pages: int, seed: int, every: int) -> np.ndarray:
    """Return the pages of a seed."""
    words = np.random.default_rng(seed + 1).integers(0, 2**64, (pages, PAGE // 8), np.uint64)
    words[::every] = np.random.default_rng(0).integers(0, 2**64, words[::every].shape, np.uint64)
    return words


def pss() -> int:
    """Return what the kernel counts for this process, in bytes, of memory alone (private, and its share of what it shares)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def store_pss(address: int, size: int) -> int:
    """Return the Pss of the mappings of a range, in bytes."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(word, 16) for word in first.split("-"))
            inside = address <= start and end <= address + size
        elif inside and first == "Pss:":
            total += int(line.split()[1]) * 1024
    return total


def main() -> None:
    pages, seed, every = int(sys.argv[1]) * 256, int(sys.argv[2]), int(sys.argv[3])
    # A guard page on each side: the kernel joins no other memory to the mapping.
    block = mmap.mmap(-1, (pages + 2) * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    words = np.frombuffer(block, np.uint64).reshape(pages + 2, PAGE // 8)[1:-1]
    words[:] = contents(pages, seed, every)
    block.madvise(mmap.MADV_DONTDUMP, 0, PAGE)
    block.madvise(mmap.MADV_DONTDUMP, (pages + 1) * PAGE, PAGE)
    expected = contents(pages, seed, every)
    handle = pagefold.advise(words)
    print("ready", flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "check":
            print("intact" if np.array_equal(words, expected) else "DAMAGED", flush=True)
        elif word == "write":
            count = int(rest[0])
            words[:count, 3] += np.uint64(1)
            expected[:count, 3] += np.uint64(1)
            print("written", flush=True)
        elif word == "unadvise":
            print(pagefold.unadvise(handle), flush=True)
        elif word == "pss":
            int(words[:, 0].sum())  # the kernel counts a merged page for whoever has looked at it
            print(store_pss(words.ctypes.data, words.nbytes), flush=True)
        elif word == "merging":
            print(pagefold.stats()["process"]["ksm_merging_pages"], flush=True)
        else:
            break


if __name__ == "__main__":
    main()
