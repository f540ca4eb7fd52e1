"""Judge a healthy guest by what a program in it sees and says: one boot for all."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernelguest import Guest
from kernelguest.complaints import complaints

pytestmark = pytest.mark.guest
ARGUMENTS = ["plain", "", "two words", '"quoted"', "ünicode\n", "--nodes"]


class Served:
    """A guest with the servant in it."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def ask(self, *request: object, data: bytes = b"") -> Any:
        """Send a request, with raw data after it, and return the answer; `data` is expected back before it."""
        self.guest.stdin.write(json.dumps(request).encode() + b"\n")
        if data:
            # Less than the pipe and the channel hold: the servant reads all before it answers.
            self.guest.stdin.write(data)
            assert self.read(len(data)) == data
        return json.loads(self.guest.stdout.readline())

    def read(self, length: int) -> bytes:
        """Return exactly so many bytes."""
        found = b""
        while len(found) < length:
            block = self.guest.stdout.read(length - len(found))
            assert block, self.guest.log()
            found += block
        return found


@pytest.fixture(scope="module")
def served(guests: None) -> Iterator[Served]:
    """Boot four nodes of which two can be taken offline."""
    servant = Path(__file__).with_name("servant.py")
    with Guest(servant, nodes=4, hotplug=(1, 3), arguments=ARGUMENTS, bound=120) as guest:
        yield Served(guest)
        assert guest.complaints() == []
    assert guest.exit_code == 0
    assert "reboot: Power down" in guest.log()


def test_arguments_arrive(served: Served) -> None:
    assert served.ask("argv")[1:] == ARGUMENTS


def test_a_mebibyte_is_binary_clean(served: Served) -> None:
    data = bytes(range(256)) * 2048 + random.Random(1).randbytes(1 << 19)
    assert served.ask("echo", len(data), data=data) == len(data) == 1 << 20


def test_noise_stays_out_of_the_answers(served: Served) -> None:
    assert served.ask("noise", 20) == 20
    log = served.guest.log()
    assert "noise 19 in the kernel's log" in log and log.count("noise on stderr") == 20


def test_the_processor_has_nothing_that_is_emulated_wrongly(served: Served) -> None:
    """QEMU 7.2 with AVX2 makes NumPy sort wrongly."""
    flags = served.ask("processor")
    assert {"sse4_2", "popcnt", "avx"} <= set(flags)
    assert not {"avx2", "avx512f"} & set(flags)


def test_nodes_have_their_memory_and_node_0_the_processor(served: Served) -> None:
    nodes = served.ask("nodes")
    assert list(nodes) == ["0", "1", "2", "3"]
    assert [cpus for _, cpus, _ in nodes.values()] == ["0", "", "", ""]
    mib = [mib for mib, _, _ in nodes.values()]
    assert mib[1] == mib[3] == 256  # plugged: nothing in it is taken at boot
    assert 192 < mib[0] < 256 and 240 < mib[2] < 256  # node 0 holds the kernel
    assert all(list(states.values()) == ["online", "online"] for _, _, states in nodes.values())


def test_only_plugged_nodes_are_movable(served: Served) -> None:
    zones = served.ask("zones")
    assert zones["1"] == zones["3"] == ["Movable"]
    assert "Movable" not in zones["0"] + zones["2"]


def test_a_plugged_node_goes_offline_and_comes_back(served: Served) -> None:
    before = served.ask("nodes")
    off = served.ask("set_state", 3, "offline")
    assert off["3"][0] == 0 and set(off["3"][2].values()) == {"offline"}
    assert {node: off[node] for node in "012"} == {node: before[node] for node in "012"}
    assert served.ask("set_state", 3, "online_movable") == before


def test_a_healthy_kernel_does_not_complain_at_any_level(served: Served) -> None:
    said = served.ask("kernel_log")
    assert "Linux version" in said and "Memory block size" in said
    assert complaints(said) == []
