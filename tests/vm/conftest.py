"""Own what the guests' tests share: where the package is found, why guests cannot start here, and programs for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "vm"))

from kernelguest import why_not

Program = Callable[[str], Path]


@pytest.fixture(scope="session")
def guests() -> None:
    """Skip, with the reason, where no guest can start."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Return what makes a file of a program's text."""

    def write(text: str) -> Path:
        path = tmp_path_factory.mktemp("guest") / "program.py"
        path.write_text(dedent(text))
        return path

    return write
