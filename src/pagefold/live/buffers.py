"""Own the way from any Python object to the whole pages of its memory, and to what keeps that memory where it is.

Libraries are recognised by what the program has loaded already; none is imported here, nor is `ctypes` before a plain buffer needs it.

What keeps memory in place while its pages are swapped, by kind (each is tested):

1. A NumPy array that owns its memory: a weak reference. NumPy frees the memory only after telling it, and refuses `resize` while
   there is one, with and without `refcheck`. Views lead to the array whose memory they show, through any number of `base`.
2. Whatever exports a buffer (bytes, bytearray, mmap, array.array, memoryview, Arrow ...): the export. By its rules (PEP 3118) the memory
   stays until it is released, and the owner refuses to resize or to close.
3. A torch tensor: an export of its storage (`tensors.py`).
4. What keeps that promise to nobody is refused, and says so: ctypes objects that own their memory (`ctypes.resize` moves it under every
   export), resizable Arrow buffers, and memory that has no owner at all (made from a bare address).

Must not know: regions, merging, what a mapping is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

from pagefold.errors import UsageError
from pagefold.live import tensors

PAGE = 4096
SMALL = "too small: no whole page inside"
EDGE = "at an edge: the page holds other data too"
_MOST_RUNS = 1 << 16  # of one strided view; beyond, its gaps count as part of it
_OF_CTYPES = "memory of ctypes: ctypes.resize may move it, or it has no owner; use from_buffer of a bytearray"

Extent = tuple[int, int]  # address, bytes


class Owner(NamedTuple):
    """Say what keeps a piece of memory where it is."""

    keep: object  # as long as this is referenced the memory stays
    array: Any = (
        None  # the NumPy array that owns the memory, if one does: a weak reference to it is told before it goes
    )
    dies: bool = False  # nobody can read the memory any more once that weak reference is told


class Piece(NamedTuple):
    """Whole pages of one owner."""

    start: int
    end: int
    owner: Owner


class Found:
    """The pages of objects: ascending pieces that do not overlap, and what is no whole page."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.why_not: dict[str, int] = {}  # reason: pages touched; 0 for what has no memory of its own

    def refuse(self, reason: str, pages: int = 0) -> None:
        """Count pages that cannot be merged."""
        self.why_not[reason] = self.why_not.get(reason, 0) + pages


def find(thing: Any, moving: Callable[[int, int], None]) -> Found:
    """Return the pages of an object, or of everything in a dict, list or tuple. UsageError if it has no memory of its own.

    From now on `moving(address, bytes)` is called before torch moves a tensor's memory elsewhere, by whatever thread does that.
    """
    walk = _Walk(moving)
    try:
        if walk.visit(thing):
            return walk.cut()
    finally:
        walk.kinds.clear()  # they refer to the walk, and it to exports that would then stay until the collector comes
    raise UsageError(
        f"a {type(thing).__name__} has no memory that could be merged; give an array, a DataFrame, a tensor, a buffer, "
        "or a dict, list or tuple of those"
    )


