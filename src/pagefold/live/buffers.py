"""Own the way from any Python object to the whole pages of its memory, and to what keeps that memory where it is.

Libraries are recognised by what the program has loaded already; none is imported here, nor is `ctypes` before a plain buffer needs it.

What keeps memory in place while its pages are swapped, by kind (each is tested):

1. A NumPy array that owns its memory: a weak reference. NumPy frees the memory only after telling it, and refuses `resize` while
   there is one, with and without `refcheck`. Views lead to the array whose memory they show, through any number of `base`.
2. Whatever exports a buffer (bytes, bytearray, mmap, array.array, memoryview, Arrow ...): the export. By its rules (PEP 3118) the memory
   stays until it is released, and the owner refuses to resize or to close.
3. A torch tensor: an export of its storage through NumPy, which forbids torch to resize it. Only moving it to shared memory is not
   forbidden by anything: it is announced to `moving` (see `guard_torch`).
4. What keeps that promise to nobody is refused, and says so: ctypes objects that own their memory (`ctypes.resize` moves it under every
   export), resizable Arrow buffers, and memory that has no owner at all (made from a bare address).

Must not know: regions, merging, what a mapping is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pagefold.errors import UsageError

PAGE = 4096
SMALL = "too small: no whole page inside"
EDGE = "at an edge: the page holds other data too"
_MOST_CHUNKS = 1 << 16  # of one strided view; beyond, the gaps count as part of it

Extent = tuple[int, int]  # address, bytes


class Owner(NamedTuple):
    """Say what keeps a piece of memory where it is."""

    keep: object  # as long as this is referenced the memory stays
    array: Any = None  # the NumPy array that owns the memory, if one does: a weak reference to it is told before it goes
    dies: bool = False  # nobody can read that array's memory any more once the weak reference is told


class Piece(NamedTuple):
    """Whole pages of one owner."""

    start: int
    end: int
    owner: Owner


@dataclass(slots=True)
class Found:
    """The pages of objects: ascending pieces that do not overlap, all owners, and what is no whole page."""

    pieces: list[Piece] = field(default_factory=list)
    why_not: dict[str, int] = field(default_factory=dict)  # reason: pages touched; 0 for what has no memory of its own

    def refuse(self, reason: str, pages: int = 0) -> None:
        """Count pages that cannot be merged."""
        self.why_not[reason] = self.why_not.get(reason, 0) + pages


def find(thing: Any, moving: Callable[[int, int], None] | None = None) -> Found:
    """Return the pages of an object, or of everything in a dict, list or tuple. UsageError if it is nothing with memory of its own.

    `moving(address, bytes)` is called before the memory of a torch tensor moves elsewhere, in whatever thread moves it.
    """
    found = Found()
    walk = _Walk(found)
    walk.visit(thing)
    if not walk.extents and not found.why_not:
        walk.refuse_unknown(thing)
    if not walk.extents and not isinstance(thing, dict | list | tuple) and set(found.why_not) == {_no_buffer(thing)}:
        raise UsageError(
            f"a {type(thing).__name__} has no memory that could be merged; give an array, a DataFrame, a tensor, a buffer, "
            "or a dict, list or tuple of those"
        )
    _cut(found, walk.extents)
    if moving and walk.torch:
        guard_torch(walk.torch, moving)
    return found


def _cut(found: Found, extents: dict[Extent, Owner]) -> None:
    """Turn extents of bytes into pieces of whole pages."""
    at = 0
    for (address, size), owner in sorted(extents.items(), key=lambda item: item[0]):
        start, end = -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE
        touched = (-(-(address + size) // PAGE) * PAGE - address // PAGE * PAGE) // PAGE
        if end <= start:
            found.refuse(SMALL, touched)
            continue
        if edges := touched - (end - start) // PAGE:
            found.refuse(EDGE, edges)
        if at < end:
            found.pieces.append(Piece(max(start, at), end, owner))
            at = end


def _no_buffer(thing: Any) -> str:
    return f"no memory of its own ({type(thing).__name__})"


class _Walk:
    """Collect the extents of an object and of what is in it."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.extents: dict[Extent, Owner] = {}
        self.torch: Any = None
        self._seen: dict[int, object] = {}  # kept, so that no number comes twice
        self._np = _loaded("numpy", "ndarray")
        self._kinds: list[tuple[Any, Callable[[Any], None]]] = [
            ((dict,), lambda thing: self._each(thing.values())),
            ((list, tuple), self._each),
            (self._np and self._np.ndarray, self._ndarray),
            *self._of_pandas(),
            *self._of_arrow(),
            *self._of_torch(),
            *self._of_multiprocessing(),
        ]

    def visit(self, thing: Any) -> None:
        todo = [thing]  # a stack of our own: nesting may be deeper than Python's
        self._todo = todo
        while todo:
            thing = todo.pop()
            if id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            for kind, look in self._kinds:
                if kind and isinstance(thing, kind):
                    look(thing)
                    break
            else:
                self._buffer(thing)

    def _each(self, things: Iterable[Any]) -> None:
        self._todo += [thing for thing in things if thing is not None]

    def refuse_unknown(self, thing: Any) -> None:
        self.found.refuse(_no_buffer(thing))

    def add(self, address: int, size: int, owner: Owner) -> None:
        if size > 0:
            self.extents.setdefault((address, size), owner)

    # --- plain buffers ------------------------------------------------------------------------------------------------------

    def _buffer(self, thing: Any) -> None:
        try:
            view = memoryview(thing)
        except (TypeError, BufferError, ValueError):
            self.refuse_unknown(thing)
            return
        extents = [*_extents(_address(view), view.shape or (), view.strides, view.itemsize)]
        if view.suboffsets:
            self.found.refuse("a buffer of pointers to buffers")
        elif reason := self._unsafe(view):
            self.found.refuse(reason, _touched(extents))
        else:
            array = self._array_below(view)
            for address, size in extents:
                self.add(address, size, self._owner_of(array) if array is not None else Owner(view))

    # --- NumPy --------------------------------------------------------------------------------------------------------------

    def _ndarray(self, array: Any) -> None:
        address = array.__array_interface__["data"][0]
        strides = [int(stride) for stride in array.strides]
        extents = [*_extents(address, array.shape, strides, array.dtype.itemsize)]
        below = self._array_below(array)
        if reason := self._unsafe(below):
            self.found.refuse(reason, _touched(extents))
            return
        for extent in extents:
            self.add(*extent, self._owner_of(below))

    def _owner_of(self, array: Any) -> Owner:
        if not array.flags.owndata or array.base is not None:
            return Owner(array)
        # A subclass is known to the garbage collector, which tells weak references before it calls __del__ of other garbage, and
        # that may still read the array; the objects in an array are released after; so these die later than we are told.
        return Owner(array, array, dies=type(array) is self._np.ndarray and not array.dtype.hasobject)

    def _array_below(self, thing: Any) -> Any:
        """Return the NumPy array that owns the memory, or the last one before what does; None if no array is involved."""
        array = None
        for below in _chain(thing):
            if self._np and isinstance(below, self._np.ndarray):
                array = below
        return array

    def _unsafe(self, thing: Any) -> str:
        """Return why the memory below an array or a view could move or vanish while it is held; '' if it cannot."""
        *_, last = _chain(thing)
        resizable = _loaded("pyarrow", "ResizableBuffer")
        if resizable and isinstance(last, resizable.ResizableBuffer):
            return "a resizable Arrow buffer: it may move while it is held"
        if type(last).__module__ == "_ctypes" or hasattr(last, "_b_needsfree_"):
            if getattr(last, "_b_needsfree_", False):
                return "memory of ctypes, which ctypes.resize may move while it is held; use from_buffer of a bytearray"
            return "memory of ctypes without an owner"
        if self._np and isinstance(last, self._np.ndarray) and not last.flags.owndata and last.base is None:
            return "memory without an owner: nothing keeps it from being freed"
        return ""

    # --- pandas -------------------------------------------------------------------------------------------------------------

    def _of_pandas(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        pandas = _loaded("pandas", "DataFrame", "Series", "Index", "api")
        if not pandas:
            return
        yield pandas.DataFrame, self._frame
        yield pandas.RangeIndex, lambda index: None
        yield pandas.MultiIndex, lambda index: self._each([*index.levels, *index.codes])
        yield (pandas.Series, pandas.Index), lambda one: self._each([one.array, getattr(one, "index", None)])
        yield pandas.api.extensions.ExtensionArray, self._extension

    def _frame(self, frame: Any) -> None:
        # Blocks hold many columns each; a pandas that has none gives its columns one by one.
        arrays = getattr(getattr(frame, "_mgr", None), "arrays", None)
        self._each(arrays if arrays is not None else [frame.iloc[:, at].array for at in range(frame.shape[1])])
        self._each([frame.index, frame.columns])

    def _extension(self, array: Any) -> None:
        names = ("_ndarray", "_data", "_mask", "_pa_array", "_codes", "categories", "_left", "_right", "sp_values")
        parts = [getattr(array, name, None) for name in names]
        if all(part is None for part in parts):
            self.found.refuse(f"a pandas array of a kind that is not known ({type(array).__name__})")
        self._each(parts)

    # --- Arrow --------------------------------------------------------------------------------------------------------------

    def _of_arrow(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        arrow = _loaded("pyarrow", "Buffer", "Array", "ChunkedArray", "RecordBatch", "Table")
        if not arrow:
            return
        yield (arrow.Table, arrow.RecordBatch), lambda table: self._each(table.columns)
        yield arrow.ChunkedArray, lambda column: self._each(column.chunks)
        yield arrow.Array, lambda array: self._each([*array.buffers(), getattr(array, "dictionary", None)])
        yield arrow.Buffer, self._arrow_buffer

    def _arrow_buffer(self, buffer: Any) -> None:
        pages = _touched([(buffer.address, buffer.size)])
        if not buffer.is_cpu:
            self.found.refuse("memory of a device, not of this process", pages)
        elif reason := self._unsafe(buffer):
            self.found.refuse(reason, pages)
        else:
            self.add(buffer.address, buffer.size, Owner(buffer))

    # --- torch --------------------------------------------------------------------------------------------------------------

    def _of_torch(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        self._torch = _loaded("torch", "Tensor", "UntypedStorage", "uint8", "empty")
        if self._torch:
            yield self._torch.Tensor, self._tensor
            yield self._torch.UntypedStorage, lambda storage: self._storage(storage, [(0, storage.nbytes())])

    def _tensor(self, tensor: Any) -> None:
        plain = tensor.layout == self._torch.strided and tensor.device.type == "cpu"
        try:
            storage = tensor.untyped_storage() if plain else None
        except (RuntimeError, NotImplementedError):
            storage = None
        if storage is None:
            self.found.refuse(f"a tensor without memory of its own here ({tensor.device.type}, {tensor.layout})")
            return
        size = tensor.element_size()
        strides = [stride * size for stride in tensor.stride()]
        self._storage(storage, [*_extents(tensor.storage_offset() * size, tuple(tensor.shape), strides, size)])

    def _storage(self, storage: Any, extents: list[Extent]) -> None:
        try:
            # NumPy's array forbids torch to resize the storage from now on, and keeps it.
            keep = self._torch.empty(0, dtype=self._torch.uint8).set_(storage).numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            self.found.refuse(f"a tensor that NumPy cannot show ({type(error).__name__})", _touched(extents))
            return
        self.torch = self._torch
        for offset, size in extents:
            self.add(storage.data_ptr() + offset, size, Owner(keep))

    # --- multiprocessing ----------------------------------------------------------------------------------------------------

    def _of_multiprocessing(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        if locked := _loaded("multiprocessing.sharedctypes", "SynchronizedBase"):
            yield locked.SynchronizedBase, lambda one: self._each([one.get_obj()])
        if shared := _loaded("multiprocessing.shared_memory", "SharedMemory"):
            yield shared.SharedMemory, lambda one: self._each([one.buf])


def _loaded(module: str, *names: str) -> Any:
    """Return a module that the program has loaded, None if it has not (or not yet all of it)."""
    found = sys.modules.get(module)
    return found if found is not None and all(hasattr(found, name) for name in names) else None


def _chain(thing: Any) -> Iterator[Any]:
    """Yield an object and what its memory belongs to, the real owner last."""
    seen = set()
    while thing is not None and id(thing) not in seen:
        seen.add(id(thing))
        yield thing
        if isinstance(thing, memoryview):
            thing = thing.obj
        elif hasattr(thing, "_b_base_"):  # ctypes: part of another object, or made of a buffer
            kept = thing._objects if isinstance(thing._objects, dict) else {}
            thing = thing._b_base_ or next((one for one in kept.values() if isinstance(one, memoryview)), None)
        else:
            thing = getattr(thing, "base", None) if _has_base(thing) else None


def _has_base(thing: Any) -> bool:
    kind = type(thing)
    return kind.__module__.partition(".")[0] == "numpy" or any(one.__module__ == "numpy" for one in kind.__mro__)


def _touched(extents: Iterable[Extent]) -> int:
    return sum(-(-(at + size) // PAGE) - at // PAGE for at, size in extents if size)


def _extents(address: int, shape: Iterable[int], strides: Iterable[int] | None, itemsize: int) -> Iterator[Extent]:
    """Yield the runs of memory of a strided array. Gaps of less than a page count as part of it: every page there has some of its bytes."""
    lengths = [*shape]
    if 0 in lengths:
        return
    steps = list(strides or ())
    if len(steps) != len(lengths):  # no strides: C order
        steps, size = [], itemsize
        for length in reversed(lengths):
            steps.insert(0, size)
            size *= length
    axes = sorted((abs(step), length) for step, length in zip(steps, lengths, strict=True) if length > 1 and step)
    start = address + sum(step * (length - 1) for step, length in zip(steps, lengths, strict=True) if step < 0)
    run, chunks = itemsize, 1
    outer: list[tuple[int, int]] = []
    for step, length in axes:
        if step - run < PAGE or chunks * length > _MOST_CHUNKS:
            run = max(step * (length - 1) + run, run)
            # What was to be stepped over on a smaller scale now lies inside.
            outer, chunks = [], 1
        else:
            outer.append((step, length))
            chunks *= length
            run_here = step * (length - 1) + run
            if run_here < run:
                return
    offsets = [0]
    for step, length in outer:
        offsets = [offset + step * index for index in range(length) for offset in offsets]
    yield from ((start + offset, run) for offset in sorted(offsets))


def _address(view: memoryview) -> int:
    """Return the address of a buffer, read-only or not; ctypes has the only door to it in the standard library."""
    from pagefold.live import pointers

    return pointers.address(view)
