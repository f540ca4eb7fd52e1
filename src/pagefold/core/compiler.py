"""Own the one way code is compiled here, and where its compiled form is kept.

Numba's own cache notices a change in the file of a function, not in the files it calls, so the cache folder is
keyed by a hash of every source of the core, and of the explorer that is compiled over it. `NUMBA_DISABLE_JIT=1` runs the
same code uncompiled, `NUMBA_BOUNDSCHECK=1` compiles it with bounds checks (into a cache folder of its own).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import config as _config

from pagefold.core.linking import DEFERRED, InnerCompiler, widen

config: Any = _config  # its attributes are made at run time
_F = TypeVar("_F", bound=Callable[..., Any])
_KEPT_CACHES = 4


def _cache_folder() -> Path:
    """Name the cache folder of exactly these sources, this Numba and this bounds-check mode."""
    digest = hashlib.sha256(numba.__version__.encode())
    package = Path(__file__).parent.parent
    for source in sorted([*package.glob("core/*.py"), *package.glob("check/*.py")]):
        digest.update(source.name.encode() + source.read_bytes())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pagefold"
    mode = "checked" if os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0") else "fast"
    return base / f"{mode}-{digest.hexdigest()[:16]}"


def _forget_old_caches(current: Path) -> None:
    """Keep the newest few cache folders beside `current`; a folder in use elsewhere is only compiled again."""
    folders = [f for f in current.parent.glob("*-*") if f.is_dir() and f != current]
    folders.sort(key=lambda f: f.stat().st_mtime, reverse=True)
    for folder in folders[_KEPT_CACHES - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)


CACHE = _cache_folder()
ENABLED = not config.DISABLE_JIT
_announced = False

if ENABLED and "NUMBA_CACHE_DIR" not in os.environ:
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        _forget_old_caches(CACHE)
        config.CACHE_DIR = str(CACHE)
    except OSError:  # a home that cannot be written: compiled anew in each process
        pass


def announce() -> None:
    """Say once, on stderr, that the engine is about to be compiled; silent when the cache is warm."""
    global _announced
    if _announced or not ENABLED:
        return
    _announced = True
    if not any(Path(str(config.CACHE_DIR or CACHE)).rglob("*.nbi")):
        print("pagefold: compiling the engine for this machine (once, some 15 seconds) ...", file=sys.stderr)


# Nothing in the core allocates: without Numba's reference counts of the arrays, which it would take and drop in every call, the scan is
# five times as fast.
_NO_COUNTS = {"_nrt": False}


def jit(function: _F) -> _F:
    """Compile a function that only compiled code calls: no Python wrapper is made for it."""
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **_NO_COUNTS}
    if DEFERRED:
        options["pipeline_class"] = InnerCompiler
    compiled: Any = numba.njit(error_model="numpy", nogil=True, **options)(function)
    if DEFERRED:
        widen(compiled)
    return cast(_F, compiled)


def entry(function: _F) -> _F:
    """Compile and cache a function that Python calls."""
    options: dict[str, Any] = _NO_COUNTS
    compiled: Any = numba.njit(error_model="numpy", nogil=True, cache=True, **options)(function)
    return cast(_F, compiled)
