"""Judge the daemon by clients that mean harm: nobody else's memory changes, nobody else waits, the daemon lives and stays small.

What none of this protects against: a client is a process of the same user, who may end the daemon by a signal whenever he likes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.live.clients import Client, Crowd, Status, random_pages, ready
from tests.live.conftest import Start
from tests.live.processes import DaemonProcess, WorkerProcess
from tests.live.test_daemon import join_many, merged, refusing, store_bytes

from pagefold.live import control, messages
from pagefold.live.messages import PAGE

HERE = Path(__file__).parent
ROOT = os.geteuid() == 0
MIB = 1 << 20


@pytest.fixture
def honest(daemon: DaemonProcess, crowd: Crowd) -> Iterator[list[Client]]:
    """Two clients whose memory is merged; at the end it still is what it was, and others still merge with it."""
    made = join_many(crowd, daemon, 2, random_pages(1, 50))
    crowd.until(lambda: merged(daemon) == 100)
    yield made
    assert all(client.buffers[1].right() for client in made)
    assert not any(client.closed for client in made)
    late = crowd.join(daemon.path)
    late.advise(random_pages(1, 50))
    crowd.until(lambda: [late.closed, sum(status in (0, 1) for status in late.statuses)] == [0, 50])
    assert slots_are_right(late)


def slots_are_right(client: Client) -> bool:
    """Tell whether the store holds, where a client's pages are, what the pages hold."""
    for number, first, count, extent, slot in client.asked:
        if extent in client.extents and number in client.buffers:  # not released since
            view = np.frombuffer(client.extents[extent][1], np.uint8).reshape(-1, PAGE)
            same = np.array_equal(view[slot : slot + count], client.buffers[number].expected[first : first + count])
            del view
            if not same:
                return False
    return True


def dropped(crowd: Crowd, client: Client) -> bool:
    """Serve everybody until a client is dropped."""
    crowd.until(lambda: client.closed)
    crowd.clients.remove(client)
    client.connection.close()
    return True


# --- the store ------------------------------------------------------------------------------------------------------------


def daemons_view(daemon: DaemonProcess) -> tuple[int, int]:
    """Return the daemon's descriptor of its first extent, and where it is in the daemon's memory."""
    name = "/memfd:pagefold-1 (deleted)"
    fds = [link for link in Path(f"/proc/{daemon.pid}/fd").iterdir() if str(link.readlink()) == name]
    line = next(one for one in Path(f"/proc/{daemon.pid}/maps").read_text().splitlines() if name in one)
    return int(fds[0].name), int(line.split("-")[0], 16)


@pytest.mark.parametrize("uid", [0, 65534] if ROOT else [0])
def test_no_attack_changes_the_store_of_a_living_daemon(
    daemon: DaemonProcess, crowd: Crowd, honest: list[Client], uid: int
) -> None:
    evil = crowd.join(daemon.path)
    evil.advise(random_pages(1, 50))
    crowd.until(lambda: evil.extents)
    fd, view = evil.extents[1]
    before = bytes(view)
    words = [fd, len(view), daemon.pid, *daemons_view(daemon), uid]
    command = [sys.executable, str(HERE / "attacker.py"), *map(str, words)]
    attack = subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE, text=True)
    crowd.until(lambda: attack.poll() is not None)
    assert attack.stdout
    said = attack.stdout.read().splitlines()
    assert attack.returncode == 0
    assert len(said) > 18
    assert bytes(view) == before
    assert os.fstat(fd).st_size == len(view) == 4096 * PAGE
    refused = {line.removeprefix("refused: ") for line in said}
    assert {"write", "shared writable mapping", "mprotect", "punch", "shrink", "MADV_REMOVE"} <= refused
    assert {"daemon's mapping: by force", "daemon's mapping: process_vm_writev"} <= refused
    if uid:
        assert all(line.startswith("refused: ") for line in said)
    elif ROOT:
        assert any(line.startswith("map_files: read-write") for line in refused), "it was not tried"
    crowd.until(lambda: merged(daemon) == 150)


