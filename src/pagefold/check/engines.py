"""Own which engine is explored: the shipped one."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from pagefold.check import bench, expand, visited
from pagefold.core import arena, doors, invariants


@dataclass(frozen=True)
class Explored:
    """The compiled modules of one engine, and of the explorer over it."""

    arena: ModuleType
    doors: ModuleType
    invariants: ModuleType
    bench: ModuleType
    expand: ModuleType
    visited: ModuleType


SHIPPED = Explored(arena, doors, invariants, bench, expand, visited)
