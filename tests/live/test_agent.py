"""Judge the agent without a daemon: regions, merging in one process and between forked ones, and that a program never notices it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.random  # now: in a child that is nobody, the folder of what it needs may be closed
import pytest
from tests.live.children import Child, in_child, wait_until

from pagefold.errors import PagefoldError, UsageError
from pagefold.live.agent import PAGE, Agent, AgentError, Library, library

ROOT = os.geteuid() == 0
CSRC = Path(__file__).parents[2] / "csrc"
LIBRARIES = Path(__file__).parents[2] / "src" / "pagefold" / "live"
kept: dict[str, Any] = {}  # in a child: what later calls of the test need


# --- what runs in children ---------------------------------------------------------------------------------------------


class Pages:
    """Private anonymous memory of whole pages, in a mapping of its own, with known contents."""

    def __init__(self, contents: np.ndarray[Any, Any]) -> None:
        self.expected = contents.copy()
        self.size = contents.nbytes
        reserve = mmap.mmap(-1, self.size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = np.frombuffer(reserve, np.uint8)
        self.start = whole.ctypes.data + PAGE
        libc = ctypes.CDLL(None)
        for guard in (self.start - PAGE, self.start + self.size):  # so that neighbours never join it
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
        self.bytes = whole[PAGE:-PAGE].reshape(-1, PAGE)
        self.bytes[:] = contents

    def intact(self) -> bool:
        """Compare page by page, so that the comparison takes no memory."""
        return all(mine.tobytes() == theirs.tobytes() for mine, theirs in zip(self.bytes, self.expected, strict=True))

    def write(self, page: int, value: int) -> None:
        self.bytes[page, 100] = self.expected[page, 100] = value

    def mappings(self) -> set[tuple[str, ...]]:
        """Return permissions, offset, device, inode and name of its mappings; how many there are is the kernel's affair."""
        found = set()
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, *kind = line.split()
            low, high = (int(end, 16) for end in span.split("-"))
            if low < self.start + self.size and high > self.start:
                found.add(tuple(kind))
        return found


def contents(pages: int, seed: int = 1, zeros: int = 0) -> np.ndarray[Any, Any]:
    """Return pages that all differ, the last ones zeros."""
    made = np.random.default_rng(seed).integers(1, 256, (pages, PAGE), np.uint8)
    made[pages - zeros :] = 0
    return made


def started(socket_path: str = "") -> Agent:
    agent = Agent()
    agent.start(socket_path)
    return agent


def safe() -> bool:
    return bool(started().state().windows_safe)


@pytest.fixture(scope="module")
def windows() -> None:
    """For tests that need windows."""
    if not in_child(safe):
        pytest.skip("userfaultfd windows are not permitted here")