def test_a_client_that_holds_an_extent_alone_harms_nobody(
    daemon: DaemonProcess, crowd: Crowd, honest: list[Client]
) -> None:
    """Its lock is proof of use for the daemon: held exclusively, or given up, it deceives the accounting and no more."""
    evil = crowd.join(daemon.path)
    evil.advise(random_pages(1, 50))
    evil.advise(random_pages(2, 300))
    evil.advise(random_pages(2, 300))
    crowd.until(lambda: merged(daemon) == 750)
    for fd, _ in evil.extents.values():
        fcntl.flock(fd, fcntl.LOCK_UN)
    evil.unadvise(2).unmap()
    evil.unadvise(3).unmap()
    crowd.until(lambda: store_bytes(daemon) <= (50 + 64) * PAGE)
    join_many(crowd, daemon, 2, random_pages(3, 200))
    crowd.until(lambda: merged(daemon) == 150 + 400)
    assert crowd.right()


# --- lies -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", range(messages.UNKNOWN))
def test_lies_about_windows_harm_nobody(daemon: DaemonProcess, crowd: Crowd, honest: list[Client], status: int) -> None:
    """Whatever it says it did, it did nothing."""
    liar, other = crowd.join(daemon.path), crowd.join(daemon.path)
    liar.swap = lambda run: np.full(int(run["pages"]), status, np.uint8)
    contents = np.concatenate([random_pages(1, 50), random_pages(2, 50)])
    liar.advise(contents)
    other.advise(contents)
    crowd.until(lambda: len(liar.statuses) >= 50 and merged(daemon) >= 250 - 50)
    crowd.until(daemon.settled)
    assert crowd.right()
    assert slots_are_right(other)
    daemon.judge()


def test_random_lies_of_many_harm_nobody(daemon: DaemonProcess, crowd: Crowd, honest: list[Client]) -> None:
    chance = np.random.default_rng(5)
    for _ in range(6):
        liar = crowd.join(daemon.path)
        liar.swap = lambda run: chance.integers(0, messages.UNKNOWN, int(run["pages"]), np.uint8)
        liar.advise(random_pages(1, 80))
    crowd.until(lambda: all(len(client.statuses) >= 100 for client in crowd.clients[2:]))
    daemon.judge()
    assert slots_are_right(honest[0])


@pytest.mark.parametrize(
    "lie", ["another batch", "twice", "too few", "too many", "no status", "unknown", "none was asked"]
)
def test_answers_that_no_agent_gives_end_the_connection(
    daemon: DaemonProcess, crowd: Crowd, honest: list[Client], lie: str
) -> None:
    liar = crowd.join(daemon.path)
    if lie == "none was asked":
        liar.send(messages.OUTCOME, batch=1, pages=0)
        assert dropped(crowd, liar)
        return
    liar.answering = False
    liar.advise(random_pages(1, 50))
    crowd.until(lambda: liar.unanswered)
    batch, status = liar.unanswered[0]
    pages = len(status)
    if lie == "twice":
        liar.send(messages.OUTCOME, batch=batch, pages=pages, status=status)
    number = batch + 1000 if lie == "another batch" else batch
    count = {"too few": pages - 1, "too many": pages + 1, "no status": 1 << 31}.get(lie, pages)
    wrong = np.full(pages, messages.UNKNOWN if lie == "unknown" else 0, np.uint8)
    liar.send(messages.OUTCOME, batch=number, pages=count, status=wrong)
    liar.unanswered.clear()
    assert dropped(crowd, liar)
    assert any("was dropped" in note for note in daemon.stat()["notes"])


# --- regions --------------------------------------------------------------------------------------------------------------

ADDRESS = 0x7E0000000000


