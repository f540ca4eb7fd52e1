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
BOUND = 1800.0  # seconds after which a guest is ended, whatever it does


class Place(NamedTuple):
    """Where a host is to be found. `nodes` is not asked for `kernel`; with `hotplug` the last node of a guest can go offline."""

    kind: Kind
    nodes: int = 1
    hotplug: bool = False
    kernel: Path | None = None  # of a guest; none: the one that was fetched


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
    with KernelKsm():
        command = [sys.executable, "-E", "-s", "-S", str(FAR_SIDE)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                yield KernelHost("kernel", Channel(process.stdin, process.stdout, "this kernel"), list, frozenset())
            finally:
                process.stdin.close()  # it ends all it started, and then itself
        if process.returncode:
            raise HostFailed(f"the driver of this kernel ended with status {process.returncode}")


@contextmanager
def _guest(place: Place) -> Iterator[KernelHost]:
    from kernelguest import Guest, GuestError

    plugged = (place.nodes - 1,) if place.hotplug else ()
    features = frozenset({"offline"} if plugged else ())
    try:
        with Guest(FAR_SIDE, kernel=place.kernel, nodes=place.nodes, hotplug=plugged, bound=BOUND) as guest:
            channel = Channel(guest.stdin, guest.stdout, "the guest")
            yield KernelHost("guest", channel, _only_new(guest.complaints), features)
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