def threads() -> dict[str, int]:
    """Return the threads of this process that are the agent's: name to number."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            name = (task / "comm").read_text().strip()
            if name.startswith("pagefold"):
                found[name] = int(task.name)
    return found


def descriptors(thread: int | None = None) -> dict[int, str]:
    found = {}
    folder = Path(f"/proc/self/task/{thread}/fd" if thread else "/proc/thread-self/fd")
    for link in folder.iterdir():
        with contextlib.suppress(OSError):
            found[int(link.name)] = str(link.readlink())
    return found


def pss(*memory: Pages) -> int:
    """Return the proportional set size of this memory in bytes. (Of the whole process it changes with what others load.)"""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(end, 16) for end in match.groups())
            inside = any(low < one.start + one.size and high > one.start for one in memory)
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


# --- starting and ending -----------------------------------------------------------------------------------------------


def start_and_stop() -> None:
    before, tasks = descriptors(), len(list(Path("/proc/self/task").iterdir()))
    agent = Agent()
    for _ in range(3):
        agent.start()
        agent.start()
        assert set(threads()) == {"pagefold"}
        assert agent.state().started
        agent.stop()
        agent.stop()
        wait_until(lambda: not threads(), "the kernel to have done with a thread that was joined")
        assert not agent.state().started
    assert len(list(Path("/proc/self/task").iterdir())) == tasks
    assert descriptors() == before


def test_it_starts_and_stops_and_leaves_nothing() -> None:
    in_child(start_and_stop)


def hygiene() -> None:
    before = descriptors()
    agent = started()
    number = threads()["pagefold"]
    status = Path(f"/proc/self/task/{number}/status").read_text()
    blocked = int(re.search(r"^SigBlk:\s+(\w+)", status, re.M)[1], 16)  # type: ignore[index]
    for number_of_signal in range(1, 65):
        of_the_c_library = number_of_signal in (32, 33)  # setuid() in all threads, pthread_cancel
        catchable = number_of_signal not in (signal.SIGKILL, signal.SIGSTOP)
        if catchable:
            assert bool(blocked >> (number_of_signal - 1) & 1) != of_the_c_library, number_of_signal
    assert descriptors() == before, "what the agent opens is not the program's"
    theirs = descriptors(number)
    assert not [name for name in theirs.values() if name.startswith(("socket:", "pipe:"))], (
        "nothing of ours is held open there"
    )
    assert theirs[0] == theirs[1] == theirs[2] == "/dev/null"
    agent.stop()


def test_its_thread_takes_no_signal_and_shares_no_descriptor() -> None:
    in_child(hygiene)


def pipe_ends() -> None:
    """Whoever waits for the end of a pipe must not wait for the agent."""
    reader, writer = os.pipe()
    agent = started()
    os.close(writer)
    assert os.read(reader, 1) == b""
    agent.stop()


def test_it_keeps_no_pipe_of_the_program_open() -> None:
    in_child(pipe_ends)


def refusals() -> None:
    agent = Agent()
    page = Pages(contents(4))
    for call in (lambda: agent.advise(page.start, page.size), lambda: agent.unadvise(1), lambda: agent.merge(1)):
        with pytest.raises(PagefoldError):
            call()
    with pytest.raises(AgentError, match="not started"):
        agent.advise(page.start, page.size)
    agent.start()
    for start, size in ((page.start + 1, PAGE), (page.start, 100), (page.start, 0), (2**64 - PAGE, 2 * PAGE)):
        with pytest.raises(UsageError, match="whole pages"):
            agent.advise(start, size)
    region = agent.advise(page.start + PAGE, PAGE)
    assert region > 0
    for start, size in ((page.start, 4 * PAGE), (page.start + PAGE, PAGE), (page.start, 2 * PAGE)):
        with pytest.raises(AgentError, match="advised already"):
            agent.advise(start, size)
    agent.merge(region)
    shared = mmap.mmap(-1, PAGE)
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE)
        private = mmap.mmap(file.fileno(), PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    for memory in (shared, private):
        with pytest.raises(AgentError, match="cannot be merged") as caught:
            agent.advise(np.frombuffer(memory, np.uint8).ctypes.data, PAGE)
        assert caught.value.code == errno.EOPNOTSUPP
    for gone in (99, 0, -1, 2**62):
        for call in (agent.unadvise, agent.forget, agent.discard, agent.merge):
            with pytest.raises(UsageError, match="no region"):
                call(gone)
    with pytest.raises(UsageError, match="107 bytes"):
        agent.start("x" * 200)
    assert agent.unadvise(region) == 0
    with pytest.raises(UsageError, match="no region"):
        agent.unadvise(region)
    assert page.intact()


def test_what_cannot_be_is_said_with_a_remedy() -> None:
    in_child(refusals)


def test_the_library_that_is_loaded_is_built_from_these_sources() -> None:
    done = subprocess.run(["make", "-q", "-C", str(CSRC)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, "csrc changed since: `make agent`"


# --- merging in one process ----------------------------------------------------------------------------------------------


def merge_two() -> None:
    agent = started()
    data = contents(700, zeros=100)
    data[200:240] = 7  # the same page many times
    first, second = Pages(data), Pages(data)
    before = [first.mappings(), second.mappings()]
    regions = [agent.advise(pages.start, pages.size, quietly=True) for pages in (first, second)]
    one = agent.merge(regions[0])
    assert not one.through_daemon
    assert one.by_name() == {"merged": 140, "unknown": 560}
    assert (one.zero_pages, one.saved_bytes) == (100, 139 * PAGE)
    two = agent.merge(regions[1])
    assert two.by_name() == {"merged": 700}
    assert two.saved_bytes == 700 * PAGE  # its own go, 560 slots come, and 560 of the first go
    assert first.intact()
    assert second.intact()
    assert agent.merge(regions[0]).by_name() == {"already": 600, "absent": 100}
    first.write(3, 1)
    first.write(230, 2)
    first.write(650, 3)
    again = agent.merge(regions[0]).by_name()
    assert again == {"already": 598, "broken": 2, "absent": 99, "unknown": 1}
    assert first.intact()
    assert second.intact()
    for pages, region, mappings in zip((first, second), regions, before, strict=True):
        assert agent.unadvise(region) == 0
        assert pages.intact()
        assert pages.mappings() == mappings, "as if nothing had ever happened"
    state = agent.state()
    assert state.regions == 0
    assert state.by_status[0] == 1400
    agent.stop()
    assert "pagefold-embedded" not in Path("/proc/self/maps").read_text()


def test_equal_pages_of_one_process_are_merged_and_given_back(windows: None) -> None:
    in_child(merge_two)


def exact_savings() -> tuple[int, int]:
    agent = started()
    data = contents(2000, zeros=300)
    both = [Pages(data), Pages(data), Pages(contents(64, 2)), Pages(contents(64, 2))]
    regions = [agent.advise(pages.start, pages.size) for pages in both]
    for region in regions[2:]:
        agent.merge(region)  # what the agent needs for itself, it has after this
    assert all(pages.intact() for pages in both)
    before = pss(*both)
    saved = sum(agent.merge(region).saved_bytes for region in regions[:2])
    assert all(pages.intact() for pages in both)
    return saved, before - pss(*both)


def test_what_is_said_to_be_saved_is_what_the_kernel_counts(windows: None) -> None:
    said, fell = in_child(exact_savings)
    assert said == (2 * 300 + 1700) * PAGE
    assert said == fell


def merge_while_writing() -> int:
    """Threads write all pages all the time, each its own byte; what they wrote is what they find."""
    agent = started()
    data = contents(256)
    data[128:] = data[:128]
    pages = Pages(data)
    region = agent.advise(pages.start, pages.size)
    stop = threading.Event()
    wrong: list[int] = []

    def writer(lane: int) -> None:
        mine = np.zeros(pages.bytes.shape[0], np.uint8)
        mine[:] = pages.bytes[:, lane]
        turn = 0
        while not stop.is_set():
            turn += 1
            for page in range(lane % 7, len(mine), 7):
                if pages.bytes[page, lane] != mine[page]:
                    wrong.append(page)
                mine[page] = pages.bytes[page, lane] = (turn * 31 + page) % 256

    writers = [threading.Thread(target=writer, args=(lane,)) for lane in range(3)]
    for thread in writers:
        thread.start()
    for _ in range(30):
        agent.merge(region)
        assert agent.unadvise(region) >= 0
        region = agent.advise(pages.start, pages.size)
    stop.set()
    for thread in writers:
        thread.join()
    return len(wrong)


def test_threads_that_write_lose_nothing(windows: None) -> None:
    assert in_child(merge_while_writing) == 0


def unmapped_in_the_middle() -> None:
    """A region whose owner breaks the promise and unmaps it, or forgets it while it is merged."""
    agent = started()
    data = contents(3000)
    one, two = Pages(data), Pages(data)
    regions = [agent.advise(pages.start, pages.size) for pages in (one, two)]
    agent.merge(regions[0])
    merging = threading.Thread(target=lambda: agent.library.merge(regions[1]))
    merging.start()
    agent.forget(regions[0])
    agent.forget(regions[1])
    merging.join()
    assert one.intact()
    assert two.intact()
    third = Pages(data)
    region = agent.advise(third.start, third.size)
    libc = ctypes.CDLL(None)
    assert libc.munmap(ctypes.c_void_p(third.start), ctypes.c_size_t(third.size // 2)) == 0
    report = agent.merge(region)
    assert report.pages == 3000
    agent.forget(region)


def test_memory_that_vanishes_is_no_crash(windows: None) -> None:
    in_child(unmapped_in_the_middle)


def discard() -> None:
    agent = started()
    data = contents(300)
    one, two = Pages(data), Pages(data)
    before = one.mappings()
    regions = [agent.advise(pages.start, pages.size) for pages in (one, two)]
    for region in regions:
        agent.merge(region)
    one.bytes[7] = 5
    assert agent.discard(regions[0]) == 0
    assert not one.bytes.any(), "fresh memory"
    one.bytes[:] = one.expected
    assert one.intact()
    assert two.intact()
    region = agent.advise(one.start, one.size)
    assert agent.merge(region).by_name() == {"merged": 300}
    assert agent.unadvise(region) == 0
    assert one.mappings() == before
    wait_until(lambda: agent.state().regions == 1, "the discarded region to end")


def test_discarded_memory_is_fresh(windows: None) -> None:
    in_child(discard)


def without_windows() -> None:
    """As a user who may not open userfaultfd; nobody writes meanwhile, so that plain swaps are allowed."""
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as after exec, /proc/self is ours again
    agent = started()
    assert not agent.state().windows_safe
    assert b"userfaultfd" in agent.state().why
    data = contents(200, zeros=20)
    one, two = Pages(data), Pages(data)
    before = one.mappings()
    regions = [agent.advise(pages.start, pages.size) for pages in (one, two)]
    assert agent.merge(regions[0]).by_name() == {"merged": 20, "unknown": 180}
    assert agent.merge(regions[1]).by_name() == {"merged": 200}
    assert agent.merge(regions[0]).by_name() == {"merged": 180, "absent": 20}
    assert one.intact()
    assert two.intact()
    assert agent.unadvise(regions[0]) == 180, "not without a window: others may be writing"
    assert one.intact()
    assert "pagefold-embedded" in str(one.mappings())
    assert agent.library.unadvise_plainly(regions[1]) == 0
    assert two.intact()
    assert two.mappings() == before


@pytest.mark.skipif(not ROOT, reason="needs root to become nobody")
def test_without_windows_pages_are_swapped_plainly_and_the_reason_is_said() -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("everybody may open userfaultfd here")
    in_child(without_windows)


# --- forks -----------------------------------------------------------------------------------------------------------------


def forked(body: Callable[[], object]) -> int:
    """Run something in a forked child; its exit code, 0 if it did not raise."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def family() -> None:
    agent = started()
    data = contents(300)
    mine = Pages(data)
    region = agent.advise(mine.start, mine.size)
    twin = Pages(data)
    twin_region = agent.advise(twin.start, twin.size)
    agent.merge(region)
    agent.merge(twin_region)

    def child() -> None:
        assert not agent.state().started
        assert agent.state().regions == 2, "what was advised stays so"
        assert not threads()
        with pytest.raises(AgentError, match="not started"):
            agent.advise(mine.start, PAGE)
        loaded = Pages(data)  # by itself, after the fork
        agent.start()
        own = agent.advise(loaded.start, loaded.size)
        report = agent.merge(own)
        assert report.by_name() == {"merged": 300}, report.by_name()
        assert report.saved_bytes == 300 * PAGE, "the parent's slots served"
        loaded.write(5, 9)
        twin.write(6, 9)
        assert loaded.intact()
        assert mine.intact()
        assert twin.intact()

        def grandchild() -> None:
            third = Pages(data)
            agent.start()
            assert agent.merge(agent.advise(third.start, third.size)).by_name() == {"merged": 300}
            assert third.intact()
            assert loaded.intact()

        assert forked(grandchild) == 0
        assert agent.unadvise(own) == 0
        assert loaded.intact()

    assert forked(child) == 0
    assert mine.intact()
    assert twin.intact()
    assert agent.unadvise(region) == 0


