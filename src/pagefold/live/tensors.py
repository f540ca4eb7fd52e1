"""Own what is special about torch tensors: an export that pins their storage, and a word before that moves all the same.

torch is never imported here: who has a tensor has loaded it. Must not know: other kinds of buffers, merging.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MOVERS = ("_share_fd_cpu_", "_share_filename_cpu_")


def storage_of(torch: Any, tensor: Any) -> Any:
    """Return the storage of a tensor if it is plain memory of this process, else None."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return None
    try:
        storage = tensor.untyped_storage()
        return storage if storage.data_ptr() else None
    except (RuntimeError, NotImplementedError):
        return None


def keep(torch: Any, storage: Any) -> Any:
    """Return what keeps a storage where it is, None if there is no such thing.

    It is the storage as a NumPy array: torch never again resizes a storage that NumPy was shown.
    """
    try:
        return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def announce_moves(torch: Any, moving: Callable[[int, int], None]) -> None:
    """Have `moving(address, bytes)` called before a storage moves to shared memory, as sending it to another process does.

    torch then frees the memory under every export, and offers nobody a say; so its two methods that do this are wrapped, once.
    """
    storage = torch.UntypedStorage
    for name in _MOVERS:
        method = getattr(storage, name, None)
        if method is not None and not hasattr(method, "pagefold_moving"):
            setattr(storage, name, _announcing(method, moving))


def _announcing(method: Any, moving: Callable[[int, int], None]) -> Any:
    @functools.wraps(method)
    def announced(self: Any, *arguments: Any, **named: Any) -> Any:
        moving(self.data_ptr(), self.nbytes())
        return method(self, *arguments, **named)

    announced.pagefold_moving = moving  # type: ignore[attr-defined]
    return announced
