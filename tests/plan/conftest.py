"""Share the specimens: child processes with known memory."""

from tests.sources.conftest import Specimen, specimen

__all__ = ["Specimen", "specimen"]
