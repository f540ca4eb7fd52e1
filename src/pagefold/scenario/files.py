"""Own scenario files: finding the `scenario_*` functions in them, with what each states about the hosts it needs."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pagefold import settings
from pagefold.errors import UsageError
from pagefold.scenario.host import FreshHost, Host

LIBRARY = Path(__file__).parent / "library"
PREFIX = "scenario_"
FEATURES = frozenset({"pin", "merge_any", "offline"})
_STATED = ("nodes", "needs", "knobs")
_Function = TypeVar("_Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Scenario:
    """A function that takes a host, and what it states: the least number of nodes, its needs, and knobs to begin with."""

    name: str
    path: Path
    run: Callable[[Host], object] = field(compare=False)
    nodes: int = field(default=1, compare=False)
    needs: frozenset[str] = field(default=frozenset(), compare=False)
    knobs: Mapping[str, int | str] = field(default_factory=dict, compare=False)

    @property
    def shows(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.run) or "").partition("\n")[0]

    def why_not(self, host: FreshHost) -> str | None:
        """Say why a host cannot run it, None if it can."""
        if host.nodes < self.nodes:
            return f"needs {self.nodes} nodes, there {'are' if host.nodes > 1 else 'is'} {host.nodes}"
        missing = sorted((self.needs | set(self.knobs)) - host.features)
        return f"needs {', '.join(missing)}" if missing else None


def states(
    *, nodes: int | None = None, needs: Collection[str] | None = None, knobs: Mapping[str, int | str] | None = None
) -> Callable[[_Function], _Function]:
    """Let one scenario state what it needs, instead of what its file states."""

    def state(function: _Function) -> _Function:
        for name, value in (("nodes", nodes), ("needs", needs), ("knobs", knobs)):
            if value is not None:
                setattr(function, name, value)
        return function

    return state


def load(wanted: str) -> Iterator[Scenario]:
    """Yield the scenarios of a file, or of a folder of them, in the order in which they stand; of FILE::NAME that one."""
    where, _, name = wanted.partition("::")
    path = Path(where)
    if not path.exists():
        raise UsageError(f"{where}: there is no such scenario file")
    found = list(_of_folder(path) if path.is_dir() else _of_file(path))
    if name:
        found = [scenario for scenario in found if scenario.name == name.removeprefix(PREFIX)]
    if not found:
        what = f"no scenario {name}" if name else f"no function {PREFIX}*"
        raise UsageError(f"{where}: there is {what} in it")
    yield from found


def _of_folder(folder: Path) -> Iterator[Scenario]:
    for path in sorted(folder.glob("*.py")):
        yield from _of_file(path)


def _of_file(path: Path) -> Iterator[Scenario]:
    module = _module(path)
    for name, function in vars(module).items():
        if name.startswith(PREFIX) and inspect.isfunction(function) and function.__module__ == module.__name__:
            yield _scenario(path, module, name, function)


def _module(path: Path) -> ModuleType:
    """Run a scenario file; what goes wrong in it is its writer's mistake, told in one line."""
    name = (
        f"pagefold.scenario.library.{path.stem}" if path.resolve().parent == LIBRARY else f"_scenarios_of_{path.stem}"
    )
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its dataclasses and the like work
    sys.path.insert(0, str(path.resolve().parent))  # as if it were run
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also one that wants to end us
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _named_knobs(module: ModuleType) -> dict[str, int | str]:
    """Return the knobs that a file sets by their own names, as `merge_across_nodes = 0`."""
    names = [name for name in settings.KNOBS if name != "run"]
    return {name: getattr(module, name) for name in names if isinstance(getattr(module, name, None), int | str)}


def _scenario(path: Path, module: ModuleType, name: str, function: Callable[[Host], object]) -> Scenario:
    stated: dict[str, Any] = {}
    for key in _STATED:
        value = getattr(function, key, getattr(module, key, None))
        if value is not None:
            stated[key] = value
    where = f"{path}::{name}"
    if (
        inspect.isgeneratorfunction(function)
        or inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        raise UsageError(f"{where} is a generator or async: it would not run; make it a plain function")
    nodes, needs, knobs = stated.get("nodes", 1), stated.get("needs", ()), stated.get("knobs", _named_knobs(module))
    if not isinstance(nodes, int) or nodes < 1:
        raise UsageError(f"{where} states nodes = {nodes!r}; use 1 or more")
    if isinstance(needs, str) or not isinstance(needs, Collection):
        raise UsageError(f"{where} states needs = {needs!r}; use a set of names, as {{'pin'}}")
    if unknown := sorted(set(needs) - FEATURES - set(settings.KNOBS)):
        raise UsageError(f"{where} needs {', '.join(unknown)}; use {', '.join(sorted(FEATURES))} or the name of a knob")
    if not isinstance(knobs, Mapping):
        raise UsageError(f"{where} states knobs = {knobs!r}; use a dictionary, as {{'max_page_sharing': 2}}")
    for knob, value in knobs.items():
        settings.parse(settings.find(knob), value)
    return Scenario(name.removeprefix(PREFIX), path, function, nodes, frozenset(needs), knobs)
