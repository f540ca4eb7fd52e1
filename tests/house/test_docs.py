"""Judge that the documents keep up with the project's own files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]


@pytest.mark.parametrize("requirement", DEPENDENCIES)
def test_every_dependency_has_its_reason(requirement: str) -> None:
    page = ROOT / "docs" / "dependencies.md"
    if not page.exists():
        pytest.skip("docs/dependencies.md is not written yet")
    match = re.match(r"[\w.-]+", requirement)
    assert match
    lines = [line for line in page.read_text().splitlines() if re.search(rf"\b{re.escape(match[0])}\b", line)]
    assert any(len(line.split()) >= 5 for line in lines), f"docs/dependencies.md does not say why {match[0]} is needed"


def test_the_version_is_told_once_and_alike() -> None:
    import pagefold

    assert PROJECT["version"] == pagefold.__version__
