"""Own which files of installed packages, and of the standard library, a guest is given. Knows nothing of archives.

A program that names packages may start interpreters of its own and import what nobody can foresee (what a compiled module imports
cannot be read off it). So it finds packages and the standard library whole, but for what no program runs: tests, headers, windows.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from kernelguest.errors import GuestError

_LEFT_OUT = {"__pycache__", "tests"}
_NOT_RUN = {".pyi", ".h", ".c", ".pxd", ".pyx", ".a"}
_NOT_IN_LIBRARY = {
    *("test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "pydoc_data"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
}
# What draws, talks to a network or a database, or tests the interpreter; some link to libraries that need not be there.
_NOT_AN_EXTENSION = re.compile(
    r"_tkinter|_curses|_ssl|_hashlib|_sqlite3|_dbm|_gdbm|readline|nis|ossaudiodev|_test|_?xx"
)


def check(packages: Iterable[Path]) -> None:
    """Raise GuestError for one that is not there."""
    for package in packages:
        if not package.exists():
            raise GuestError(f"the package {package} does not exist; give the folder or the file that is imported")


def files(packages: Iterable[Path]) -> dict[str, Path]:
    """Return all files of these packages (folders, or modules of one file) by their paths in `site-packages`."""
    found: dict[str, Path] = {}
    for package in packages:
        if package.is_file():
            found[package.name] = package
        else:
            found |= {str(path.relative_to(package.parent)): path for path in _walk(package, _LEFT_OUT)}
    return found


def library() -> dict[str, Path]:
    """Return the modules of the standard library that are text, by their paths in it."""
    top = Path(sysconfig.get_path("stdlib"))
    return {str(path.relative_to(top)): path for path in _walk(top, _NOT_IN_LIBRARY) if path.suffix == ".py"}


def extensions(folder: Path) -> list[Path]:
    """Return the standard library's compiled modules, which lie in `folder`."""
    return sorted(path for path in folder.glob("*.so") if not _NOT_AN_EXTENSION.match(path.name))


def _walk(top: Path, left_out: set[str]) -> Iterator[Path]:
    for folder, below, names in os.walk(top):
        below[:] = sorted(name for name in below if name not in left_out and not name.startswith("config-"))
        yield from (Path(folder, name) for name in sorted(names) if Path(name).suffix not in _NOT_RUN)
