"""Judge which pages of which objects are found, and what keeps them: every kind of buffer, and every kind that is refused."""

from __future__ import annotations

import array
import ctypes
import decimal
import itertools
import mmap
import multiprocessing
from collections import OrderedDict
from multiprocessing import shared_memory, sharedctypes
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.live.own_process import python

from pagefold.errors import UsageError
from pagefold.live import buffers
from pagefold.live.buffers import EDGE, PAGE, SMALL, Found, runs


def find(thing: Any) -> Found:
    return buffers.find(thing, lambda address, size: None)


def interior(address: int, size: int) -> list[tuple[int, int]]:
    """Return the whole pages of a range, worked out page by page."""
    pages = range(address // PAGE, (address + size) // PAGE + 1)
    whole = [page for page in pages if page * PAGE >= address and (page + 1) * PAGE <= address + size]
    return [(whole[0] * PAGE, (whole[-1] + 1) * PAGE)] if whole else []


def spans(found: Found) -> list[tuple[int, int]]:
    """Return the pieces, neighbours joined."""
    joined: list[tuple[int, int]] = []
    for piece in found.pieces:
        if joined and joined[-1][1] == piece.start:
            joined[-1] = (joined[-1][0], piece.end)
        else:
            joined.append((piece.start, piece.end))
    return joined


def memory_of(one: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    low, high = np.lib.array_utils.byte_bounds(one)
    return interior(low, high - low)


# --- strided memory -----------------------------------------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Return a view of an array: sliced with steps of both signs, axes in any order."""
    shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    itemsize = draw(st.sampled_from([1, 2, 8, 700, 5000]))
    whole = np.zeros(shape, np.dtype((np.void, itemsize)))
    steps = [draw(st.integers(1, 9)) * draw(st.sampled_from([1, -1])) for _ in shape]
    first = [draw(st.integers(0, length - 1)) for length in shape]
    view = whole[tuple(slice(begin, None, step) for begin, step in zip(first, steps, strict=True))]
    return view.transpose(draw(st.permutations(range(view.ndim))))


@given(views())
@settings(max_examples=300, deadline=None)
def test_runs_are_the_memory_of_a_view_but_for_gaps_of_a_page(view: np.ndarray[Any, Any]) -> None:
    address = view.__array_interface__["data"][0]
    offsets = np.zeros(view.shape, np.int64)
    for axis, (step, length) in enumerate(zip(view.strides, view.shape, strict=True)):
        offsets += (np.arange(length) * step).reshape([-1 if one == axis else 1 for one in range(view.ndim)])
    begins = np.sort(address + offsets.reshape(-1))
    found = sorted(runs(address, view.shape, view.strides, view.itemsize))
    low, high = np.lib.array_utils.byte_bounds(view)
    assert found[0][0] == low
    assert max(at + size for at, size in found) == high
    # Every item lies in a run.
    starts, ends = np.array([at for at, _ in found]), np.array([at + size for at, size in found])
    run = np.searchsorted(starts, begins, side="right") - 1
    assert (begins >= starts[run]).all()
    assert (begins + view.itemsize <= np.maximum.accumulate(ends)[run]).all()
    # And every page that lies whole in a run has bytes of an item.
    covered = {
        page for begin in begins.tolist() for page in range(begin // PAGE, (begin + view.itemsize - 1) // PAGE + 1)
    }
    for at, size in found:
        for low, high in interior(at, size):
            assert covered.issuperset(range(low // PAGE, high // PAGE))


def test_a_view_of_too_many_runs_is_one_run() -> None:
    shape, strides = (300, 300), (300 * 3 * PAGE, 3 * PAGE)
    assert list(runs(0, shape, strides, 8)) == [(0, 300 * 300 * 3 * PAGE - 3 * PAGE + 8)]
    assert len(list(runs(0, (200, 300), strides, 8))) == 200 * 300


def test_no_items_have_no_memory() -> None:
    assert list(runs(PAGE, (3, 0, 4), (8, 8, 8), 8)) == []
    assert list(runs(PAGE, (), (), 8)) == [(PAGE, 8)]
    assert list(runs(PAGE, (2, 3), (), 8)) == [(PAGE, 48)]


# --- NumPy --------------------------------------------------------------------------------------------------------------


class Subclass(np.ndarray[Any, Any]):
    pass


def owned(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a copy that owns its memory."""
    copied = values.copy()
    assert copied.base is None
    return copied


STRUCTURE = np.dtype([("when", "M8[s]"), ("what", "U7"), ("how", "f4", (3,))])
ARRAYS = {
    "numbers": np.arange(9000.0),
    "two axes": np.arange(90000).reshape(300, 300),
    "Fortran order": np.asfortranarray(np.arange(90000).reshape(300, 300)),
    "dates": np.arange(9000).astype("M8[s]"),
    "durations": np.arange(9000).astype("m8[s]"),
    "texts": np.array(["text"] * 3000),
    "strings": np.array(["a string", "another one"] * 3000, np.dtypes.StringDType()),
    "objects": np.array([object()] * 9000),
    "records": np.zeros(3000, STRUCTURE),
    "bits": np.zeros(40000, np.bool_),
    "read-only": np.arange(9000),
}
ARRAYS["read-only"].flags.writeable = False


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_is_its_whole_pages_and_watched(kind: str) -> None:
    one = owned(ARRAYS[kind])
    found = find(one)
    assert spans(found) == memory_of(one)
    assert sum(found.why_not.values()) == found.why_not.get(EDGE, 0) <= 2
    (owner,) = {id(piece.owner.array): piece.owner for piece in found.pieces}.values()
    assert owner.array is one
    assert owner.dies == (kind not in ("objects", "strings"))


@pytest.mark.parametrize(
    "view",
    [
        lambda one: one[5:],
        lambda one: one[::-1],
        lambda one: one.reshape(100, -1).T,
        lambda one: one[1:].view("u1")[3:],
        lambda one: one.view(Subclass)[2:],
        lambda one: np.lib.stride_tricks.as_strided(one, (3, 3000), (8, 8)),
        lambda one: np.lib.stride_tricks.sliding_window_view(one, 5),
        lambda one: memoryview(one)[7:],
        lambda one: np.frombuffer(memoryview(one)[70:], "i4")[1:],
        lambda one: np.broadcast_to(one, (4, len(one))),
        lambda one: np.ma.masked_array(one, copy=False),
        lambda one: np.asarray(memoryview(one)),
    ],
)
def test_a_view_leads_to_the_array_that_owns_the_memory(view: Any) -> None:
    one = np.arange(9000)
    seen = view(one)
    found = find(seen)
    low, high = np.lib.array_utils.byte_bounds(np.asarray(seen))
    assert spans(found) == interior(low, high - low)
    assert {id(piece.owner.array) for piece in found.pieces} == {id(one)}
    assert all(piece.owner.dies for piece in found.pieces)


def test_an_array_that_the_collector_knows_dies_later_than_it_says() -> None:
    one = Subclass((9000,), np.int64)
    found = find(one)
    assert found.pieces
    assert all(piece.owner.array is one and not piece.owner.dies for piece in found.pieces)


def test_a_view_with_wide_gaps_is_the_pages_of_its_runs() -> None:
    one = np.zeros((6, 10 * PAGE), np.uint8)
    seen = one[::2, : 3 * PAGE]
    address = one.ctypes.data
    expected = [span for row in range(0, 6, 2) for span in interior(address + row * 10 * PAGE, 3 * PAGE)]
    assert spans(find(seen)) == expected
    narrow = one[:, 100:]  # gaps of less than a page: every page has some of the view
    assert spans(find(narrow)) == interior(address + 100, one.nbytes - 100)


@pytest.mark.parametrize("size", [0, 1, 100, PAGE - 1])
def test_what_has_no_whole_page_says_so(size: int) -> None:
    found = find(np.zeros(size, np.uint8))
    assert not found.pieces
    assert set(found.why_not) == {SMALL}
    assert found.why_not[SMALL] in ((0,) if size == 0 else (1, 2))


def test_every_page_that_is_touched_is_counted_once() -> None:
    whole = np.zeros(20 * PAGE, np.uint8)
    first = -whole.ctypes.data % PAGE
    for begin, size in [(0, 2 * PAGE), (1, 2 * PAGE), (1, 3 * PAGE - 1), (100, PAGE), (0, PAGE), (5, 10)]:
        part = whole[first + begin :][:size]
        found = find(part)
        inside = sum(piece.end - piece.start for piece in found.pieces) // PAGE
        touched = (begin + size - 1) // PAGE - begin // PAGE + 1
        assert inside + sum(found.why_not.values()) == touched


def test_memory_without_an_owner_is_refused() -> None:
    kept = np.arange(9000)
    pointer = ctypes.cast(kept.ctypes.data, ctypes.POINTER(ctypes.c_long))
    assert_refused(np.ctypeslib.as_array(pointer, (9000,)), "ctypes")


def assert_refused(thing: Any, word: str) -> None:
    found = find(thing)
    assert not found.pieces
    assert any(word in reason for reason in found.why_not), found.why_not


# --- plain buffers ------------------------------------------------------------------------------------------------------

SIZE = 10 * PAGE + 123


def address_of(buffer: Any) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def anonymous(flags: int = mmap.MAP_PRIVATE) -> mmap.mmap:
    return mmap.mmap(-1, SIZE, flags=flags | mmap.MAP_ANONYMOUS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytes(SIZE),
        lambda: bytearray(SIZE),
        lambda: array.array("B", bytes(SIZE)),
        lambda: array.array("d", bytes(SIZE // 8 * 8)),
        anonymous,
        lambda: anonymous(mmap.MAP_SHARED),
        lambda: memoryview(bytes(SIZE)),
        lambda: memoryview(bytearray(SIZE))[99:-99],
        lambda: memoryview(bytearray(SIZE // 8 * 8))[8:].cast("d"),
        lambda: np.frombuffer(bytes(SIZE), np.uint8),
        lambda: np.frombuffer(bytearray(SIZE), np.uint8)[5:],
        lambda: sharedctypes.RawArray("B", SIZE),
        lambda: (ctypes.c_char * SIZE).from_buffer(bytearray(SIZE)),
        lambda: pa.py_buffer(bytes(SIZE)),
    ],
)
def test_a_buffer_is_its_whole_pages_and_exported(make: Any) -> None:
    one = make()
    found = find(one)
    view = memoryview(one)
    assert spans(found) == interior(address_of(view), view.nbytes)
    assert all(piece.owner.array is None for piece in found.pieces)


def test_a_buffer_with_steps_backwards() -> None:
    one = bytearray(SIZE)
    assert spans(find(memoryview(one)[::-1])) == interior(address_of(one), SIZE)
    assert spans(find(memoryview(one)[::-7])) == interior(address_of(one) + (SIZE - 1) % 7, SIZE - (SIZE - 1) % 7)


def test_an_export_keeps_its_owner_from_resizing() -> None:
    one, two, three = bytearray(SIZE), array.array("B", bytes(SIZE)), anonymous()
    found = find([one, two, three])
    assert len(found.pieces) == 3
    for change in (lambda: one.append(1), lambda: two.append(1), three.close, lambda: three.resize(1 << 20)):
        with pytest.raises(BufferError):
            change()
    del found
    one.append(1)
    two.append(1)
    three.resize(1 << 20)
    three.close()


def test_a_view_that_is_released_is_held_all_the_same() -> None:
    one = bytearray(SIZE)
    view = memoryview(one)
    found = find(view)
    view.release()
    with pytest.raises(BufferError):
        one.append(1)
    assert spans(found) == interior(address_of(one), SIZE)


def test_ctypes_memory_that_could_move_is_refused() -> None:
    class Structure(ctypes.Structure):
        _fields_ = [("head", ctypes.c_long), ("body", ctypes.c_char * SIZE)]

    class Outer(ctypes.Structure):
        _fields_ = [("inner", Structure)]

    one = (ctypes.c_char * SIZE)()
    by_address = (ctypes.c_char * SIZE).from_address(ctypes.addressof(one))
    by_pointer = ctypes.cast(one, ctypes.POINTER(ctypes.c_char * SIZE)).contents
    for thing in (one, by_address, by_pointer, Structure(), Outer().inner, np.ctypeslib.as_array(one), memoryview(one)):
        assert_refused(thing, "ctypes")


def test_what_multiprocessing_wraps_is_found() -> None:
    locked = multiprocessing.Array("d", 9000)
    assert spans(find(locked)) == interior(ctypes.addressof(locked.get_obj()), 72000)
    shared = shared_memory.SharedMemory(create=True, size=SIZE)
    try:
        assert spans(find(shared)) == interior(address_of(shared.buf), shared.size)
    finally:
        shared.close()
        shared.unlink()


def test_a_file_that_numpy_maps_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    mapped = np.memmap(tmp_path / "file", mode="r")
    assert spans(find(mapped)) == interior(mapped.ctypes.data, SIZE)


# --- pandas -------------------------------------------------------------------------------------------------------------

ROWS = 20000


def frame() -> pd.DataFrame:
    rows = np.arange(ROWS)
    return pd.DataFrame(
        {
            "integers": rows,
            "more": rows + 1,
            "floats": rows * 1.5,
            "dates": pd.date_range("2020", periods=ROWS, freq="s"),
            "zoned": pd.date_range("2020", periods=ROWS, freq="s", tz="UTC"),
            "categories": pd.Categorical.from_codes(rows % 1000, [f"category {n}" for n in range(1000)]),
            "masked": pd.array([1, None] * (ROWS // 2), dtype="Int64"),
            "texts": [f"text {n}" for n in rows],
            "arrow": pd.array(rows, dtype="int64[pyarrow]"),
            "objects": [object()] * ROWS,
            "intervals": pd.interval_range(0, ROWS),
            "sparse": pd.arrays.SparseArray(rows % 2),
        },
        index=pd.Index(rows * 3, name="key"),
    )


@pytest.mark.parametrize("column", list(frame().columns))
def test_a_column_is_found_with_all_its_parts(column: str) -> None:
    series = frame()[column]
    found = find(series)
    assert not any("not known" in reason or "no memory" in reason for reason in found.why_not), found.why_not
    held = sum(piece.end - piece.start for piece in found.pieces)
    # What pandas counts, less pages at edges and less the texts and objects behind pointers.
    counted = series.memory_usage(index=True, deep=False)
    if column == "categories":
        counted -= series.cat.categories._engine.sizeof(deep=False)  # a table for look-ups, which is no buffer
    assert held <= counted + 300_000
    assert held + sum(found.why_not.values()) * PAGE >= counted, "every byte lies in a page that is found or told"


def test_a_frame_is_its_blocks_and_its_index() -> None:
    rows = np.arange(ROWS)
    one = pd.DataFrame({"a": rows, "b": rows + 1, "c": rows * 0.5}, index=pd.Index(rows * 2))
    found = find(one)
    held = sum(piece.end - piece.start for piece in found.pieces)
    assert held <= 4 * ROWS * 8 <= held + sum(found.why_not.values()) * PAGE
    assert all(piece.owner.array is not None for piece in found.pieces), "NumPy arrays are watched, not kept"
    assert id(find(one["b"]).pieces[0].owner.array) in {id(piece.owner.array) for piece in found.pieces}


def test_a_frame_of_a_pandas_without_blocks_is_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    one = pd.DataFrame({"a": np.arange(ROWS), "b": np.arange(ROWS) * 0.5})
    by_block = spans(find(one))
    monkeypatch.setattr(type(one._mgr), "arrays", None)
    assert spans(find(one)) == by_block


@pytest.mark.parametrize("kind", ["integer", "block"])
def test_a_sparse_array_is_its_values_and_their_places(kind: Any) -> None:
    one = pd.arrays.SparseArray(np.arange(ROWS) % 2, kind=kind)
    found = find(one)
    held = sum(piece.end - piece.start for piece in found.pieces)
    assert held <= one.nbytes <= held + sum(found.why_not.values()) * PAGE


def test_indexes_are_found() -> None:
    for index in (
        pd.Index(np.arange(ROWS)),
        pd.date_range("2020", periods=ROWS),
        pd.Index([f"text {n}" for n in range(ROWS)]),
        pd.MultiIndex.from_arrays([np.arange(ROWS), np.arange(ROWS) * 2]),
        pd.CategoricalIndex([f"{n % 3}" for n in range(ROWS)]),
        pd.interval_range(0, ROWS),
    ):
        assert find(index).pieces, type(index)
    found = find([pd.RangeIndex(ROWS)])
    assert not found.pieces
    assert not found.why_not


# --- Arrow --------------------------------------------------------------------------------------------------------------


def arrow_bytes(found: Found) -> int:
    """Return the bytes in pages that are found or told."""
    assert all(piece.owner.array is None for piece in found.pieces)
    return sum(piece.end - piece.start for piece in found.pieces) + sum(found.why_not.values()) * PAGE


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda: pa.array([n if n % 3 else None for n in range(ROWS)]), ROWS * 8),
        (lambda: pa.array([f"text {n}" for n in range(ROWS)]), ROWS * 4 + ROWS * 6),
        (lambda: pa.array([f"text {n}" for n in range(ROWS)], pa.string_view()), ROWS * 16),
        (lambda: pa.array([[n, n] for n in range(ROWS)]), ROWS * 16),
        (lambda: pa.array([{"x": n, "y": "text"} for n in range(ROWS)]), ROWS * 12),
        (lambda: pa.array([f"{n}" for n in range(ROWS)]).dictionary_encode(), ROWS * 4 + ROWS * 4),
        (lambda: pa.chunked_array([list(range(ROWS)), list(range(ROWS))]), ROWS * 16),
        (lambda: pa.record_batch({"x": list(range(ROWS))}), ROWS * 8),
        (lambda: pa.table({"x": list(range(ROWS)), "y": [1.5] * ROWS}), ROWS * 16),
        (lambda: pa.array([decimal.Decimal(n) for n in range(ROWS)]), ROWS * 16),
        (lambda: pa.array(list(range(ROWS))).slice(100, 300), ROWS * 8),
    ],
)
def test_arrow_is_found_with_all_its_buffers(make: Any, least: int) -> None:
    one = make()
    assert least <= arrow_bytes(find(one)) <= least + 400_000


def test_buffers_that_are_shared_count_once() -> None:
    one = pa.array(list(range(ROWS)))
    assert spans(find([one, one.slice(5), one.slice(7, 9), pa.table({"x": one})])) == spans(find(one))


def test_a_buffer_that_arrow_may_move_is_refused() -> None:
    movable = pa.allocate_buffer(SIZE, resizable=True)
    assert_refused(movable, "resizable")
    assert_refused(np.frombuffer(movable, np.uint8), "resizable")
    assert find(pa.allocate_buffer(SIZE)).pieces


# --- torch --------------------------------------------------------------------------------------------------------------


def test_tensors() -> None:
    """Needs torch, whose wheel is 539 MB and more: not a dependency of tests, but run wherever it is."""
    torch = pytest.importorskip(
        "torch", reason="torch is not installed: its wheels are too large to be a dependency of tests"
    )
    # Once found it can no longer be resized, and it is told before its memory goes to other processes.
    moves: list[tuple[int, int]] = []
    one = torch.arange(9000)
    found = buffers.find(one, lambda address, size: moves.append((address, size)))
    with pytest.raises(RuntimeError, match="not resizable"):
        one.untyped_storage().resize_(1 << 20)
    before = one.data_ptr()
    one.share_memory_()
    assert one.data_ptr() != before
    assert (before, 72000) in moves
    assert found.pieces
    for one in (
        torch.arange(9000),
        torch.zeros(9000, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.zeros(300, 300)),
        torch.arange(90000).reshape(300, 300).T[5:],
        torch.arange(90000)[100:-100].view(-1, 100),
    ):
        low = one.data_ptr()
        high = low + sum((n - 1) * s for n, s in zip(one.shape, one.stride(), strict=True)) * one.element_size()
        assert spans(find(one)) == interior(low, high + one.element_size() - low)
    one = torch.arange(9000)
    assert spans(find(one.untyped_storage())) == spans(find(one))
    assert spans(find(torch.nn.Linear(300, 300).state_dict()))
    assert_refused([torch.zeros(9000, device="meta")], "tensor")
    assert_refused([torch.zeros(300, 300).to_sparse()], "tensor")


# --- collections, and what has no memory --------------------------------------------------------------------------------


def test_collections_are_walked() -> None:
    one, two, three = np.arange(9000), bytearray(SIZE), pa.array(list(range(ROWS)))
    inside = OrderedDict(a=[one, {"b": (two, [three, None])}], again=one, self_=one[::2])
    assert spans(find(inside)) == spans(find([one, two, three]))


def test_a_ring_and_deep_nesting_end() -> None:
    one = np.arange(9000)
    ring: list[Any] = [one]
    ring.append(ring)
    assert spans(find(ring)) == memory_of(one)
    deep: Any = one
    for _ in range(100_000):
        deep = [deep]
    assert spans(find(deep)) == memory_of(one)
    while isinstance(deep, list):  # or its end would be deep too
        deep = deep.pop()


def test_what_overlaps_is_found_once() -> None:
    one = np.zeros(10 * PAGE, np.uint8)
    found = find([one[: 6 * PAGE], one[3 * PAGE :], one[4 * PAGE : 5 * PAGE]])
    assert spans(found) == memory_of(one)
    ends = [(piece.start, piece.end) for piece in found.pieces]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))


@pytest.mark.parametrize("thing", [5, None, "text", object(), decimal, {1}.__class__])
def test_what_has_no_memory_is_an_error_that_says_what_to_give(thing: Any) -> None:
    with pytest.raises(UsageError, match=f"a {type(thing).__name__} has no memory"):
        find(thing)


def test_what_has_no_memory_among_others_is_told() -> None:
    one = np.arange(9000)
    found = find({"array": one, "name": "text", "number": 5})
    assert spans(found) == memory_of(one)
    assert found.why_not["no memory of its own (str)"] == found.why_not["no memory of its own (int)"] == 0
    assert not find([]).pieces


def test_finding_a_plain_buffer_loads_no_library() -> None:
    code = (
        "import sys; from pagefold.live import buffers;"
        "assert len(buffers.find(bytearray(1 << 20), print).pieces) == 1;"
        "print(sorted({'numpy', 'pandas', 'pyarrow', 'torch', 'multiprocessing', 'inspect'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