def test_children_merge_with_what_their_parent_has(windows: None) -> None:
    in_child(family)


def load(faults: bool = False) -> None:
    """Load the library before the fork: that is what makes a family."""
    kept["library"] = Library(LIBRARIES / "_agent_faults.so") if faults else library()


def own_pages(seed: int) -> dict[str, int]:
    kept["agent"] = agent = Agent(kept["library"])
    agent.start()
    kept["pages"] = pages = Pages(contents(128, seed))
    kept["region"] = agent.advise(pages.start, pages.size)
    return merge_own()


def merge_own() -> dict[str, int]:
    report = kept["agent"].merge(kept["region"])
    assert kept["pages"].intact()
    return {**report.by_name(), "saved": report.saved_bytes // PAGE}


def siblings() -> list[dict[str, int]]:
    load()
    with Child() as first, Child() as second, Child() as third:
        said = [first.do(own_pages, 5), second.do(own_pages, 5), first.do(merge_own), third.do(own_pages, 5)]
        first.kill()
        second.kill()
        assert third.do(merge_own) == {"already": 128, "saved": 0}
        with Child() as fourth:  # what the dead had is still open in the third
            return [*said, fourth.do(own_pages, 5)]


def test_siblings_merge_and_survive_one_another(windows: None) -> None:
    said = in_child(siblings)
    assert said == [
        {"unknown": 128, "saved": 0},
        {"merged": 128, "saved": 0},  # its pages go, as many slots come
        {"merged": 128, "saved": 128},
        {"merged": 128, "saved": 128},
        {"merged": 128, "saved": 128},
    ]


def orphan() -> list[dict[str, int]]:
    """Everyone who had the store ends; who comes after begins a new one."""
    load()
    with Child() as first, Child() as second:
        first.do(own_pages, 6)
        second.do(own_pages, 6)
    with Child() as third, Child() as fourth:
        return [third.do(own_pages, 6), fourth.do(own_pages, 6)]


def test_a_store_that_nobody_has_any_more_is_forgotten(windows: None) -> None:
    assert in_child(orphan) == [{"unknown": 128, "saved": 0}, {"merged": 128, "saved": 0}]


def die_in_the_store(point: str) -> None:
    kept["library"].functions.pf_set_fault(point.encode())
    own_pages(7)


def robbed(point: str) -> list[str]:
    """A sibling dies at a point of the store, most of them with the family's lock held; the others go on."""
    load(faults=True)
    statuses = []
    with Child() as first, Child() as second, Child() as third:
        first.do(own_pages, 7)
        second.begin(die_in_the_store, point)
        assert second.wait() == -signal.SIGKILL
        statuses.append(third.do(own_pages, 7))
        for _ in range(3):  # slots that only the dead one had are not to be had any more; then it takes a round longer
            statuses += [first.do(merge_own), third.do(merge_own)]
    assert statuses[-1] == statuses[-2] == {"already": 128, "saved": 0}
    return sorted({name for one in statuses for name in one})


@pytest.mark.parametrize("point", range(1, 6))
def test_a_sibling_that_dies_in_the_store_harms_nobody(point: int, windows: None) -> None:
    assert set(in_child(robbed, f"store:{point}")) <= {"already", "merged", "unknown", "saved"}


def fork_while_merging() -> int:
    agent = started()
    data = contents(400)
    pages = [Pages(data) for _ in range(2)]
    stop = threading.Event()

    def merge() -> None:
        while not stop.is_set():
            regions = [agent.advise(one.start, one.size) for one in pages]
            for region in regions:
                agent.merge(region)
            for region in regions:
                agent.unadvise(region)

    thread = threading.Thread(target=merge)
    thread.start()
    bad = 0
    for _ in range(60):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if all(one.intact() for one in pages) else 1)
        bad += os.waitpid(pid, 0)[1] != 0
    stop.set()
    thread.join()
    assert agent.state().forks >= 60
    return bad