@pytest.mark.parametrize(
    "regions",
    [
        pytest.param([(1, ADDRESS + 1, 1)], id="unaligned"),
        pytest.param([(1, ADDRESS, 0)], id="empty"),
        pytest.param([(1, 0, 1)], id="page zero"),
        pytest.param([(0, ADDRESS, 1)], id="number 0"),
        pytest.param([(-1, ADDRESS, 1)], id="negative"),
        pytest.param([(1, ADDRESS, 1), (1, ADDRESS + PAGE, 1)], id="number taken"),
        pytest.param([(1, ADDRESS, 4), (2, ADDRESS + 3 * PAGE, 4)], id="overlap behind"),
        pytest.param([(1, ADDRESS + 3 * PAGE, 4), (2, ADDRESS, 4)], id="overlap before"),
        pytest.param([(1, ADDRESS, 9), (2, ADDRESS + 3 * PAGE, 1)], id="inside"),
        pytest.param([(1, ADDRESS + 3 * PAGE, 1), (2, ADDRESS, 9)], id="around"),
        pytest.param([(1, ADDRESS, 4), (2, ADDRESS, 4)], id="same"),
        pytest.param([(1, 0xFFFFFFFF81000000, 10)], id="kernel"),
        pytest.param([(1, 0xFFFFFFFFFF600000, 1)], id="vsyscall"),
        pytest.param([(1, 1 << 56, 1)], id="beyond"),
        pytest.param([(1, ADDRESS, 1 << 63)], id="wraps"),
        pytest.param([(1, ADDRESS, (1 << 64) - 1)], id="all"),
    ],
)
def test_regions_that_cannot_be_end_the_connection(
    daemon: DaemonProcess, crowd: Crowd, honest: list[Client], regions: list[tuple[int, int, int]]
) -> None:
    evil = crowd.join(daemon.path)
    for number, start, pages in regions:
        evil.send(messages.ADVISE, region=number, start=start, pages=pages)
    assert dropped(crowd, evil)


@pytest.mark.parametrize("kind", [messages.UNADVISE, messages.SYNC])
def test_regions_that_were_never_advised(daemon: DaemonProcess, crowd: Crowd, honest: list[Client], kind: int) -> None:
    evil = crowd.join(daemon.path)
    evil.send(kind, region=77)
    assert dropped(crowd, evil)


def test_neighbouring_regions_are_no_overlap(daemon: DaemonProcess, crowd: Crowd) -> None:
    client = crowd.join(daemon.path)
    for number, at in enumerate([4, 0, 8, 12, 2, 6], 1):
        client.send(messages.ADVISE, region=number, start=ADDRESS + at * PAGE, pages=2)
    crowd.until(lambda: daemon.stat()["tracked_bytes"] == 12 * PAGE)
    client.send(messages.UNADVISE, region=5)
    client.send(messages.ADVISE, region=5, start=ADDRESS + 2 * PAGE, pages=2)
    crowd.until(lambda: daemon.stat()["tracked_bytes"] == 12 * PAGE)
    assert not client.closed


def test_more_memory_than_there_is_is_not_looked_after(
    daemon: DaemonProcess, crowd: Crowd, honest: list[Client]
) -> None:
    """The daemon stays small, says so, and the client is not dropped for it: it may be sparse memory."""
    machine = os.sysconf("SC_PHYS_PAGES")
    before = daemon.resident()
    greedy = [crowd.join(daemon.path) for _ in range(8)]
    for client in greedy:
        client.send(messages.ADVISE, region=1, start=ADDRESS, pages=machine + 1)
        client.send(messages.ADVISE, region=2, start=1 << 44, pages=machine - 1)
        client.send(messages.ADVISE, region=3, start=1 << 45, pages=1)
        client.send(messages.ADVISE, region=4, start=1 << 46, pages=1)
        client.sync(1)
    crowd.until(lambda: all(client.answers for client in greedy))
    assert all(client.answers[0]["error"] == -errno.ENOMEM for client in greedy)
    assert daemon.stat()["tracked_bytes"] // PAGE <= 4 * machine
    assert any("too much to look after" in note for note in daemon.stat()["notes"])
    assert daemon.resident() - before < machine * 48, "some bytes a page at most, and none for most pages"
    for client in greedy:
        client.send(messages.UNADVISE, region=1)
        client.close()
    crowd.until(lambda: daemon.stat()["tracked_bytes"] == 100 * PAGE)


