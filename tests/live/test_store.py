"""Judge the store: slots are given out once and in runs, nobody can change them, and use of an extent is proved by the kernel."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pagefold.live.headroom import Headroom
from pagefold.live.store import SEALS, Extent, Store, StoreFull

HERE = Path(__file__).parent
PAGE = 4096
ROOT = os.geteuid() == 0


class Roomy(Headroom):
    """A machine without limits."""

    def short_of(self, pages: int, node: int | None = None) -> str:
        return ""


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store(1, 64, headroom=Roomy())
    yield made
    validate(made)
    made.close()


def validate(store: Store) -> None:
    """Compare every count of a store with what it is the count of."""
    for number, extent in store.extents.items():
        assert extent.number == number > 0
        live = extent.live_slots()
        assert extent.live == len(live) <= extent.taken <= extent.slots
        assert not len(live) or live[-1] < extent.taken
        assert extent.backed_pages() >= extent.taken
    assert store.live_pages() == sum(extent.live for extent in store)


def filled(store: Store, count: int, byte: int = 0x5A) -> Extent:
    """Return an extent with that many published slots."""
    ((extent, first, pages),) = store.allocate(0, count)
    extent.memory[first : first + pages] = byte
    store.publish(extent, first, pages)
    return extent


class Client:
    """A process that holds an extent, told what to do."""

    def __init__(self, extent: Extent) -> None:
        fd = extent.descriptor_for(1)
        command = [sys.executable, str(HERE / "holder.py"), str(fd), str(extent.slots)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[fd]
        )
        os.close(fd)

    def tell(self, word: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def client(extent: Extent) -> Iterator[Client]:
    """Run a client of an extent."""
    made = Client(extent)
    try:
        yield made
    finally:
        made.kill()


def eventually(condition: object, *arguments: object) -> bool:
    """Wait, long if need be, for what must become true."""
    assert callable(condition)
    until = time.monotonic() + 60
    while not condition(*arguments):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


# --- slots ----------------------------------------------------------------------------------------------------------------


def test_neighbours_are_neighbours(store: Store) -> None:
    runs = [store.allocate(0, count) for count in (16, 16, 32)]
    assert all(len(run) == 1 for run in runs)
    extent = runs[0][0][0]
    assert [(run[0][0] is extent, run[0][1], run[0][2]) for run in runs] == [
        (True, 0, 16),
        (True, 16, 16),
        (True, 32, 32),
    ]
    assert extent.room == 0
    assert extent.address_of(3) == extent.memory[3:].ctypes.data


def test_a_run_is_not_cut_to_fill_a_rest_and_the_rest_is_used_later(store: Store) -> None:
    ((first, _, _),) = store.allocate(0, 60)
    ((second, start, pages),) = store.allocate(0, 16)
    assert second is not first and (start, pages) == (0, 16)
    ((third, start, _),) = store.allocate(0, 4)
    assert third is first and start == 60


def test_more_than_an_extent_holds_comes_in_whole_extents(store: Store) -> None:
    runs = store.allocate(0, 64 * 2 + 5)
    assert [pages for _, _, pages in runs] == [64, 64, 5]
    assert len({extent.number for extent, _, _ in runs}) == 3


@pytest.mark.parametrize("seed", range(20))
def test_slots_are_given_out_once_and_keep_their_bytes(seed: int) -> None:
    chance = random.Random(seed)
    store = Store(1, 32, headroom=Roomy())
    ever: set[tuple[int, int]] = set()
    alive: dict[tuple[int, int], int] = {}
    for step in range(300):
        if chance.random() < 0.6:
            count = chance.choice([1, 2, 7, 16, 40])
            runs = store.allocate(0, count)
            assert sum(pages for _, _, pages in runs) == count
            for extent, first, pages in runs:
                assert not extent.memory[first : first + pages].any()
                extent.memory[first : first + pages] = step % 255 + 1
                store.publish(extent, first, pages)
                for slot in range(first, first + pages):
                    assert (extent.number, slot) not in ever
                    ever.add((extent.number, slot))
                    alive[extent.number, slot] = step % 255 + 1
        elif alive:
            number = chance.choice(list(alive))[0]
            here = [slot for home, slot in alive if home == number]
            some = chance.sample(here, chance.randint(1, len(here)))
            store.give(store[number], some if chance.random() < 0.5 else np.array(some))
            for slot in some:
                del alive[number, slot]
        if chance.random() < 0.2:
            freed = store.free_extents()
            assert all(home not in freed for home, _ in alive)
            assert all(extent.live for extent in store)
        validate(store)
    assert {(extent.number, slot) for extent in store for slot in extent.live_slots().tolist()} == set(alive)
    assert all((store[number].memory[slot] == byte).all() for (number, slot), byte in alive.items())
    store.close()
    assert not store.extents


def test_a_slot_is_given_back_once(store: Store) -> None:
    extent = filled(store, 8)
    store.give(extent, [3])
    with pytest.raises(AssertionError, match="given back once"):
        store.give(extent, [3])
    with pytest.raises(AssertionError, match="given back once"):
        store.give(extent, [4, 4])
    with pytest.raises(AssertionError, match="given back once"):
        store.give(extent, [9])
    assert extent.live_slots().tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_sparse_extents_are_those_with_much_to_gain() -> None:
    store = Store(1, 128, headroom=Roomy())
    full, half, sparse, sparser, dead = (filled(store, 128) for _ in range(5))
    store.give(half, range(64))
    store.give(sparse, range(100))
    store.give(sparser, range(127))
    store.give(dead, range(128))
    assert store.sparse() == [sparser, sparse]
    assert full.live == 128
    small = filled(store, 4)
    store.give(small, range(3))
    assert small not in store.sparse()
    assert small.room
    store.retire(small)
    ((other, _, _),) = store.allocate(0, 1)
    assert other is not small
    store.close()


# --- sealed ---------------------------------------------------------------------------------------------------------------


def test_the_seals_and_the_mode(store: Store) -> None:
    import fcntl

    extent = filled(store, 4)
    assert fcntl.fcntl(extent.fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    assert os.fstat(extent.fd).st_mode & 0o777 == 0o400
    fd = extent.descriptor_for(1)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert not os.get_inheritable(fd)
    assert not os.path.sameopenfile(fd, extent.fd) or fd != extent.fd
    os.close(fd)


def attack(fd: int, size: int, daemon_fd: int, address: int, uid: int) -> tuple[list[str], list[str]]:
    """Let a hostile client loose; return what it could do, and what was refused."""
    words = [fd, size, os.getpid(), daemon_fd, address, uid]
    command = [sys.executable, str(HERE / "attacker.py"), *map(str, words)]
    done = subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    told = [
        [line.removeprefix(f"{how}: ") for line in lines if line.startswith(f"{how}: ")] for how in ("done", "refused")
    ]
    return told[0], told[1]


@pytest.mark.parametrize("uid", [0, 65534] if ROOT else [0])  # 0: stay who we are
def test_no_attack_changes_a_slot(store: Store, uid: int) -> None:
    extent = filled(store, 64)
    fd = extent.descriptor_for(1)
    done, refused = attack(fd, 64 * PAGE, extent.fd, extent.address, uid)
    os.close(fd)
    assert (extent.memory == 0x5A).all()
    assert os.fstat(extent.fd).st_size == 64 * PAGE
    assert {"write", "shared writable mapping", "mprotect", "punch", "shrink", "grow", "MADV_REMOVE"} <= set(refused)
    assert {"own memory by force", "daemon's mapping: by force", "daemon's mapping: process_vm_writev"} <= set(refused)
    if uid:  # another user may not even open it
        assert done == []
    elif ROOT:
        assert any(name.startswith("map_files: read-write") for name in refused), "the attack was not tried"
        assert any(name.startswith("daemon's descriptor: read-write, punch") for name in refused)


def test_the_attacks_do_harm_where_nothing_is_sealed() -> None:
    """Else the test above could not fail."""
    size = 64 * PAGE
    harmful = set()
    for uid in [0, 65534] if ROOT else [0]:
        fd = os.memfd_create("bare", 0)
        os.ftruncate(fd, size)
        done, _ = attack(fd, size, fd, 0, uid)
        harmful |= set(done)
        os.close(fd)
    assert {"write", "shared writable mapping", "punch", "shrink", "own descriptor: truncate", "splice"} <= harmful
    assert any(name.startswith("own descriptor: read-write") for name in harmful)


def test_we_cannot_write_to_a_published_slot_either() -> None:
    """A fault of our own ends the daemon; it does not change its clients' memory."""
    script = """
from pagefold.live.store import Store
store = Store(1, 64)
((extent, _, _),) = store.allocate(0, 8)
store.publish(extent, 0, 4)
extent.memory[4] = 1
print("the others can be written", flush=True)
extent.memory[3] = 1
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "the others can be written\n"
    assert done.returncode == -signal.SIGSEGV


# --- proof of use ---------------------------------------------------------------------------------------------------------


def test_an_extent_is_used_as_long_as_anyone_can_read_it(store: Store) -> None:
    extent = filled(store, 8)
    assert extent.unused()
    with client(extent) as one:
        assert not extent.unused()
        assert one.tell("map") == "True"
        assert one.tell("close") == "True"
        assert not extent.unused(), "a mapping without a descriptor"
        grandchild = int(one.tell("fork"))
        assert one.tell("unmap") == "True"
        assert not extent.unused(), "a mapping in a forked child alone"
        assert one.tell("map") in ("True", "False")
        one.kill()
        assert not extent.unused(), "its parent was killed"
        os.kill(grandchild, signal.SIGKILL)
        assert eventually(extent.unused)


def test_one_slot_that_is_mapped_holds_the_extent(store: Store) -> None:
    extent = filled(store, 8)
    with client(extent) as one:
        one.tell("map")
        one.tell("close")
        one.tell("half")
        assert not extent.unused()
        one.kill()
        assert eventually(extent.unused)


def test_a_descriptor_under_way_holds_the_extent(store: Store) -> None:
    """Between sending and receiving nobody has it, and it must not be freed."""
    import socket

    extent = filled(store, 8)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = extent.descriptor_for(1)
    socket.send_fds(here, [b"x"], [fd])
    os.close(fd)
    assert not extent.unused()
    there.close()
    assert extent.unused()
    here.close()


def test_only_unused_and_dead_extents_are_freed(store: Store) -> None:
    extent, other = filled(store, 64), filled(store, 64)
    store.give(other, range(64))
    with client(extent) as one:
        one.tell("map")
        store.give(extent, range(63))
        assert store.free_extents() == [other.number]
        store.give(extent, [63])
        assert store.free_extents() == []
        assert one.tell("read") == "5a" * 64
        assert one.tell("unmap") == "True"
        assert store.free_extents() == [], "it still has the descriptor"
        one.tell("close")
        assert eventually(lambda: store.free_extents() == [extent.number])
    with pytest.raises(KeyError):
        store[extent.number]


def test_freeing_gives_the_memory_back(store: Store) -> None:
    extent = filled(store, 64)
    assert store.backed_bytes() == 64 * PAGE
    fd = os.dup(extent.fd)  # the kernel's count, from outside
    assert os.fstat(fd).st_blocks * 512 == 64 * PAGE
    os.close(fd)
    inode = os.fstat(extent.fd).st_ino
    store.give(extent, range(64))
    store.free_extents()
    assert store.backed_bytes() == 0
    mine = Path("/proc/self/maps").read_text()
    assert f" {inode} " not in mine or "/memfd:pagefold" not in mine


def test_a_client_that_breaks_the_rules_of_the_lock_harms_only_the_accounting(store: Store) -> None:
    extent = filled(store, 8)
    with client(extent) as liar, client(extent) as honest:
        for one in (liar, honest):
            one.tell("map")
        assert liar.tell("hog") == "False", "another one holds it"
        honest.tell("close")
        honest.tell("unmap")
        assert liar.tell("hog") == "True"
        fd = extent.descriptor_for(2)  # still given, without the proof
        assert os.pread(fd, 1, 0) == b"\x5a"
        os.close(fd)
        assert liar.tell("unlock") == "True"
        store.give(extent, range(8))
        assert store.free_extents() == [extent.number]
        filled(store, 64, 0x77)
        assert liar.tell("read")[:16] == "5a" * 8, "what it maps is still there"


def test_the_kernel_counts_slots_for_clients_alone(store: Store) -> None:
    extent = filled(store, 64)
    with client(extent) as one:
        one.tell("map")
        assert one.tell("read") == "5a" * 64
        assert one.tell("pss") == str(64 * PAGE)
        assert (extent.memory == 0x5A).all()  # now we map them too
        assert int(one.tell("pss")) < 64 * PAGE
        extent.forget()
        assert one.tell("pss") == str(64 * PAGE)
        with client(extent) as two:
            two.tell("map")
            two.tell("read")
            assert one.tell("pss") == two.tell("pss") == str(32 * PAGE)
            two.tell("write")
            assert two.tell("pss") == str(63 * PAGE // 2 + PAGE - 63 * PAGE // 2 % 1024)
            assert one.tell("read") == "5a" * 64


# --- no memory ------------------------------------------------------------------------------------------------------------


def nothing_taken(store: Store, before: dict[int, tuple[int, int]]) -> bool:
    return {extent.number: (extent.taken, extent.live) for extent in store} == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_a_refusal_halfway_takes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    filled(store, 60)
    before = {extent.number: (extent.taken, extent.live) for extent in store}
    calls = []
    real = os.posix_fallocate

    def fails(fd: int, offset: int, size: int) -> None:
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(code, os.strerror(code))
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fails)
    with pytest.raises(StoreFull, match=os.strerror(code)):
        store.allocate(0, 64 * 2 + 7)
    assert len(calls) == 3
    assert nothing_taken(store, before)
    assert len(store.allocate(0, 64 * 2 + 7)) == 3


def test_no_descriptor_left(store: Store) -> None:
    filled(store, 64)
    before = {extent.number: (extent.taken, extent.live) for extent in store}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open("/dev/null", os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 2, hard))
    try:
        with pytest.raises(StoreFull, match="ulimit -n"):
            store.allocate(0, 64 * 5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(spare)
    assert nothing_taken(store, before)
    store.allocate(0, 64 * 5)


def test_files_may_not_be_that_large(store: Store) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * PAGE, hard))
    try:
        with pytest.raises(StoreFull, match="ulimit -f"):
            store.allocate(0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not store.extents
    store.allocate(0, 1)


def memory_cgroup() -> Path | None:
    """Return the folder of our memory cgroup, if there is one below which we may make others."""
    for folder, _ in Headroom()._groups:
        limit = folder / "memory.limit_in_bytes"
        if (limit.exists() or (folder / "memory.max").exists()) and os.access(folder, os.W_OK) and ROOT:
            return folder
    return None


FILL = """
import sys
from pagefold.live.store import Store, StoreFull
store, taken = Store(1), 0
sys.stdin.readline()  # until we are in the cgroup
store = Store(1)
try:
    while True:
        for extent, first, pages in store.allocate(0, int(sys.argv[1])):
            extent.memory[first : first + pages] = 1
            store.publish(extent, first, pages)
            taken += pages
except StoreFull as error:
    print(taken, error)
"""


@pytest.mark.parametrize("at_once", [1000, 16])
def test_a_full_memory_cgroup_ends_merging_and_nothing_else(at_once: int) -> None:
    above = memory_cgroup()
    if above is None:
        pytest.skip("needs root and a memory cgroup")
    group = above / f"pagefold-test-{os.getpid()}"
    limit = 128 << 20
    group.mkdir()
    try:
        file = group / "memory.limit_in_bytes"
        (file if file.exists() else group / "memory.max").write_text(str(limit))
        worker = subprocess.Popen(
            [sys.executable, "-c", FILL, str(at_once)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        (group / "cgroup.procs").write_text(str(worker.pid))
        said, _ = worker.communicate("\n")
        assert worker.returncode == 0, "the kernel's OOM killer, or SIGBUS"
    finally:
        group.rmdir()
    taken, why = said.split(" ", 1)
    assert limit // 2 < int(taken) * PAGE < limit
    assert "memory cgroup" in why and "raise" in why