def test_forks_in_the_middle_see_everything(windows: None) -> None:
    assert in_child(fork_while_merging) == 0


def bare_clone() -> None:
    """A child that the C library knows nothing of: it is told so, and can end."""
    agent = started()
    pages = Pages(contents(10))
    region = agent.advise(pages.start, pages.size)
    libc = ctypes.CDLL(None)
    pid = libc.syscall(57 if os.uname().machine == "x86_64" else -1)  # fork(2) itself
    if pid == 0:
        codes = [agent.library.advise(pages.start, PAGE), agent.library.merge(region)[0], agent.library.start()]
        os._exit(0 if codes == [-errno.ECHILD] * 3 and pages.intact() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="fork(2) has no number elsewhere")
def test_a_bare_clone_is_told_that_nothing_can_be_done() -> None:
    in_child(bare_clone)


# --- a program that goes about its business -----------------------------------------------------------------------------


@contextlib.contextmanager
def always_merging(agent: Agent) -> Iterator[list[Pages]]:
    """Merge and give back in a thread all the while."""
    data = contents(300)
    pages = [Pages(data) for _ in range(2)]
    stop = threading.Event()
    rounds = [0]

    def merge() -> None:
        while not stop.is_set():
            regions = [agent.advise(one.start, one.size) for one in pages]
            for region in regions:
                agent.merge(region)
            for region in regions:
                agent.unadvise(region)
            rounds[0] += 1

    thread = threading.Thread(target=merge)
    thread.start()
    wait_until(lambda: rounds[0], "a first round")
    try:
        yield pages
    finally:
        before = rounds[0]
        wait_until(lambda: rounds[0] > before + 1, "two more rounds")
        stop.set()
        thread.join()
        assert all(one.intact() for one in pages)