def test_more_regions_than_anybody_needs(daemons: Start, crowd: Crowd) -> None:
    daemon = daemons(patch={"pagefold.live.merging.MOST_REGIONS": 100})
    many = crowd.join(daemon.path)
    for number in range(1, 301):
        many.send(messages.ADVISE, region=number, start=ADDRESS + 2 * number * PAGE, pages=1)
    crowd.until(lambda: daemon.stat()["tracked_bytes"] == 100 * PAGE)
    for number in range(1, 301):
        many.send(messages.UNADVISE, region=number)
    crowd.until(lambda: daemon.stat()["tracked_bytes"] == 0)
    assert not many.closed
    many.send(messages.UNADVISE, region=300)
    assert dropped(crowd, many)


# --- memory that is not what it should be -------------------------------------------------------------------------------------


def test_memory_that_is_gone_or_another_behind_our_back(
    daemon: DaemonProcess, crowd: Crowd, honest: list[Client]
) -> None:
    evil = crowd.join(daemon.path)
    buffers = [evil.advise(random_pages(1, 50)) for _ in range(5)]
    crowd.until(lambda: merged(daemon) == 350)
    libc = ctypes.CDLL(None)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    file = os.open(__file__, os.O_RDONLY)
    evil.swap = lambda run: np.full(int(run["pages"]), messages.UNMANAGED, np.uint8)
    buffers[0].unmap()
    libc.mmap(buffers[1].address, buffers[1].size, 3, 0x32, -1, 0)  # fresh memory
    libc.mmap(buffers[2].address, buffers[2].size, 3, 0x12, file, 0)  # a file, with nothing behind its end
    libc.mmap(buffers[3].address, buffers[3].size, 3, 0x31, -1, 0)  # shared memory
    libc.mprotect(buffers[4].address, buffers[4].size, 0)
    os.close(file)
    evil.buffers.clear()
    for region in range(1, 6):
        evil.sync(region, region)
    crowd.until(lambda: len(evil.answers) == 5)
    late = crowd.join(daemon.path)
    late.advise(random_pages(1, 50))
    crowd.until(lambda: len(late.statuses) == 50)
    crowd.until(daemon.settled)


