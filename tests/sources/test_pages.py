"""Judge the small parts: the table of pages, areas of smaps, runs of words, ranges, nodes."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagefold.sources import Pages
from pagefold.sources.areas import INCOMPATIBLE, parse_smaps
from pagefold.sources.hashing import CHUNK_PAGES, page_ranges
from pagefold.sources.nodes import online_nodes
from pagefold.sources.pagemap import read_words
from pagefold.sources.pages import ARRAYS

SMAPS = """\
00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/a file with  spaces
Rss:                 300 kB
Anonymous:             8 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
Size:               1024 kB
Rss:                 512 kB
Anonymous:           512 kB
KSM:                  16 kB
AnonHugePages:         0 kB
Swap:                  4 kB
THPeligible:           1
ProtectionKey:         0
VmFlags: rd wr mr mw me ac mg
7f0000200000-7f0000300000 rw-s 00000000 00:01 12 /dev/zero (deleted)
Rss:                   4 kB
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
Rss:                   0 kB
VmFlags: ex
"""


def table(count: int) -> Pages:
    """Make a table of so many pages, each array with its own values."""
    kinds = {"node": np.int16, "address": np.int64, "frame": np.int64, "high": np.uint64, "low": np.uint64}
    arrays = {name: np.arange(count).astype(kinds.get(name, np.bool_)) for name in ARRAYS}
    return Pages(label="x", pid=1, page_size=4096, swapped=3, **arrays)


def test_select_keeps_label_and_counts() -> None:
    pages = table(10)
    some = pages.select(pages.address % 2 == 0)
    assert len(pages) == 10 and len(some) == 5
    assert (some.label, some.pid, some.swapped) == ("x", 1, 3)
    assert all(getattr(some, name).tolist() == getattr(pages, name)[::2].tolist() for name in ARRAYS)
    assert pages.select(np.array([3, 1])).address.tolist() == [3, 1]
    assert pages.zero.tolist() == [True] + [False] * 9


def test_the_arrays_are_the_columns() -> None:
    columns = "address high low node frame exclusive ksm huge volatile advised"
    assert tuple(columns.split()) == ARRAYS


def test_unequal_arrays_are_refused() -> None:
    pages = table(3)
    with pytest.raises(ValueError, match="high has 3 entries, address 2"):
        Pages(label="", pid=None, page_size=1, **{n: getattr(pages, n)[: 2 if n == "address" else 3] for n in ARRAYS})


def test_parse_smaps() -> None:
    code, plain, shared, vsyscall = parse_smaps(SMAPS)
    assert (code.start, code.end, code.name) == (0x400000, 0x452000, "/usr/bin/a file with  spaces")
    assert code.compatible and not code.advised and code.kib == {"Rss": 300, "Anonymous": 8}
    assert plain.compatible and plain.advised and plain.name == "" and plain.size == 1 << 20
    assert plain.kib == {"Rss": 512, "Anonymous": 512, "KSM": 16, "AnonHugePages": 0, "Swap": 4}
    assert not shared.compatible
    assert not vsyscall.compatible
    assert list(parse_smaps("")) == []


@pytest.mark.parametrize("flag", sorted(INCOMPATIBLE))
def test_each_incompatible_flag(flag: str) -> None:
    area = next(parse_smaps(f"1000-2000 rw-p 00000000 00:00 0 \nVmFlags: rd wr mr {flag} mw mg\n"))
    assert not area.compatible


@pytest.mark.parametrize(("text", "nodes"), [("0\n", [0]), ("0-2,5\n", [0, 1, 2, 5]), (None, [0])])
def test_online_nodes(tmp_path: Path, text: str | None, nodes: list[int]) -> None:
    if text is not None:
        (tmp_path / "devices/system/node").mkdir(parents=True)
        (tmp_path / "devices/system/node/online").write_text(text)
    assert online_nodes(tmp_path) == nodes


@settings(deadline=None)
@given(st.lists(st.integers(0, 3000), unique=True).map(sorted), st.integers(0, 3000))
def test_read_words_reads_what_is_there_and_zeros_beyond(indexes: list[int], size: int) -> None:
    fd = os.memfd_create("words")
    try:
        os.write(fd, (np.arange(size, dtype=np.uint64) + 1).tobytes())
        words = read_words(fd, np.array(indexes, np.int64))
    finally:
        os.close(fd)
    assert words.tolist() == [index + 1 if index < size else 0 for index in indexes]


@given(st.lists(st.integers(0, 3 * CHUNK_PAGES), unique=True).map(sorted))
def test_page_ranges_cover_every_page_in_order(numbers: list[int]) -> None:
    address = np.array(numbers, np.int64) * 4096
    ranges, first = page_ranges(address, 4096)
    covered = [at for start, size in ranges.tolist() for at in range(start, start + size, 4096)]
    assert covered == address.tolist()
    assert len(first) - 1 == -(-len(numbers) // CHUNK_PAGES)
    for chunk, (begin, end) in enumerate(itertools.pairwise(first)):
        size = min(CHUNK_PAGES, len(numbers) - chunk * CHUNK_PAGES)
        assert ranges[begin:end, 1].sum() == size * 4096
