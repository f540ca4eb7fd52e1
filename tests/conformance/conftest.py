"""Own the hosts of these tests: each is opened once, and skipped with the reason where it cannot be had."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.conftest import SLOW

from pagefold.scenario import sim_host
from pagefold.scenario.host import FreshHost
from pagefold.scenario.places import Place, open_host, why_not

if SLOW:
    sim_host.FRAMES = 1024  # every observation walks them all
# `make conform` asks for all; a normal run for a part that represents it.
ALL = os.environ.get("PAGEFOLD_CONFORM", "") == "all"


def opened(place: Place) -> Iterator[FreshHost]:
    if reason := why_not(place):
        pytest.skip(f"{place.kind}: {reason}")
    with open_host(place) as host:
        yield host


# Of a module, not of the session: other tests borrow this machine's KSM too.
@pytest.fixture(scope="module")
def kernel() -> Iterator[FreshHost]:
    yield from opened(Place("kernel"))


@pytest.fixture(scope="session")
def guest() -> Iterator[FreshHost]:
    yield from opened(Place("guest", 2))


@pytest.fixture(scope="session")
def guest_of_four() -> Iterator[FreshHost]:
    if not ALL:
        pytest.skip("the guest with four nodes is a part of `make conform`")
    yield from opened(Place("guest", 4))
