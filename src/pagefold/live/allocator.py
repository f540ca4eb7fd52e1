"""Own the way into NumPy's memory handlers (NEP 49): arrays made from now on get their memory from functions of ours.

NumPy's C functions are reached through ctypes and its table `_ARRAY_API`, whose places are part of NumPy's stable ABI; what is found
there is checked before it is believed.

NumPy keeps the handler in a context variable, and every thread begins with an empty context: a handler that is set reaches no other
thread, neither those that run nor those that come. So besides setting ours in this thread, the default handler, which all others use,
is made to call ours. Why that is safe at any moment:

1. Ours take back memory that they did not give (they know their own, and pass everything else to the C library): what the default
   handler allocated before can be freed and resized by ours.
2. `free` and `realloc` are replaced before `malloc` and `calloc`: no memory is ever allocated by ours and freed by the old ones.
3. What is overwritten was checked to be that handler, of the version we know, in memory that may be written to; else it is left
   alone, and only this thread is served.

Must not know: regions, merging, the daemon.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from pagefold.errors import NotHere
from pagefold.live import vmas

NAME = "pagefold"
FUNCTIONS = ("free", "realloc", "malloc", "calloc")  # in the order in which they may be replaced
_CAPSULE = b"mem_handler"
_FEATURES, _SET, _GET, _DEFAULT = 211, 304, 305, 306  # places in the table
_FIRST = 0xF  # the features of NumPy 1.22, the first with handlers
_VERSION = 1

_python = ctypes.PyDLL(None)  # our own: ctypes.pythonapi is shared by all who set types on it
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Allocator(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("ctx", "malloc", "calloc", "realloc", "free")]


class _Handler(ctypes.Structure):
    """PyDataMem_Handler."""

    _fields_ = [("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("allocator", _Allocator)]


_kept: list[Any] = []  # the handler and its capsule: arrays point to them as long as they live


def install(functions: dict[str, int]) -> bool:
    """Have NumPy, which is loaded, use these functions (addresses by name). True: in all threads; False: in this one only.

    Raises NotHere if this NumPy has no handlers, or not where we look for them. Again: does nothing new.
    """
    core = sys.modules.get("numpy._core._multiarray_umath") or sys.modules["numpy.core._multiarray_umath"]
    table = ctypes.cast(_pointer(core._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    if ctypes.PYFUNCTYPE(ctypes.c_uint)(table[_FEATURES] or 0)() < _FIRST:
        raise NotHere("this NumPy has no memory handlers (NEP 49); use NumPy 1.22 or later")
    present = ctypes.PYFUNCTYPE(ctypes.py_object)(table[_GET] or 0)()
    if _handler(present).name.decode() != core.get_handler_name():
        raise NotHere("NumPy's memory handlers are not where its ABI says; report this, with NumPy's version")
    if not _kept:
        handler = _Handler(
            NAME.encode(), _VERSION, _Allocator(None, *(functions[n] for n in ("malloc", "calloc", "realloc", "free")))
        )
        _kept[:] = [handler, _python.PyCapsule_New(ctypes.addressof(handler), _CAPSULE, None)]
    ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[_SET] or 0)(_kept[1])
    if core.get_handler_name() != NAME:
        raise NotHere("NumPy did not take our memory handler; report this, with NumPy's version")
    default = ctypes.cast(table[_DEFAULT] or 0, ctypes.POINTER(ctypes.py_object))[0]
    return _redirect(_handler(default), functions)


def _redirect(default: _Handler, functions: dict[str, int]) -> bool:
    """Make the default handler call our functions; False if it does not look like what we know."""
    allocator = default.allocator
    mapping = vmas.at(ctypes.addressof(default))
    known = default.name == b"default_allocator" and default.version == _VERSION and not allocator.ctx
    if (
        not known
        or mapping is None
        or mapping.permissions[1] != "w"
        or not all(getattr(allocator, n) for n in FUNCTIONS)
    ):
        return False
    for name in FUNCTIONS:
        setattr(allocator, name, functions[name])
    return True


def _handler(capsule: Any) -> _Handler:
    return _Handler.from_address(_pointer(capsule, _CAPSULE))


def _pointer(capsule: Any, name: bytes | None) -> int:
    return int(_python.PyCapsule_GetPointer(capsule, name))
