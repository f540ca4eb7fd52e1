"""Judge the reading of memory images: raw files, made-up cores of every shape, and a real core of a real process."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagefold.errors import NotAnImage, NotReadable, PagefoldError, TruncatedImage
from pagefold.sources import ProcessReader, count_image, read_image
from pagefold.sources.elf import HEADER, SECTION, SEGMENT

PAGE = mmap.PAGESIZE


def header(entries: int, *, kind: int = 4, bits: int = 2, order: int = 1, sections: int = 0) -> bytes:
    """Make an ELF header whose program headers follow it."""
    ident = b"\x7fELF" + bytes([bits, order, 1]) + bytes(9)
    return HEADER.pack(ident, kind, 62, 1, 0, HEADER.size, sections, 0, 64, 56, entries, 64, int(sections > 0), 0)


def core(*segments: tuple[int, bytes, int], gap: int = 0, physical: bool = False) -> bytes:
    """Make a core of (address, bytes in the file, bytes in memory), with `gap` bytes before each content."""
    at = HEADER.size + SEGMENT.size * (len(segments) + 1)
    table, body = SEGMENT.pack(4, 0, at, 0, 0, 0, 0, 0), b""  # one note, as real cores have
    for address, data, size in segments:
        body += bytes(gap)
        places = (0, address) if physical else (address, 0)
        table += SEGMENT.pack(1, 6, at + len(body), *places, len(data), size, PAGE)
        body += data
    return header(len(segments) + 1) + table + body


def page(value: int) -> bytes:
    """Return the bytes of one page that holds a value all over."""
    return struct.pack("<Q", value) * (PAGE // 8)


def halves(data: bytes) -> tuple[int, int]:
    """Return the expected hash of a page."""
    if not any(data):
        return 0, 0
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & (1 << 64) - 1


def hashes(path: Path) -> list[tuple[int, int]]:
    """Read an image and return its hashes."""
    pages = read_image(path)
    assert count_image(path) == len(pages)
    return list(zip(pages.high.tolist(), pages.low.tolist(), strict=True))


def saved(tmp_path: Path, data: bytes) -> Path:
    """Write an image."""
    path = tmp_path / "image.bin"
    path.write_bytes(data)
    return path


def test_raw_image(tmp_path: Path) -> None:
    contents = [page(3), page(0), page(3), page(4)] * 200
    path = saved(tmp_path, b"".join(contents))
    told: list[int] = []
    pages = read_image(path, told.append)
    assert hashes(path) == [halves(content) for content in contents]
    assert sum(told) == 800
    assert (pages.label, pages.pid, pages.page_size) == ("image.bin", None, PAGE)
    assert pages.address.tolist() == [number * PAGE for number in range(800)]
    assert pages.frame.tolist() == list(range(800))
    assert pages.exclusive.all() and set(pages.node.tolist()) == {-1}
    assert not (pages.advised | pages.huge | pages.ksm | pages.volatile).any()
    assert pages.unreadable == pages.missing == 0


def test_other_page_size(tmp_path: Path) -> None:
    path = saved(tmp_path, bytes(65536 * 3))
    assert count_image(path, page_size=65536) == 3
    pages = read_image(path, page_size=65536)
    assert pages.zero.all() and pages.page_size == 65536


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE + 1, 10 * PAGE - 8])
def test_raw_image_of_a_broken_size_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(NotAnImage, match=rf"image.bin: {size} bytes .* truncate -s %{PAGE} FILE"):
        read_image(saved(tmp_path, b"x" * size))


def test_empty_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAnImage, match="empty"):
        count_image(saved(tmp_path, b""))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, message in (
        (tmp_path, "not a regular file"),
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path / "absent", "No such file"),
    ):
        with pytest.raises(NotReadable, match=f"{re.escape(str(path))}: {message}"):
            read_image(path)


def test_core_with_missing_pages(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        core((0x10000, page(1) + page(2), 4 * PAGE), (0x40000, b"", 3 * PAGE), (0x90000, page(0), PAGE), gap=5),
    )
    pages = read_image(path)
    assert hashes(path) == [halves(page(1)), halves(page(2)), (0, 0)]
    assert pages.address.tolist() == [0x10000, 0x10000 + PAGE, 0x90000]
    assert pages.missing == 2 + 3


def test_pages_are_cut_by_address_not_by_place_in_the_file(tmp_path: Path) -> None:
    data = b"h" * 100 + page(7) + page(8) + b"t" * 50
    pages = read_image(path := saved(tmp_path, core((0x10000 - 100, data, len(data)), gap=3)))
    assert hashes(path) == [halves(page(7)), halves(page(8))]
    assert pages.address.tolist() == [0x10000, 0x10000 + PAGE]
    assert pages.missing == 2  # the torn page at each end


def test_segment_smaller_than_a_page(tmp_path: Path) -> None:
    pages = read_image(saved(tmp_path, core((0x10010, b"abc", 3))))
    assert len(pages) == 0 and pages.missing == 1


def test_core_without_content(tmp_path: Path) -> None:
    pages = read_image(saved(tmp_path, core((0x10000, b"", 5 * PAGE))))
    assert len(pages) == 0 and pages.missing == 5


def test_kernel_addresses_keep_their_order(tmp_path: Path) -> None:
    high = 0xFFFF_8880_0000_0000
    pages = read_image(saved(tmp_path, core((high, page(1), PAGE), (0x1000, page(2), PAGE))))
    assert pages.address.view(np.uint64).tolist() == [0x1000, high]


def test_qemu_dump_uses_physical_addresses(tmp_path: Path) -> None:
    path = saved(tmp_path, core((0, page(1), PAGE), (1 << 20, page(2) + page(3), 2 * PAGE), physical=True))
    assert read_image(path).address.tolist() == [0, 1 << 20, (1 << 20) + PAGE]


def test_bytes_that_two_segments_name_count_once(tmp_path: Path) -> None:
    at = HEADER.size + 2 * SEGMENT.size
    table = b"".join(SEGMENT.pack(1, 6, at, place, 0x5000, PAGE, PAGE, 0) for place in (0x10000, 0x90000))
    assert hashes(saved(tmp_path, header(2) + table + page(9))) == [halves(page(9))]


def test_more_segments_than_sixteen_bits_can_count(tmp_path: Path) -> None:
    at = HEADER.size + SEGMENT.size
    table = SEGMENT.pack(1, 6, at + SECTION.size, 0x10000, 0, PAGE, PAGE, 0)
    section = SECTION.pack(0, 0, 0, 0, 0, 0, 0, 1, 0, 0)
    assert hashes(saved(tmp_path, header(0xFFFF, sections=at) + table + section + page(5))) == [halves(page(5))]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(0, bits=1), "32-bit"),
        (header(0, order=2), "big-endian"),
        (header(0, kind=2), "a program: not a core"),
        (header(0, kind=3), "shared library: not a core"),
        (header(0, kind=77), "of kind 77: not a core"),
        (header(0), "no loadable segment"),
        (header(1) + SEGMENT.pack(1, 6, 0, 0x1000, 0, 64, 8, 0), "impossible sizes"),
        (header(1) + SEGMENT.pack(1, 6, 0, 1 << 63, 0, 0, (1 << 63) + PAGE, 0), "impossible sizes"),
    ],
)
def test_other_elf_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(NotAnImage, match=message) as caught:
        read_image(saved(tmp_path, data))
    assert not isinstance(caught.value, TruncatedImage)
    assert "\n" not in str(caught.value)


def test_the_interpreter_is_not_an_image() -> None:
    with pytest.raises(NotAnImage, match="not a core"):
        read_image("/proc/self/exe")


def test_truncated_core_names_both_sizes(tmp_path: Path) -> None:
    whole = core((0x10000, page(1) * 3, 3 * PAGE))
    for cut in (4, 5, 20, HEADER.size, HEADER.size + 60, len(whole) - PAGE, len(whole) - 1):
        with pytest.raises(TruncatedImage, match=rf"\d+ bytes expected, the file has {cut}:"):
            read_image(saved(tmp_path, whole[:cut]))
    with pytest.raises(TruncatedImage, match=f"{len(whole)} bytes expected, the file has {len(whole) - 1}"):
        count_image(saved(tmp_path, whole[:-1]))


PARTS = st.lists(
    st.tuples(
        st.integers(0, 2 * PAGE),  # distance from the end of the one before
        st.lists(st.integers(0, 3), max_size=4),  # contents of pages
        st.integers(0, PAGE),  # bytes more in the file
        st.integers(0, 3 * PAGE),  # bytes more in memory
    ),
    min_size=1,
    max_size=5,
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(PARTS, st.integers(0, 300))
def test_cores_of_every_shape(tmp_path: Path, parts: list[tuple[int, list[int], int, int]], gap: int) -> None:
    """Every whole page of the memory a core describes is found, at its address, and nothing else."""
    segments, at, expected = [], 0x10000, {}
    for distance, contents, more, absent in parts:
        start = at + distance
        data = b"".join(map(page, contents)) + b"\x01" * more
        segments.append((start, data, len(data) + absent))
        for place in range(-(-start // PAGE) * PAGE, start + len(data) - PAGE + 1, PAGE):
            expected[place] = halves(data[place - start : place - start + PAGE])
        at = start + len(data) + absent
    pages = read_image(saved(tmp_path, core(*segments, gap=gap)))
    found = zip(pages.high.tolist(), pages.low.tolist(), strict=True)
    assert dict(zip(pages.address.tolist(), found, strict=True)) == expected
    assert len(pages) == len(expected)


@QUICK
@given(st.data())
def test_damaged_cores_raise_only_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    """Cut anywhere and overwrite anything in the headers: an answer or an error of the family."""
    image = bytearray(core((0x10000, page(1) * 2, 3 * PAGE), (0x20010, page(2) * 2, 2 * PAGE), gap=7))
    headers = HEADER.size + 3 * SEGMENT.size
    changes = st.tuples(st.integers(4, headers - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(changes, max_size=4)):
        image[place] = value
    cut = data.draw(st.one_of(st.just(len(image)), st.integers(0, len(image))))
    try:
        pages = read_image(saved(tmp_path, bytes(image[:cut])))
    except PagefoldError as error:
        assert "\n" not in str(error)
    else:
        assert pages.unreadable == 0


@QUICK
@given(st.binary(max_size=3 * PAGE).map(lambda tail: b"\x7fELF" + tail))
def test_anything_behind_the_magic_raises_only_our_errors(tmp_path: Path, image: bytes) -> None:
    with pytest.raises(PagefoldError):
        read_image(saved(tmp_path, image))


def test_a_real_core_equals_the_process(specimen: Callable, tmp_path: Path) -> None:
    """A core of a calm process holds, in its private areas, the pages the reader found."""
    if shutil.which("gcore") is None:
        pytest.skip("gdb's gcore is not installed")
    child = specimen("""
memory = area(300)
for page in range(300): fill(memory, page, page % 40)
RESULT = address(memory)
""")
    live = ProcessReader(child.pid).read()
    made = subprocess.run(
        ["gcore", "-o", str(tmp_path / "core"), str(child.pid)], capture_output=True, text=True, check=False
    )
    path = tmp_path / f"core.{child.pid}"
    if not path.exists():
        pytest.skip(f"gcore could not: {made.stderr.strip()[-200:]}")
    image = read_image(path)
    assert len(image) > 300
    start = child.addresses[0]
    for pages in (live, image):
        assert ((pages.address >= start) & (pages.address < start + 300 * PAGE)).sum() == 300
    position = np.searchsorted(image.address.view(np.uint64), live.address.view(np.uint64))
    inside = (live.address >= start) & (live.address < start + 300 * PAGE)
    assert np.array_equal(image.address[position[inside]], live.address[inside])
    assert np.array_equal(image.high[position[inside]], live.high[inside])
    assert np.array_equal(image.low[position[inside]], live.low[inside])
