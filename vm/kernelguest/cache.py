"""Own the folder of what is costly to make or fetch: kernels as they came, unpacked ones, and archives for guests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def folder() -> Path:
    """Return where it is; not made yet."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kernelguest"


def stored(cache: Path, kind: str, key: str, kept: int, make: Callable[[], bytes]) -> Path:
    """Return the file of that kind and key, made if it is not there; of its kind, the last used ones are kept.

    It is there whole or not at all, whoever else makes or tidies at the same time; who wants to read it later opens it now.
    """
    path = cache / f"{kind}-{key}"
    try:
        os.utime(path)
    except FileNotFoundError:
        data = make()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, prefix=f"{kind}-", suffix=".part", delete=False) as file:
            file.write(data)
        Path(file.name).replace(path)
        for old in sorted(cache.glob(f"{kind}-*"), key=_last_use, reverse=True)[kept:]:
            old.unlink(missing_ok=True)
    return path


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process tidies as well
        return 0.0