def own_mappings(*names: str) -> list[tuple[int, int]]:
    """Return where mappings of this process with certain names are."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if any(line.endswith(name) for name in names):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            found.append((start, end - start))
    return found


def test_addresses_of_everything_else(daemon: DaemonProcess, crowd: Crowd, honest: list[Client]) -> None:
    """The stack, code, what the kernel maps into a process, devices, huge pages, shared memory, nothing at all."""
    spans = own_mappings("[stack]", "[vdso]", "[vvar]", "[vvar_vclock]", "[heap]", "libc.so.6")
    assert len(spans) > 5
    shared = mmap.mmap(-1, 16 * PAGE)
    shared.write(os.urandom(16 * PAGE))
    huge = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    huge.madvise(mmap.MADV_HUGEPAGE)
    huge.write(b"\x31" * (8 * MIB))
    for view in (shared, huge):
        spans.append((ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view)))
    with Path("/dev/zero").open("r+b") as zero:
        device = mmap.mmap(zero.fileno(), 4 * PAGE, flags=mmap.MAP_PRIVATE)
    device[:10] = b"0123456789"
    spans.append((ctypes.addressof(ctypes.c_char.from_buffer(device)), 4 * PAGE))
    evil = crowd.join(daemon.path)
    evil.swap = lambda run: np.full(int(run["pages"]), messages.MERGED, np.uint8)
    spans.append((1 << 43, 64 * PAGE))
    for number, (start, size) in enumerate(spans, 1):
        evil.send(messages.ADVISE, region=number, start=start, pages=size // PAGE, tracked=number % 2)
    crowd.until(lambda: daemon.stat()["tracked_bytes"] == 100 * PAGE + sum(size for _, size in spans))
    looks = int(daemon.ask("history")["looks"])
    crowd.until(lambda: int(daemon.ask("history")["looks"]) > looks + 10)
    crowd.until(daemon.settled)
    assert not evil.closed
    assert slots_are_right(honest[0])
    evil.close()
    crowd.clients.remove(evil)
    crowd.until(lambda: daemon.stat()["tracked_bytes"] == 100 * PAGE)


def test_an_address_that_this_processor_has_not_harms_who_says_it(
    daemon: DaemonProcess, crowd: Crowd, honest: list[Client]
) -> None:
    evil = crowd.join(daemon.path)
    evil.send(messages.ADVISE, region=1, start=1 << 55, pages=100, tracked=1)
    evil.send(messages.ADVISE, region=2, start=1 << 54, pages=100)
    crowd.until(lambda: daemon.stat()["tracked_bytes"] == 300 * PAGE)
    crowd.until(daemon.settled)


FLIPPER = """
import sys, threading, time
sys.path[:0] = [sys.argv[2]]
from tests.live.clients import Client, random_pages, ready
import numpy as np
client = Client(sys.argv[1])
one, other = random_pages(1, 60), random_pages(9, 60)
buffer = client.advise(one)
client.swap = lambda run: np.full(int(run["pages"]), int(sys.argv[3]), np.uint8)
print("ready", flush=True)
def flip():
    while True:
        buffer.pages[:] = other
        buffer.pages[:] = one
threading.Thread(target=flip, daemon=True).start()
while ready([client, 0], None) == [client] and not client.closed:
    client.handle()
"""


@pytest.mark.parametrize("status", [messages.DIFFERS, messages.MERGED])
def test_contents_that_never_rest_hold_nobody_up(daemon: DaemonProcess, crowd: Crowd, status: int) -> None:
    """A page that others have too, and that is another whenever one looks."""
    command = [sys.executable, "-c", FLIPPER, str(daemon.path), str(HERE.parents[1]), str(status)]
    flipper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert flipper.stdout
        flipper.stdout.readline()
        two = join_many(crowd, daemon, 2, random_pages(1, 60))
        crowd.until(lambda: all(len(set(honest_pages(client))) == 60 for client in two))
        assert slots_are_right(two[0])
        crowd.until(daemon.settled)
    finally:
        flipper.kill()
        flipper.communicate()


def honest_pages(client: Client) -> list[int]:
    """Return which pages of an honest client map the store now, by what it was asked for."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in lines if "memfd:pagefold" in line]
    buffer = client.buffers[1]
    return [at for at in range(buffer.count) if any(start <= buffer.address + at * PAGE < end for start, end in spans)]


# --- rude clients ---------------------------------------------------------------------------------------------------------------


def nonblocking(daemon: DaemonProcess) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.connect(str(daemon.path))
    made.setblocking(False)
    return made


def push(connection: socket.socket, packet: bytes, times: int) -> int:
    """Send a packet again and again without ever reading; return how often it went."""
    sent = 0
    for _ in range(times):
        try:
            connection.send(packet)
        except BlockingIOError:
            if not wait_writable(connection):
                break
            continue
        except OSError:
            break
        sent += 1
    return sent


