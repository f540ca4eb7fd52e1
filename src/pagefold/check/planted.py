"""Own the engine with planted bugs: a copy of core and explorer in which each change of `bugs.py` can be switched on at run time.

The copy is written as a package into the folder of compiled code, under a name that says what it was made of. Every changed statement
becomes "if this bug is switched on: the change, else: as it is"; without one switched on it is the shipped engine, which a test
shows by equal counts. A statement that is no longer found exactly once in the core is an error: the list cannot grow old.
"""

from __future__ import annotations

import hashlib
import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from pagefold.check.bugs import BUGS, Bug
from pagefold.check.engines import Explored
from pagefold.core import compiler
from pagefold.errors import UsageError

_PACKAGE = Path(__file__).parent.parent
_SHARED = ("compiler", "linking")  # one way of compiling for both engines
_EXPLORER = ("bench", "transitions", "fingerprint", "visited", "settle", "expand")
_KEPT = 3  # copies of other sources that are left where they are

# What the copy needs besides: where the switch is, and the other half of a migration that is done in the wrong order.
_SWITCHES = '        ("bug", "i4"),\n        ("late_node", "i4"),\n        ("late_pfn", "i4"),\n'
_LATE_HALF = """    if ctl["late_node"]:
        world.stables[ctl["late_node"]]["kpfn"] = ctl["late_pfn"]
        ctl["late_node"] = 0
"""
_ADDITIONS = {
    "layout.py": ('        ("armed", "i4"),', _SWITCHES),
    "checkpoint.py": ('    ctl["checkpoints"] += 1\n', _LATE_HALF),
}


def number_of(name: str) -> int:
    """Return the number of a planted bug, from 1."""
    for number, bug in enumerate(BUGS, start=1):
        if bug.name == name:
            return number
    raise UsageError(f"bug {name!r} is not known; use one of {', '.join(bug.name for bug in BUGS)}")


def _indented(text: str, by: int) -> str:
    return "".join(f"{' ' * by if line.strip() else ''}{line}" for line in text.splitlines(keepends=True))


def _with_switches(name: str, source: str) -> str:
    """Return a core module's source with the changes that are planted in it."""
    by_place: dict[str, list[tuple[int, Bug]]] = {}
    for number, bug in enumerate(BUGS, start=1):
        if bug.file == name:
            by_place.setdefault(bug.old, []).append((number, bug))
    for place, planted in by_place.items():
        old = place.lstrip("\n")
        if source.count(f"\n{old}") != 1:
            raise AssertionError(f"{name} does not hold the statement of {planted[0][1].name} exactly once:\n{old}")
        indent = " " * (len(old) - len(old.lstrip(" ")))
        lines = ""
        for number, bug in planted:
            word = "if" if not lines else "elif"
            lines += f'{indent}{word} world.ctl[0]["bug"] == {number}:\n{_indented(bug.new.lstrip(chr(10)), 4)}'
        lines += f"{indent}else:\n{_indented(old, 4)}"
        source = source.replace(f"\n{old}", f"\n{lines}")
    if name in _ADDITIONS:
        behind, added = _ADDITIONS[name]
        if source.count(behind) != 1:
            raise AssertionError(f"{name} does not hold exactly once: {behind}")
        source = source.replace(behind, added + behind)
    return source


def _sources() -> Iterator[tuple[str, str]]:
    """Yield (path in the copy, source) of every module of it."""
    for path in sorted((_PACKAGE / "core").glob("*.py")):
        if path.stem not in _SHARED:
            yield f"core/{path.name}", _with_switches(path.name, path.read_text())
    yield "check/__init__.py", (_PACKAGE / "check" / "__init__.py").read_text()
    for stem in _EXPLORER:
        yield f"check/{stem}.py", (_PACKAGE / "check" / f"{stem}.py").read_text()


def _renamed(source: str, name: str) -> str:
    """Let a module import its neighbours from the copy."""
    for stage in ("core", "check"):
        source = source.replace(f"pagefold.{stage}", f"{name}.{stage}")
    for shared in _SHARED:
        source = source.replace(f"{name}.core.{shared}", f"pagefold.core.{shared}")
    return source


def _home() -> Path:
    """Return a folder for copies that can be written."""
    home = compiler.CACHE.parent / "planted"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        home = Path(tempfile.mkdtemp(prefix="pagefold-planted-"))
    return home


@cache
def planted_engine() -> Explored:
    """Write the copy, if it is not there yet, and load it."""
    sources = list(_sources())
    digest = hashlib.sha256("".join(path + source for path, source in sources).encode()).hexdigest()[:16]
    name = f"pagefold_planted_{digest}"
    home = _home()
    if not (home / name).is_dir():
        fresh = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
        (fresh / "__init__.py").write_text("")
        for path, source in sources:
            (fresh / path).parent.mkdir(exist_ok=True)
            (fresh / path).write_text(_renamed(source, name))
        try:
            fresh.rename(home / name)
        except OSError:  # another process was faster
            shutil.rmtree(fresh, ignore_errors=True)
        _forget_old_copies(home, name)
    if str(home) not in sys.path:
        sys.path.append(str(home))

    def load(module: str) -> ModuleType:
        return importlib.import_module(f"{name}.{module}")

    return Explored(
        load("core.arena"),
        load("core.doors"),
        load("core.invariants"),
        load("check.bench"),
        load("check.expand"),
        load("check.visited"),
    )


def _forget_old_copies(home: Path, name: str) -> None:
    """Keep the newest few copies beside this one."""
    others = [one for one in home.glob("pagefold_planted_*") if one.name != name]
    others.sort(key=lambda one: one.stat().st_mtime, reverse=True)
    for one in others[_KEPT:]:
        shutil.rmtree(one, ignore_errors=True)
