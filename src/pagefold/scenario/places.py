"""Own where hosts are found: the simulated machine, this machine's kernel, and kernels in guests; each opened for a `with` block."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from pagefold.scenario.host import FreshHost, HostFailed
from pagefold.scenario.kernel_host import Channel, KernelHost
from pagefold.scenario.kernel_ksm import KernelKsm
from pagefold.scenario.sim_host import SimHost

Kind = Literal["sim", "kernel", "guest"]
KINDS: tuple[Kind, ...] = ("sim", "kernel", "guest")
FAR_SIDE = Path(__file__).parent / "far" / "driver.py"  # a program; it imports what lies beside it
_GRACE = 30.0  # seconds that a driver has to end its processes
BOUND = 1800.0  # seconds after which a guest is ended, whatever it does


class Place(NamedTuple):
    """Where a host is to be found. `nodes` is not asked for `kernel`; with `hotplug` all nodes of a guest but node 0 can go offline."""

    kind: Kind
    nodes: int = 1
    hotplug: bool = False
    kernel: Path | None = None  # of a guest; none: the one that was fetched


def nodes_here() -> int:
    """Return how many NUMA nodes this machine has."""
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1


def why_not(place: Place) -> str | None:
    """Say why a host cannot be had here, None if it can."""
    if place.kind == "kernel":
        return KernelKsm.why_not()
    if place.kind == "guest":
        from kernelguest import kernels

        return kernels.why_not(place.kernel)
    return None


@contextmanager
def open_host(place: Place) -> Iterator[FreshHost]:
    """Give a host for as long as the block lasts; see KernelKsm for what `kernel` needs and restores."""
    if place.kind == "sim":
        yield SimHost(place.nodes)
    elif place.kind == "kernel":
        with _this_kernel() as host:
            yield host
    else:
        with _guest(place) as host:
            yield host


@contextmanager
def _this_kernel() -> Iterator[KernelHost]:
    with KernelKsm() as ksm:
        driver = subprocess.Popen(
            [sys.executable, "-E", "-s", "-S", str(FAR_SIDE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(ksm.witness,),
            process_group=0,  # a Ctrl-C is for us: we end it
        )
        assert driver.stdin is not None and driver.stdout is not None
        try:
            yield KernelHost("kernel", Channel(driver.stdin, driver.stdout, "this kernel"), list, frozenset())
        finally:
            driver.stdin.close()  # it ends all it started, and then itself
            try:
                driver.wait(_GRACE)
            except subprocess.TimeoutExpired:
                driver.kill()
                driver.wait()
            driver.stdout.close()
        if driver.returncode:
            raise HostFailed(f"the driver of this kernel ended with status {driver.returncode}")


@contextmanager
def _guest(place: Place) -> Iterator[KernelHost]:
    from kernelguest import Guest, GuestError

    plugged = range(1, place.nodes) if place.hotplug else ()
    features = frozenset({"offline"} if plugged else ())
    try:
        with Guest(FAR_SIDE, kernel=place.kernel, nodes=place.nodes, hotplug=plugged, bound=BOUND) as guest:
            complaints = _only_new(guest.complaints)
            yield KernelHost("guest", Channel(guest.stdin, guest.stdout, "the guest"), complaints, features)
        if late := complaints():
            raise HostFailed(f"the guest complained at its end: {'; '.join(late)}")
    except GuestError as error:
        raise HostFailed(str(error)) from error


def _only_new(complaints: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """Return what a growing list holds more than when it was last asked."""
    told = 0

    def ask() -> list[str]:
        nonlocal told
        found = complaints()
        told, new = len(found), found[told:]
        return new

    return ask