def close_everything() -> None:
    """Daemons and shells close all descriptors they can think of, whoever has opened them."""
    channel = max(descriptors())
    agent = started()
    with always_merging(agent) as pages:
        for _ in range(20):
            os.closerange(channel + 1, 4096)
            ctypes.CDLL(None).close_range(ctypes.c_uint(channel + 1), ctypes.c_uint(2**32 - 1), ctypes.c_int(0))
            assert all(one.intact() for one in pages)


def test_a_program_may_close_all_descriptors(windows: None) -> None:
    in_child(close_everything)


def many_signals() -> None:
    agent = started()
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(threading.get_native_id()))
    sent = 0
    with always_merging(agent):
        for _ in range(300):
            os.kill(os.getpid(), signal.SIGUSR1)
            sent += 1
        wait_until(lambda: seen, "a signal")
    assert set(seen) == {os.getpid()}  # the main thread


def test_signals_go_to_the_program(windows: None) -> None:
    in_child(many_signals)


def change_user() -> None:
    agent = started()
    with always_merging(agent):
        os.setresgid(65534, 65534, 65534)  # the C library has every thread do it, and waits for each
        os.setresuid(65534, 65534, 65534)
    for number in threads().values():
        assert re.search(r"^Uid:\t65534\t65534\t65534", Path(f"/proc/self/task/{number}/status").read_text(), re.M)