class _Walk:
    """Collect the extents of an object and of what is in it."""

    def __init__(self, moving: Callable[[int, int], None]) -> None:
        self.found = Found()
        self.extents: dict[Extent, Owner] = {}
        self.moving = moving
        self.seen: dict[int, object] = {}  # kept, so that no id comes twice
        self.todo: list[Any] = []  # a stack of our own: nesting may be deeper than Python's
        self.numpy = _loaded("numpy", "ndarray")
        self.torch = _loaded("torch", "Tensor", "UntypedStorage", "uint8", "empty")
        self.kinds: list[tuple[Any, Callable[[Any], None]]] = [
            (dict, lambda one: self.each(one.values())),
            ((list, tuple), self.each),
            *self.of_numpy(),
            *self.of_pandas(),
            *self.of_arrow(),
            *self.of_torch(),
            *self.of_multiprocessing(),
        ]

    def visit(self, thing: Any) -> bool:
        """Walk an object; False if the object itself is of no kind that has memory."""
        self.todo.append(thing)
        first = True
        while self.todo:
            one = self.todo.pop()
            if id(one) in self.seen:
                continue
            self.seen[id(one)] = one
            look = next((look for kind, look in self.kinds if isinstance(one, kind)), None)
            if look:
                look(one)
            elif not self.buffer(one):
                self.found.refuse(f"no memory of its own ({type(one).__name__})")
                if first:
                    return False
            first = False
        return True

    def cut(self) -> Found:
        """Turn the extents of bytes into pieces of whole pages."""
        at = 0
        for (address, size), owner in sorted(self.extents.items(), key=lambda item: item[0]):
            start, end = -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE
            touched = _touched([(address, size)])
            if end <= start:
                self.found.refuse(SMALL, touched)
                continue
            if edges := touched - (end - start) // PAGE:
                self.found.refuse(EDGE, edges)
            if at < end:
                self.found.pieces.append(Piece(max(start, at), end, owner))
                at = end
        return self.found

    def each(self, things: Iterable[Any]) -> None:
        """Look at these too."""
        self.todo += [thing for thing in things if thing is not None]

    def add(self, extents: list[Extent], owner: Owner) -> None:
        """Count memory in, if it stays in place."""
        if reason := self.unsafe(owner.keep):
            self.found.refuse(reason, _touched(extents))
        elif not any(size for _, size in extents):
            self.found.refuse(SMALL)
        else:
            for extent in extents:
                self.extents.setdefault(extent, owner)

    # --- plain buffers and NumPy ----------------------------------------------------------------------------------------------

    def buffer(self, thing: Any) -> bool:
        """Count a plain buffer in; False if the object is none."""
        try:
            view = memoryview(thing)
        except (TypeError, BufferError, ValueError):
            return False
        if view.suboffsets:
            self.found.refuse("a buffer of pointers to buffers")
        else:
            array = self.array_below(view)
            owner = Owner(view) if array is None else self.owner_of(array)
            self.add([*runs(_address(view), view.shape or (), view.strides or (), view.itemsize)], owner)
        return True

    def of_numpy(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        if self.numpy:
            yield self.numpy.ndarray, self.ndarray

    def ndarray(self, array: Any) -> None:
        # Not through its buffer: dates and strings have none.
        address = array.__array_interface__["data"][0]
        extents = [*runs(address, array.shape, array.strides, array.dtype.itemsize)]
        self.add(extents, self.owner_of(self.array_below(array)))

    def owner_of(self, array: Any) -> Owner:
        if not array.flags.owndata or array.base is not None:
            return Owner(array)
        # A subclass is known to the garbage collector, which tells weak references before it calls __del__ of the other garbage, and
        # that may still read the array; objects in an array are released after. Of those the memory dies later than we are told.
        return Owner(array, array, dies=type(array) is self.numpy.ndarray and not array.dtype.hasobject)

    def array_below(self, thing: Any) -> Any:
        """Return the NumPy array that owns the memory, or the last one before what does; None if no array is involved."""
        arrays = [below for below in _chain(thing) if self.numpy and isinstance(below, self.numpy.ndarray)]
        return arrays[-1] if arrays else None

    def unsafe(self, thing: Any) -> str:
        """Return why memory could move or vanish while `thing` is held; '' if it cannot."""
        *_, last = _chain(thing)
        arrow = _loaded("pyarrow", "ResizableBuffer")
        if arrow and isinstance(last, arrow.ResizableBuffer):
            return "a resizable Arrow buffer: it may move while it is held"
        if hasattr(last, "_b_needsfree_"):
            return _OF_CTYPES
        if self.numpy and isinstance(last, self.numpy.ndarray) and not last.flags.owndata:
            return "memory without an owner: nothing keeps it from being freed"
        return ""

    # --- pandas ---------------------------------------------------------------------------------------------------------------

    def of_pandas(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        pandas = _loaded("pandas", "DataFrame", "Series", "Index", "RangeIndex", "MultiIndex", "api")
        if pandas:
            yield pandas.DataFrame, self.frame
            yield pandas.RangeIndex, lambda index: None
            yield pandas.MultiIndex, lambda index: self.each([*index.levels, *index.codes])
            yield (pandas.Series, pandas.Index), lambda one: self.each([one.array, getattr(one, "index", None)])
            yield pandas.api.extensions.ExtensionArray, self.extension

    def frame(self, frame: Any) -> None:
        # Blocks hold many columns each; a pandas that has none gives its columns one by one.
        arrays = getattr(getattr(frame, "_mgr", None), "arrays", None)
        self.each(arrays if arrays is not None else [frame.iloc[:, at].array for at in range(frame.shape[1])])
        self.each([frame.index, frame.columns])

    def extension(self, array: Any) -> None:
        names = ("_ndarray", "_data", "_mask", "_pa_array", "categories", "_left", "_right", "sp_values")
        parts = [part for name in names if (part := getattr(array, name, None)) is not None]
        if places := getattr(array, "sp_index", None):  # where a sparse array has its values, in one of two ways
            parts += [places.blocs, places.blengths] if hasattr(places, "blocs") else [places.indices]
        if not parts:
            self.found.refuse(f"a pandas array of a kind that is not known ({type(array).__name__})")
        self.each(parts)

    # --- Arrow ----------------------------------------------------------------------------------------------------------------

    def of_arrow(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        arrow = _loaded("pyarrow", "Buffer", "Array", "ChunkedArray", "RecordBatch", "Table")
        if arrow:
            yield (arrow.Table, arrow.RecordBatch), lambda table: self.each(table.columns)
            yield arrow.ChunkedArray, lambda column: self.each(column.chunks)
            yield arrow.Array, lambda array: self.each([*array.buffers(), getattr(array, "dictionary", None)])
            yield arrow.Buffer, self.arrow_buffer

    def arrow_buffer(self, buffer: Any) -> None:
        extents = [(buffer.address, buffer.size)]
        if buffer.is_cpu:
            self.add(extents, Owner(buffer))
        else:
            self.found.refuse("memory of a device, not of this process", _touched(extents))

    # --- torch ----------------------------------------------------------------------------------------------------------------

    def of_torch(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        if self.torch:
            yield self.torch.Tensor, self.tensor
            yield self.torch.UntypedStorage, lambda one: self.storage(one, [(one.data_ptr(), one.nbytes())])

    def tensor(self, tensor: Any) -> None:
        storage = tensors.storage_of(self.torch, tensor)
        if storage is None:
            self.found.refuse(f"a tensor without memory of its own in this process ({tensor.device.type})")
            return
        size = tensor.element_size()
        address = storage.data_ptr() + tensor.storage_offset() * size
        strides = [stride * size for stride in tensor.stride()]
        self.storage(storage, [*runs(address, tuple(tensor.shape), strides, size)])

    def storage(self, storage: Any, extents: list[Extent]) -> None:
        keep = tensors.keep(self.torch, storage)
        if keep is None:
            self.found.refuse(
                "a tensor that NumPy cannot be shown, so that nothing keeps it in place", _touched(extents)
            )
        else:
            tensors.announce_moves(self.torch, self.moving)
            self.add(extents, Owner(keep))

    # --- multiprocessing --------------------------------------------------------------------------------------------------------

    def of_multiprocessing(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        if locked := _loaded("multiprocessing.sharedctypes", "SynchronizedBase"):
            yield locked.SynchronizedBase, lambda one: self.each([one.get_obj()])
        if shared := _loaded("multiprocessing.shared_memory", "SharedMemory"):
            yield shared.SharedMemory, lambda one: self.each([one.buf])


def runs(address: int, shape: Iterable[int], strides: Iterable[int], itemsize: int) -> Iterator[Extent]:
    """Yield the runs of memory of a strided array whose first item is at `address`; no strides: C order.

    Gaps of less than a page belong to a run: every page there has bytes of the array.
    """
    lengths, steps = [*shape], [*strides]
    if not steps:
        steps = [itemsize * prod(lengths[axis + 1 :]) for axis in range(len(lengths))]
    if 0 in lengths:
        return
    axes = [(step, length) for step, length in zip(steps, lengths, strict=True) if length > 1]
    start = address + sum(step * (length - 1) for step, length in axes if step < 0)
    size = itemsize
    apart: list[tuple[int, int]] = []
    for step, length in sorted((abs(step), length) for step, length in axes):
        if not apart and step - size < PAGE:
            size += step * (length - 1)
        else:
            apart.append((step, length))
    if prod(length for _, length in apart) > _MOST_RUNS:
        size, apart = size + sum(step * (length - 1) for step, length in apart), []
    starts = [start]
    for step, length in apart:
        starts = [one + step * index for one in starts for index in range(length)]
    yield from ((one, size) for one in starts)


def _touched(extents: Iterable[Extent]) -> int:
    return sum(-(-(at + size) // PAGE) - at // PAGE for at, size in extents if size)


def _loaded(module: str, *names: str) -> Any:
    """Return a module that the program has loaded, None if it has not (or not yet all of it)."""
    found = sys.modules.get(module)
    return found if found is not None and all(hasattr(found, name) for name in names) else None


def _chain(thing: Any) -> Iterator[Any]:
    """Yield an object and what its memory belongs to, the real owner last."""
    while thing is not None:
        yield thing
        if isinstance(thing, memoryview):
            thing = thing.obj
        elif hasattr(thing, "_b_needsfree_"):  # ctypes: part of another object, or made of a buffer
            kept = thing._objects if isinstance(thing._objects, dict) and not thing._b_needsfree_ else {}
            thing = thing._b_base_ if thing._b_base_ is not None else kept.get("ffffffff")
        elif any(kind.__module__.partition(".")[0] == "numpy" for kind in type(thing).__mro__):
            thing = getattr(thing, "base", None)
        else:
            return


def _address(view: memoryview) -> int:
    """Return the address of a buffer, of a read-only one too; ctypes has the only door to it in the standard library."""
    import ctypes

    python = ctypes.PyDLL(None)  # our own: ctypes.pythonapi is shared by all who set types on it
    fields = (ctypes.c_void_p * 10)()  # a Py_buffer: the address is its first field
    python.PyObject_GetBuffer(ctypes.py_object(view), fields, 0x11C)  # PyBUF_FULL_RO, which no memoryview refuses
    address = fields[0] or 0
    python.PyBuffer_Release(fields)
    return int(address)