def wait_writable(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    return bool(poll.poll(100))


def test_questions_without_listening(daemon: DaemonProcess, crowd: Crowd, honest: list[Client]) -> None:
    """It is not heard before it has taken the answers: they would pile up in the daemon."""
    before = daemon.resident()
    rude = [nonblocking(daemon) for _ in range(5)]
    question = control.pack({"verb": "stat"})[0]
    sent = sum(push(connection, question, 1500) for connection in rude)
    assert sent < 5 * 1500, "it took all of them"
    assert daemon.resident() - before < 16 * MIB
    assert daemon.stat()["ok"]
    for connection in rude:
        connection.close()
    crowd.until(lambda: daemon.descriptors().count("socket") == 3 + len(crowd.clients))


def test_a_client_that_asks_for_answers_and_never_reads(daemons: Start, crowd: Crowd) -> None:
    daemon = daemons(knobs={"run": 0})
    before = daemon.resident()
    rude = nonblocking(daemon)
    rude.setblocking(True)
    rude.send(messages.pack(messages.HELLO))
    rude.send(messages.pack(messages.ADVISE, region=1, start=ADDRESS, pages=1))
    assert push(rude, messages.pack(messages.SYNC, region=1), 100_000) < 100_000, "it was never given up"
    crowd.until(lambda: not daemon.stat()["clients"])
    assert daemon.resident() - before < 32 * MIB
    rude.close()


def test_a_client_that_never_reads_is_asked_no_more(daemons: Start, crowd: Crowd) -> None:
    daemon = daemons(patch={"pagefold.live.peer._PATIENCE": 0.3})
    deaf = Client(daemon.path)
    contents = random_pages(1, 1200)
    contents[::2] = 0
    for _ in range(3):
        deaf.advise(contents)
    join_many(crowd, daemon, 2, contents[:100])
    before = daemon.resident()
    crowd.until(lambda: merged(daemon) >= 100)
    crowd.until(daemon.settled)
    looks = int(daemon.ask("history")["looks"])
    crowd.until(lambda: int(daemon.ask("history")["looks"]) > looks + 20)
    assert daemon.resident() - before < 32 * MIB
    deaf.close()
    crowd.until(lambda: len(daemon.stat()["clients"]) == 2)
    assert all(buffer.right() for buffer in deaf.buffers.values())


def test_advice_and_its_end_by_the_thousands(daemon: DaemonProcess, crowd: Crowd, honest: list[Client]) -> None:
    flood = crowd.join(daemon.path)
    crowd.until(lambda: len(daemon.stat()["clients"]) == 3)
    crowd.until(lambda: daemon.descriptors().count("socket") == 6)
    before, descriptors = 0, daemon.descriptors()
    for turn in range(3):
        for number in range(1, 1001):
            flood.send(messages.ADVISE, region=number, start=ADDRESS + number * 8 * PAGE, pages=8)
        for number in range(1, 1001):
            flood.send(messages.UNADVISE, region=number)
        crowd.until(lambda: daemon.stat()["tracked_bytes"] == 100 * PAGE)
        if turn == 0:
            before = daemon.resident()
    assert daemon.resident() - before < 8 * MIB
    crowd.until(lambda: daemon.descriptors() == descriptors)
    assert not flood.closed


def test_descriptors_that_nobody_wants(daemon: DaemonProcess, crowd: Crowd, honest: list[Client]) -> None:
    crowd.until(lambda: daemon.descriptors().count("socket") == 5)
    before = daemon.descriptors()
    evil = Client(daemon.path)
    null = os.open("/dev/null", os.O_RDONLY)
    for _ in range(300):
        packet = messages.pack(messages.SYNC, region=1, token=1)
        evil.connection.sendmsg(
            [control.pack({"verb": "history"})[0]],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, np.full(200, null, np.int32).tobytes())],
        )
        if ready([evil], 1):
            evil.connection.recv(messages.MOST_BYTES)
        assert daemon.descriptors().count("/dev/null") == before.count("/dev/null")
    evil.connection.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, np.full(9, null, np.int32).tobytes())])
    os.close(null)
    crowd.clients.append(evil)
    assert dropped(crowd, evil)
    crowd.until(lambda: daemon.descriptors() == before)


