"""Send a daemon what no agent would say: mutations of every message, in every state of a connection; a million of them nightly.

The daemon runs in this process, a turn at a time, over real sockets: so what it was given is counted exactly, and what fails is replayed
by its seed: `PAGEFOLD_FUZZ_SEED=7 pytest tests/live/test_fuzz.py -k storm`. PAGEFOLD_FUZZ=9000000 makes the nightly number another.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import scaled
from tests.live.clients import Buffer, Client, Crowd, random_pages, ready
from tests.live.processes import DaemonProcess
from tests.live.test_hostile import slots_are_right

from pagefold import settings
from pagefold.core import layout
from pagefold.live import control, domain, judge, messages
from pagefold.live.daemon import Daemon
from pagefold.live.messages import PAGE, BadMessage
from pagefold.live.peer import MOST_PAGES, Peer

KINDS = sorted(messages.LAYOUT)
CELL = 4  # pages of a region
EDGES = [0, 1, 2, 63, 64, 4095, 4096, 4097, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**44, 2**47, 2**56, 2**63 - 1, 2**63]
EDGES += [2**64 - 1, 2**64 - PAGE, *(2**bits - PAGE for bits in (47, 48, 56))]
MESSAGES = scaled(30_000)
MANY_MESSAGES = int(os.environ.get("PAGEFOLD_FUZZ", scaled(1_000_000)))
FIRST_SEED = int(os.environ.get("PAGEFOLD_FUZZ_SEED", "1"))
MIB = 1 << 20


class Fuzzer:
    """Make messages that are almost right, for a connection whose state it follows as far as it can."""

    def __init__(self, seed: int, buffers: list[Buffer]) -> None:
        self.chance = random.Random(seed)
        self.buffers = buffers
        self.begin()

    def begin(self) -> None:
        """Forget the connection."""
        self.regions: dict[int, tuple[int, int]] = {}  # number: (start, pages)
        self.free = [(one.address + at * PAGE, CELL) for one in self.buffers for at in range(0, one.count, CELL)]
        self.windows: list[tuple[int, int]] = []  # batches to be answered, and their pages
        self.said_hello = False
        self.rude = self.chance.choice([0.0, 0.02, 0.1, 0.5])  # how much of it is wrong

    def hear(self, packet: bytes) -> None:
        """Note what the daemon asks."""
        kind, said = messages.unpack(packet)
        if kind == messages.WINDOWS:
            self.windows.append((int(said["batch"]), int(said["runs"]["pages"][: said["count"]].sum())))

    def next(self) -> bytes:
        """Return the next message."""
        chance = self.chance
        if not self.said_hello and chance.random() < 0.95:
            self.said_hello = True
            most = chance.choice([65530, 65530, 65530, 2, 2**32 - 1])
            packet = messages.pack(messages.HELLO, windows_safe=int(chance.random() < 0.9), max_map_count=most)
        elif self.windows and chance.random() < 0.7:
            packet = self.outcome()
        else:
            packet = chance.choice([self.advise, self.advise, self.unadvise, self.sync, self.control])()
        if chance.random() >= self.rude:
            return packet
        return chance.choice([self.anything(), self.mutated(packet), self.mutated(packet)])

    def advise(self) -> bytes:
        if not self.free:
            return self.unadvise()
        number = self.chance.choice([1, 2, 3, self.chance.randrange(1, 1 << 40)])
        while number in self.regions:
            number += 1
        self.chance.shuffle(self.free)
        start, pages = self.free.pop()
        if self.chance.random() < 0.1:
            self.free.append((start, pages))
            start, pages = self.chance.randrange(1 << 28, 1 << 31) << 24, self.chance.choice([1, 7, 1000, 4095])
        self.regions[number] = (start, pages)
        flags = {"tracked": int(self.chance.random() < 0.1), "quiet": int(self.chance.random() < 0.1)}
        return messages.pack(messages.ADVISE, region=number, start=start, pages=pages, **flags)

    def unadvise(self) -> bytes:
        if not self.regions:
            return self.advise()
        number = self.chance.choice(list(self.regions))
        start, pages = self.regions.pop(number)
        if pages == CELL:
            self.free.append((start, pages))
        return messages.pack(messages.UNADVISE, region=number)

    def sync(self) -> bytes:
        if not self.regions or self.chance.random() < 0.5:
            return self.advise()
        number = self.chance.choice(list(self.regions))
        return messages.pack(messages.SYNC, region=number, token=self.chance.getrandbits(64))

    def outcome(self) -> bytes:
        batch, pages = self.windows.pop(self.chance.randrange(len(self.windows)))
        status = self.chance.choice([0, 1, 2, self.chance.randrange(13), -1])
        values = [self.chance.randrange(13) if status < 0 else status for _ in range(pages)]
        return messages.pack(messages.OUTCOME, batch=batch, pages=pages, status=np.array(values, np.uint8))

    def control(self) -> bytes:
        knob = self.chance.choice([*settings.KNOBS, "max_cpu_percent", "nothing"])
        value = self.value(3)
        verbs = ["set", "set", "settled", "clients", "history", "dance", None, 7]
        request: Any = {
            "verb": self.chance.choice(verbs if self.chance.random() < 0.9 else ["stat", "validate"]),
            "knobs": {knob: self.chance.choice([0, 1, 2, 5, value])},
            "timeout": self.chance.choice([0, 0, 1e-9, value]),
        }
        text = json.dumps(self.chance.choice([request, request, request, value])).encode()
        return control.HEADER.pack(control.MAGIC, 1, control.CONTROL, control.HEADER.size + len(text), 0) + text

    def value(self, depth: int) -> Any:
        """Return any JSON value."""
        chance = self.chance
        plain = [None, True, -1, 10**400, 1.5, float("nan"), float("inf"), "", "1", "y", "\ud800", "x" * 500, 2**64]
        if depth == 0 or chance.random() < 0.6:
            return chance.choice(plain)
        some = [self.value(depth - 1) for _ in range(chance.randrange(4))]
        return some if chance.random() < 0.5 else {str(at): one for at, one in enumerate(some)}

    def anything(self) -> bytes:
        """Return a message of any kind, also of those that only a daemon sends, with any bytes in it."""
        kind = self.chance.choice(KINDS)
        record = np.frombuffer(self.chance.randbytes(messages.LAYOUT[kind].itemsize), messages.LAYOUT[kind])[0].copy()
        record["header"] = (messages.MAGIC, messages.VERSION, kind, record.nbytes, 0)
        return bytes(record.tobytes())

    def mutated(self, packet: bytes) -> bytes:
        """Change something in a packet, keeping its header right more often than not."""
        chance, body = self.chance, bytearray(packet.ljust(16, b"\0"))
        how = chance.randrange(7)
        if how == 0:  # a field at an edge
            size = chance.choice([4, 8])
            at = chance.randrange(0, max(min(len(body), 200) - size, 1), 4)
            struct.pack_into("<Q" if size == 8 else "<I", body, at, chance.choice(EDGES) % (1 << 8 * size))
        elif how == 1:
            for _ in range(chance.randint(1, 4)):
                body[chance.randrange(min(len(body), 300))] ^= 1 << chance.randrange(8)
        elif how == 2:
            body = body[: chance.randrange(len(body) + 1)]
        elif how == 3:
            body += chance.randbytes(chance.choice([1, 8, 4096, messages.MOST_BYTES]))
        elif how == 4:
            struct.pack_into("<H", body, 6, chance.choice([*KINDS, messages.CONTROL, 0, 99, 65535]))
        elif how == 5:
            body = bytearray(chance.randbytes(chance.randrange(300)))
        else:
            body = body + body
        if chance.random() < 0.7 and len(body) >= 16:
            struct.pack_into("<I", body, 8, len(body))
        return bytes(body[: messages.MOST_BYTES])


class Bench:
    """A daemon in this process, honest clients, and a hostile one that connects again and again."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        monkeypatch.setattr("pagefold.live.peer._PATIENCE", 0.05)
        monkeypatch.setattr("pagefold.live.daemon._SAMPLE_SECONDS", 0.05)
        monkeypatch.setattr(messages, "unpack", self.counted(messages.unpack))
        monkeypatch.setattr(Daemon, "_handle", self.noted(Daemon._handle))
        work = Daemon._work
        monkeypatch.setattr(Daemon, "_work", lambda daemon: work(daemon) if self.working else None)
        self.working = True
        self.got = 0
        self.done: Counter[int] = Counter()  # messages that did what they said, by kind
        self.daemon = Daemon("fuzz", knobs={"sleep_millisecs": 0, "max_cpu_percent": 100})
        self.daemon._warm = self.daemon._ready = True
        self.daemon._listening.setblocking(False)
        self.daemon._selector.register(self.daemon._listening, selectors.EVENT_READ, None)
        self.crowd = Crowd()
        self.shared = random_pages(1, 40)
        for _ in range(2):
            self.crowd.join(domain.socket_path("fuzz")).advise(self.shared)
        self.until(lambda: self.daemon.merging.settled)
        assert self.daemon.merging.mirror.engine.counters().pages_sharing == 40
        self.evil: socket.socket | None = None

    def counted(self, unpack: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def count(packet: bytes) -> Any:
            self.got += 1
            return unpack(packet)

        return count

    def noted(self, handle: Callable[..., None]) -> Callable[..., None]:
        def note(daemon: Daemon, peer: Peer, kind: int, said: Any) -> None:
            handle(daemon, peer, kind, said)
            self.done[kind] += 1

        return note

    def turn(self, *, working: bool = True) -> None:
        """Let the daemon handle what there is, and work if it shall, without a rest."""
        self.daemon._next_work, self.working = 0.0, working
        self.daemon._turn()
        if working:
            self.crowd.pump()

    def until(self, condition: Callable[[], object]) -> None:
        for _ in range(100_000):
            if condition():
                return
            self.turn()
        raise AssertionError("waited in vain")

    def attack(self, fuzzer: Fuzzer, most: int) -> None:
        """Send up to so many messages in one connection."""
        evil = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        evil.connect(str(domain.socket_path("fuzz")))
        evil.setblocking(False)
        fuzzer.begin()
        sent = 0
        while sent < most:
            for _ in range(min(fuzzer.chance.choice([1, 2, 30]), most - sent)):
                try:
                    evil.send(fuzzer.next() or b"\0")
                except BlockingIOError:
                    break
                except OSError:
                    sent = most
                sent += 1
            for _ in range(fuzzer.chance.choice([0] * 7 + [8])):
                self.turn()
            self.turn(working=False)
            if self.read(evil, fuzzer):
                break
        evil.close()
        self.turn(working=False)

    def read(self, evil: socket.socket, fuzzer: Fuzzer) -> bool:
        """Take what the daemon says; tell whether that is the end."""
        while ready([evil], 0):
            try:
                packet = evil.recv(messages.MOST_BYTES)
            except OSError:
                return True
            if not packet:
                return True
            fuzzer.hear(packet)
        return False

    def judge(self) -> None:
        """Everything that must be so at any time."""
        assert self.crowd.right(), "memory of a client changed"
        assert not any(client.closed for client in self.crowd.clients), "an honest client was dropped"
        assert slots_are_right(self.crowd.clients[0])
        judge.validate(self.daemon.merging)

    def close(self) -> None:
        self.crowd.close()
        for peer in list(self.daemon.peers.values()):
            self.daemon._drop(peer)
        self.daemon._selector.close()
        self.daemon._listening.close()
        self.daemon.merging.store.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(tmp_path, monkeypatch)
    yield made
    made.close()


def own_memory() -> int:
    """Return this process's own memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def fuzz(bench: Bench, goal: int) -> None:
    """Send so many messages, and hold at every step what must hold."""
    buffers = [Buffer(bench.shared[:20]), Buffer(bench.shared[20:]), Buffer(random_pages(2, 20))]
    buffers[2].pages[5:9] = 0
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    seed, begin, memory = FIRST_SEED, bench.got, own_memory()
    while bench.got - begin < goal:
        fuzzer = Fuzzer(seed, buffers)
        try:
            for _ in range(10):
                bench.attack(fuzzer, most=100)
                if fuzzer.chance.random() < 0.7:
                    bench.daemon.merging.mirror.set("run", 1)
            bench.turn()
            bench.judge()
        except BaseException:
            print(f"replay: PAGEFOLD_FUZZ_SEED={seed} pytest tests/live/test_fuzz.py -k storm")
            raise
        seed += 1
    grown = own_memory() - memory
    # What clients may advise is bounded, and so are the tables for it; the kernel gives memory to their parts as they are used.
    tables = sum(table.nbytes for table in bench.daemon.merging.mirror.machine.world)
    print(
        f"{bench.got - begin} messages, {seed - FIRST_SEED} seeds; {grown / MIB:.1f} MiB more, tables {tables / MIB:.1f}"
    )
    assert tables < 4 * MOST_PAGES * (layout.pte.itemsize + layout.rmap.itemsize) + 64 * MIB
    assert grown < tables + 32 * MIB
    bench.daemon._set({"knobs": {"run": 2}})
    bench.until(lambda: bench.daemon.merging.store.backed_bytes() == 0)
    bench.daemon._set(
        {"knobs": {"run": 1, "use_zero_pages": 1, "smart_scan": 0, "pages_to_scan": 1000, "advisor_mode": "none"}}
    )
    for client in bench.crowd.clients:
        client.answering = True
    bench.until(lambda: bench.daemon.merging.mirror.engine.counters().pages_sharing == 40)
    bench.judge()
    assert len(os.listdir("/proc/self/fd")) <= descriptors + len(bench.daemon.merging.store.extents) * 3  # noqa: PTH208
    for buffer in buffers:
        assert buffer.right() or buffer is buffers[2]
        buffer.unmap()


@pytest.mark.parametrize("most", [MESSAGES, pytest.param(MANY_MESSAGES, marks=pytest.mark.nightly)])
def test_a_storm_changes_nothing(bench: Bench, most: int) -> None:
    fuzz(bench, most)
    kinds = {messages.HELLO, messages.ADVISE, messages.UNADVISE, messages.SYNC, messages.OUTCOME, messages.CONTROL}
    assert set(bench.done) == kinds, "nothing else may do anything"
    assert min(bench.done.values()) > most // 200, f"too little of it came through: {bench.done}"


def test_every_layout_is_refused_unless_it_is_whole() -> None:
    """Any bytes are a message, or BadMessage, and nothing else."""
    chance = random.Random(3)
    fuzzer = Fuzzer(3, [Buffer(random_pages(1, 4))])
    fuzzer.said_hello = True
    seen = set()
    for _ in range(scaled(20_000)):
        makers = [fuzzer.next, fuzzer.anything, lambda: chance.randbytes(chance.randrange(100))]
        packet = chance.choice(makers)()
        packet = fuzzer.mutated(packet) if chance.random() < 0.6 else packet
        try:
            kind, said = messages.unpack(packet)
        except BadMessage:
            seen.add("refused")
            continue
        seen.add(kind)
        assert kind == messages.CONTROL or said["header"]["length"] == len(packet) == messages.LAYOUT[kind].itemsize
    assert {"refused", *KINDS, messages.CONTROL} <= seen


def test_a_storm_over_a_daemon_of_its_own(daemon: DaemonProcess, crowd: Crowd) -> None:
    """Fewer, to a daemon that is a process: it lives, answers, stays small, and leaves no descriptor behind."""
    honest = [crowd.join(daemon.path) for _ in range(2)]
    for client in honest:
        client.advise(random_pages(1, 40))
    crowd.until(lambda: daemon.counters()["pages_sharing"] == 40)
    crowd.until(lambda: daemon.descriptors().count("socket") == 5)
    descriptors, memory = without_store(daemon), daemon.resident()
    fuzzer = Fuzzer(FIRST_SEED, [Buffer(random_pages(1, 40))])
    for _ in range(scaled(1000)):
        evil = Client(daemon.path, hello=False)
        fuzzer.begin()
        for _ in range(20):
            try:
                evil.connection.send(fuzzer.next() or b"\0")
            except OSError:
                break
        crowd.pump()
        evil.close()
    daemon.set(run=2)
    daemon.set(run=1, use_zero_pages=1, smart_scan=0, advisor_mode="none", max_cpu_percent=100, sleep_millisecs=0)
    daemon.set(pages_to_scan=1000)
    crowd.until(lambda: daemon.counters()["pages_sharing"] == 40)
    crowd.until(lambda: without_store(daemon) == descriptors)
    assert daemon.resident() - memory < 32 * MIB
    assert slots_are_right(honest[0])


def without_store(daemon: DaemonProcess) -> list[str]:
    return [name for name in daemon.descriptors() if "memfd" not in name]
