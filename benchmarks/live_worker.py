"""Be a process whose pages are merged, for live_merge.py: fill memory, have it advised, and obey lines on standard input.

usage: live_worker.py WHO PAGES SHARED SEED
WHO: pagefold, ksmd or nobody; SHARED: one page in so many is equal to the other workers'
lines: "latency SO SECONDS GAP_NS" begins writing randomly, "stop" ends that and prints its figures, "quit"
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import threading

import numpy as np

PAGE = 4096


def main() -> None:
    who, pages, every, seed = sys.argv[1], *map(int, sys.argv[2:5])
    block = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = np.frombuffer(block, np.uint8)
    libc = ctypes.CDLL(None)
    address, size = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes)
    assert libc.madvise(address, size, 15) == 0  # MADV_NOHUGEPAGE: the same kind of pages for everybody
    words = data.view(np.uint64).reshape(pages, PAGE // 8)
    words[:] = np.random.default_rng(seed).integers(0, 2**64, words.shape, np.uint64)
    if every:
        shared = np.random.default_rng(0).integers(0, 2**64, (len(words[::every]), PAGE // 8), np.uint64)
        words[::every] = shared
        del shared
    if who == "ksmd":
        assert libc.madvise(address, size, 12) == 0  # MADV_MERGEABLE
    elif who == "pagefold":
        import pagefold

        handle = pagefold.advise(data)
        assert handle is not None
    print("ready", flush=True)
    stop, times, done = ctypes.c_int(0), np.zeros(20_000_000, np.uint32), [0]
    thread = None
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "latency":
            write = ctypes.CDLL(rest[0]).write_randomly
            write.restype = ctypes.c_uint64
            write.argtypes = [
                ctypes.c_void_p,
                *[ctypes.c_uint64] * 3,
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_uint64,
            ]

            def run(write=write, gap=int(rest[1])) -> None:  # type: ignore[no-untyped-def]
                done[0] = write(
                    data.ctypes.data, pages, seed, gap, ctypes.addressof(stop), times.ctypes.data, len(times)
                )

            thread = threading.Thread(target=run)
            thread.start()
            print("writing", flush=True)
        elif word == "stop" and thread is not None:
            stop.value = 1
            thread.join()
            took = np.sort(times[: done[0]]) / 1000
            names = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
            figures = {name: float(took[min(int(len(took) * at), len(took) - 1)]) for name, at in names.items()}
            print(json.dumps({"writes": len(took), **figures}), flush=True)
        else:
            break


if __name__ == "__main__":
    main()