def test_ten_thousand_connections(daemon: DaemonProcess, crowd: Crowd, honest: list[Client]) -> None:
    """Thousands at once, so that numbers of descriptors pass 1024, and a client still joins behind them."""
    crowd.until(lambda: daemon.descriptors().count("socket") == 5)
    before, memory = daemon.descriptors(), 0
    for turn in range(4):
        held = []
        for at in range(2500):
            one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            one.connect(str(daemon.path))
            held.append(one)
            if at % 500 == 0:
                crowd.pump()
        if turn == 0:
            late = crowd.join(daemon.path)
            late.advise(random_pages(1, 50))
            crowd.until(lambda: len(late.statuses) == 50)  # noqa: B023  (it was the last in the queue)
            assert merged(daemon) == 150
            late.unadvise(1).unmap()
            late.close()
            crowd.clients.remove(late)
        for one in held:
            one.close()
        crowd.until(lambda: daemon.descriptors() == before)
        memory = memory or daemon.resident()
    assert daemon.resident() - memory < 8 * MIB
    assert daemon.stat()["ok"]


def test_hundreds_of_agents(daemon: DaemonProcess, crowd: Crowd, honest: list[Client]) -> None:
    """Each has four descriptors in the daemon."""
    many = [crowd.join(daemon.path) for _ in range(300)]
    for client in many:
        client.advise(random_pages(4, 1))
    crowd.until(lambda: merged(daemon) == 100 + 300)
    assert daemon.counters()["pages_sharing"] == 50 + 298
    for client in many:
        client.buffers.popitem()[1].unmap()
        client.close()
        crowd.clients.remove(client)
    crowd.until(lambda: len(daemon.stat()["clients"]) == 2)


def test_a_daemon_without_descriptors_left(daemons: Start, crowd: Crowd) -> None:
    """Merging pauses, clients wait outside, and all goes on when there are some."""
    daemon = daemons()
    two = join_many(crowd, daemon, 2, random_pages(1, 30))
    crowd.until(lambda: merged(daemon) == 60)
    held = [nonblocking(daemon) for _ in range(50)]
    crowd.until(lambda: daemon.descriptors().count("socket") == 5 + 50)
    highest = max(int(link.name) for link in Path(f"/proc/{daemon.pid}/fd").iterdir())
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (highest + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    outside = [nonblocking(daemon) for _ in range(5)]
    for client in two:
        client.advise(random_pages(2, 5000))  # more than the extent there is can hold

    def says(what: str) -> bool:
        held[0].send(control.pack({"verb": "stat"})[0])
        assert ready([held[0]], 60)
        return any(
            what in note for note in json.loads(held[0].recv(messages.MOST_BYTES)[control.HEADER.size :])["notes"]
        )

    crowd.until(lambda: says("merging pauses"))
    assert says("could not connect")
    for one in [*held, *outside]:
        one.close()
    crowd.until(lambda: merged(daemon) == 60 + 10_000)


def test_a_process_that_became_another_program(daemon: DaemonProcess, crowd: Crowd, honest: list[Client]) -> None:
    """Its connection is open still, and its memory is not there."""
    script = (
        "import os, sys; sys.path[:0] = [sys.argv[2]]\n"
        "from tests.live.clients import Client, random_pages\n"
        "client = Client(sys.argv[1]); client.advise(random_pages(1, 50)); client.connection.set_inheritable(True)\n"
        "print('said', flush=True); sys.stdin.readline(); os.execv('/bin/sleep', ['sleep', '1000'])"
    )
    command = [sys.executable, "-c", script, str(daemon.path), str(HERE.parents[1])]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdin and other.stdout
        other.stdout.readline()
        crowd.until(lambda: daemon.stat()["tracked_bytes"] == 150 * PAGE)
        other.stdin.write(b"\n")
        other.stdin.flush()
        crowd.until(lambda: b"sleep" in Path(f"/proc/{other.pid}/cmdline").read_bytes())
        join_many(crowd, daemon, 1, random_pages(1, 50))
        crowd.until(lambda: merged(daemon) >= 150)
    finally:
        other.kill()
        other.communicate()
    crowd.until(lambda: len(daemon.stat()["clients"]) == 3)


def test_a_process_that_ended_and_left_its_connection_to_another(
    daemon: DaemonProcess, crowd: Crowd, honest: list[Client], workers: Callable[[Path], WorkerProcess]
) -> None:
    script = (
        "import os, sys, time; sys.path[:0] = [sys.argv[2]]\n"
        "from tests.live.clients import Client, random_pages\n"
        "client = Client(sys.argv[1]); client.advise(random_pages(1, 50))\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True); os._exit(0)\n"
        "os.close(0); os.close(1); time.sleep(1000)"
    )
    command = [sys.executable, "-c", script, str(daemon.path), str(HERE.parents[1])]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout
    child = int(other.stdout.readline())
    try:
        other.wait()
        crowd.until(lambda: len(daemon.stat()["clients"]) == 2)
        crowd.until(daemon.settled)
    finally:
        os.kill(child, signal.SIGKILL)
        other.stdout.close()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 20))])