@pytest.mark.skipif(not ROOT, reason="needs root to become nobody")
def test_a_threaded_program_may_change_its_user(windows: None) -> None:
    in_child(change_user)


def become_another_program(command: list[str]) -> None:
    agent = started()
    data = contents(2000)
    pages = [Pages(data) for _ in range(2)]
    regions = [agent.advise(one.start, one.size) for one in pages]
    threading.Thread(target=lambda: [agent.merge(region) for region in regions]).start()
    os.execv(command[0], command)


def test_exec_in_the_middle(windows: None) -> None:
    with Child() as child:
        child.begin(become_another_program, [sys.executable, "-c", "raise SystemExit(42)"])
        assert child.wait() == 42


def subprocesses() -> None:
    agent = started()
    with always_merging(agent):
        for _ in range(10):
            done = subprocess.run(
                [sys.executable, "-S", "-c", "print(6 * 7)"], capture_output=True, text=True, check=True
            )
            assert done.stdout == "42\n"
        assert os.system("exit 3") == 3 << 8
        pid = os.posix_spawn("/bin/true", ["true"], {})
        assert os.waitpid(pid, 0)[1] == 0


def test_subprocesses_work(windows: None) -> None:
    in_child(subprocesses)


def few_descriptors() -> None:
    pages = Pages(contents(10))
    agent = Agent()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    agent.start()
    assert not agent.state().windows_safe
    region = agent.library.advise(pages.start, pages.size)
    if region > 0:
        agent.merge(region)
        agent.unadvise(region)
    assert pages.intact()
    agent.stop()


def test_no_descriptors_left_is_no_crash() -> None:
    with Child() as child:
        child.do(load)
        child.do(few_descriptors)


