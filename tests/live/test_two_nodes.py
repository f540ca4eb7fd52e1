"""Run the live merger on two NUMA nodes, in a guest: two cases in every run, all of them by `make conform-live`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kernelguest import Guest, why_not

pytestmark = pytest.mark.nightly

PROGRAM = Path(__file__).parent / "guest" / "two_nodes.py"
FEW = ("equal_pages_stay_apart", "nothing_joins_a_misplaced_page")
CASES = () if os.environ.get("PAGEFOLD_CONFORM") == "live" else FEW  # none named: all
BOUND = 3000.0  # seconds


def folder_of(package: str) -> Path:
    """Return where an installed package is."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(BOUND + 60)
def test_what_merges_on_two_nodes_merges_within_each() -> None:
    if reason := why_not():
        pytest.skip(reason)
    packages = [folder_of(name) for name in ("pagefold", "numpy", "xxhash", "numba", "llvmlite")]
    said = b""
    with Guest(PROGRAM, nodes=2, cpus=2, mib_per_node=512, bound=BOUND, arguments=CASES, packages=packages) as guest:
        while block := guest.stdout.read(1 << 16):
            said += block
            sys.stdout.write(block.decode())
    assert guest.exit_code == 0, guest.log()
    assert guest.complaints() == []
    assert all(f"{case}: holds" in said.decode() for case in CASES or ("storm",))