def test_everything_at_once(daemons: Start, crowd: Crowd, seed: int) -> None:
    """Clients that join, lie, write, refuse, keep silent and die, in any order, and honest ones among them."""
    daemon = daemons(patch={"pagefold.live.peer._PATIENCE": 0.2}, knobs={"pages_to_scan": 500})
    chance = random.Random(seed)
    honest = join_many(crowd, daemon, 2, random_pages(1, 60))
    descriptors = 0
    for _ in range(60):
        act = chance.choice(["join", "join", "write", "die", "liar", "silent", "refuse", "unadvise", "knob", "sync"])
        others = [client for client in crowd.clients if client not in honest]
        if act == "join" or not others:
            made = crowd.join(daemon.path, windows_safe=chance.random() < 0.9)
            pages = random_pages(chance.randint(1, 3), 60)[chance.randint(0, 20) :]
            made.advise(pages, quiet=chance.random() < 0.2)
        client = chance.choice([client for client in crowd.clients if client not in honest])
        if act == "write":
            for buffer in (*client.buffers.values(), honest[0].buffers[1]):
                buffer.write(chance.randrange(buffer.count), chance.randrange(256))
        elif act == "die":
            client.close()
            crowd.clients.remove(client)
            assert all(buffer.right() for buffer in client.buffers.values())
        elif act == "liar":
            client.swap = lying(client, chance.randrange(messages.UNKNOWN))
        elif act == "silent":
            client.answering = False
        elif act == "refuse":
            refusing(client, messages.PINNED, {1, 2, 30})
        elif act == "unadvise" and client.buffers and not client.closed:
            assert client.unadvise(chance.choice(list(client.buffers))).right()
        elif act == "sync" and client.buffers and not client.closed:
            client.sync(chance.choice(list(client.buffers)))
        elif act == "knob":
            daemon.set(run=2)
            crowd.pump(0.01)
            daemon.set(run=1)
        for _ in range(3):
            crowd.pump(0.003)
        daemon.judge()
        descriptors = max(descriptors, len(daemon.descriptors()))
    for client in list(crowd.clients):
        if client not in honest:
            client.close()
            crowd.clients.remove(client)
    crowd.until(lambda: len(daemon.stat()["clients"]) == 2)
    crowd.until(lambda: daemon.settled() and daemon.judge()["elsewhere"] == 0)
    same = int((honest[0].buffers[1].expected == honest[1].buffers[1].expected).all(axis=1).sum())
    crowd.until(lambda: daemon.counters()["pages_sharing"] >= same - 1 and daemon.settled())


def lying(client: Client, status: int) -> Callable[[np.void], Status]:
    def lie(run: np.void) -> Any:
        if int(run["extent"]) == messages.PRIVATE:
            return client.plain_swap(run)
        return np.full(int(run["pages"]), status, np.uint8)

    return lie