def at_the_limit_of_mappings() -> dict[str, int]:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    agent = started()
    data = contents(64)
    data[1::2] = data[0]  # isolated pages
    pages = [Pages(data) for _ in range(2)]
    size = (limit + 100) * PAGE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    base = libc.mmap(None, ctypes.c_size_t(size), 0, 0x4022, -1, ctypes.c_long(0))
    for page in range(0, limit + 100, 2):
        if libc.mprotect(ctypes.c_void_p(base + page * PAGE), ctypes.c_size_t(PAGE), 1):
            break
    else:
        raise AssertionError("no limit was met")
    report: dict[str, int] = {}
    for one in pages:
        region = agent.library.advise(one.start, one.size)
        if region > 0:
            for name, count in agent.merge(region).by_name().items():
                report[name] = report.get(name, 0) + count
    assert all(one.intact() for one in pages)
    libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(size))
    return report


def test_at_the_limit_of_mappings_nothing_is_merged_and_nothing_breaks(windows: None) -> None:
    report = in_child(at_the_limit_of_mappings)
    assert not report.get("merged")


def idle() -> None:
    agent = started()
    data = contents(10)
    pages = Pages(data)
    agent.merge(agent.advise(pages.start, pages.size))
    number = threads()["pagefold"]

    def switches() -> int:
        text = Path(f"/proc/self/task/{number}/status").read_text()
        return sum(int(count) for count in re.findall(r"ctxt_switches:\s+(\d+)", text))

    before = -1
    while before != (now := switches()):
        before = now
        threading.Event().wait(0.2)
    agent.state()
    threading.Event().wait(1.0)
    assert switches() == before, "it polls"


def test_it_does_nothing_while_there_is_nothing_to_do() -> None:
    in_child(idle)


def from_many_threads() -> None:
    """All functions at once, from threads; each has its own pages."""
    agent = started()
    data = contents(40)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        chance = np.random.default_rng(seed)
        try:
            for _ in range(40):
                pages = Pages(data)
                region = agent.advise(pages.start, pages.size, quietly=bool(chance.integers(2)))
                if chance.integers(4):
                    agent.merge(region)
                agent.state()
                end = [agent.unadvise, agent.forget, agent.discard][chance.integers(3)]
                end(region)
                if end != agent.discard:
                    assert pages.intact()
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    wait_until(lambda: agent.state().regions == 0, "regions that end late")


def test_all_functions_from_many_threads(windows: None) -> None:
    in_child(from_many_threads)


def stop_in_the_middle() -> None:
    """Jobs that wait are told; regions stay, and can be ended later."""
    agent = started()
    data = contents(4000)
    pages = [Pages(data) for _ in range(2)]
    regions = [agent.advise(one.start, one.size) for one in pages]
    codes: list[int] = []
    merging = [threading.Thread(target=lambda r=region: codes.append(agent.library.merge(r)[0])) for region in regions]
    for thread in merging:
        thread.start()
    agent.stop()
    for thread in merging:
        thread.join()
    assert set(codes) <= {0, -errno.ECANCELED, -errno.ESRCH}
    assert all(one.intact() for one in pages)
    agent.start()
    assert agent.state().regions == 2
    for region in regions:
        agent.merge(region)
        assert agent.unadvise(region) == 0
    assert all(one.intact() for one in pages)


def test_stopping_in_the_middle_of_a_merge(windows: None) -> None:
    in_child(stop_in_the_middle)


def memory_of_regions_that_went() -> None:
    """The store's memory goes when no page maps it any more."""
    agent = started()
    for seed in range(8):
        data = contents(1000, seed)
        pages = [Pages(data) for _ in range(2)]
        regions = [agent.advise(one.start, one.size) for one in pages]
        for region in regions:
            agent.merge(region)
        files = store_files()
        assert files
        for region in regions:
            agent.unadvise(region)
        assert not store_files(), "the last page that mapped it is gone"


def store_files() -> list[str]:
    return [name for name in descriptors(threads()["pagefold"]).values() if "pagefold-embedded" in name]


def test_the_embedded_store_gives_memory_back(windows: None) -> None:
    in_child(memory_of_regions_that_went)
