"""Be the far side of a real-kernel host: drive real processes and the kernel's merger, told what to do over a pipe.

Standard library and ctypes only, because it travels: this folder runs beside us on this machine's kernel, or alone in a guest. Must not
know who asks, nor what is expected: it does, and says what it sees. One JSON request a line on standard input, one JSON answer a line on
standard output; it ends, and all its processes with it, when its standard input does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calls import (
    BASE,
    PFN,
    PRESENT,
    SWAPPED,
    SYSCALLS,
    TOP,
    attempt,
    libc,
    map_pages,
    nodemask,
    pagemap,
    system,
    unmap_pages,
    where,
    write_file,
)
from merger import SYSFS, Merger
from worker import MPOL_PREFERRED, Worker

MEMORY = Path("/sys/devices/system/memory")
NODES = Path("/sys/devices/system/node")
BALANCING = Path("/proc/sys/kernel/numa_balancing")
IO_URING = Path("/proc/sys/kernel/io_uring_disabled")
OFFLINE_PATIENCE = 10.0  # seconds
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_GET_MEMORY_MERGE = 1, 36, 68


class Driven:
    """What the driver knows of one process."""

    def __init__(self, pid: int, channel: socket.socket, areas: list[tuple[int, int]], merge_any: bool) -> None:
        self.pid = pid
        self.channel = channel
        self.areas = areas  # (page number, pages)
        self.merge_any = merge_any

    def ask(self, *request: Any) -> Any:
        """Let the process do something; return its answer or raise its OSError."""
        self.channel.send(json.dumps(request).encode())
        return self.answer()

    def answer(self) -> Any:
        """Wait for the answer."""
        text = self.channel.recv(65536)
        if not text:
            raise OSError(errno.ESRCH, f"process {self.pid} died")
        answer = json.loads(text)
        if "errno" in answer:
            raise OSError(answer["errno"], answer["text"])
        return answer["ok"]


class Driver:
    """Processes by number, the merger's knobs and scans, and what can be seen."""

    def __init__(self) -> None:
        self.driven: dict[int, Driven] = {}
        self.merger = Merger()
        self.zero_pfn = zero_pfn()
        self.taken: list[Path] = []  # memory blocks that are offline

    # --- processes ---

    def do_hello(self) -> dict[str, Any]:
        """Say what this kernel is and has; ESRCH if its merger cannot be seen."""
        self.merger.find_ksmd()
        features = ["merge_any"] if libc.prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) >= 0 else []
        if IO_URING.exists() and IO_URING.read_text().strip() == "0":
            features.append("pin")
        features += [knob.name for knob in SYSFS.iterdir()]
        return {
            "release": platform.release(),
            "nodes": parse_ranges((NODES / "has_memory").read_text()),
            "balancing": BALANCING.exists() and BALANCING.read_text().strip() != "0",
            "features": sorted(features),
        }

    def do_pids(self) -> list[int]:
        """Return our own pid and those of the living processes."""
        return [os.getpid(), *(process.pid for process in self.driven.values())]

    def do_spawn(self, number: int) -> None:
        """Start a process: a fork of ourselves that wants its memory on node 0."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            for process in self.driven.values():
                process.channel.close()
            ours.close()
            os.close(0)
            os.close(1)
            if "set_mempolicy" in SYSCALLS:
                system("set_mempolicy", MPOL_PREFERRED, nodemask(0), 1024)
            Worker(theirs).serve()
        theirs.close()
        self.driven[number] = Driven(pid, ours, [], False)

    def do_fork(self, parent: int, number: int) -> None:
        """Let a process fork."""
        process = self.driven[parent]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process.channel.send(b'["fork"]')
        socket.send_fds(process.channel, [b"!"], [theirs.fileno()])
        theirs.close()
        self.driven[number] = Driven(process.answer(), ours, list(process.areas), process.merge_any)

    def do_exit(self, number: int) -> None:
        """End a process, and wait until its memory is gone: its socket is closed after that."""
        process = self.driven.pop(number)
        with process.channel as channel, contextlib.suppress(ConnectionError):  # one that died is gone already
            channel.shutdown(socket.SHUT_WR)
            while channel.recv(1):
                pass

    def do_worker(self, number: int, verb: str, *arguments: Any) -> Any:
        """Let a process do something to its own memory."""
        process = self.driven[number]
        answer = process.ask(verb, *arguments)
        if verb == "mmap":
            process.areas.append((arguments[0], arguments[1]))
        elif verb == "merge_any":
            process.merge_any = arguments[0]
        return answer

    # --- knobs and scans ---

    def clear(self) -> None:
        """End all processes and unmerge everything."""
        for number in list(self.driven):
            self.do_exit(number)
        self.merger.clear()

    def do_clear(self) -> None:
        """End what a scenario began."""
        self.clear()

    def do_reset(self, knobs: dict[str, int | str]) -> None:
        """Begin afresh with these knobs."""
        self.clear()
        self.put_back(list(self.taken))
        self.merger.reset(knobs)

    def do_set(self, name: str, value: int | str) -> None:
        """Write a knob; the kernel judges the value."""
        self.merger.set(name, value)

    def do_get(self, name: str) -> int | str:
        """Read a knob or counter."""
        return self.merger.get(name)

    def do_scan(self, passes: int) -> int:
        """Let that many full scans through; return how many there were."""
        for process in self.driven.values():
            if process.merge_any:
                keep_out(process)
        return self.merger.scan(passes)

    # --- what can be seen ---

    def do_observe(self, counters: list[str]) -> dict[str, Any]:
        """Return counters, each process's own, and of every page that is there: process, page number, node, frame."""
        stats, pages = {}, []
        for number, process in self.driven.items():
            stat = Path(f"/proc/{process.pid}/ksm_stat")
            lines = stat.read_text().splitlines() if stat.exists() else []  # kernels before 6.1 have none
            stats[number] = {
                words[0]: int(words[1]) for words in map(str.split, lines) if words[1].lstrip("-").isdigit()
            }
            pages += [(number, *page) for page in self.pages_of(process)]
        return {
            "counters": {name: self.merger.get(name) for name in counters if (SYSFS / name).exists()},
            "stats": stats,
            "pages": pages,
        }

    def pages_of(self, process: Driven) -> list[tuple[int, int, int]]:
        """Return (page number, node, frame) of the pages that are there; node -1 for the zero page, -2 for swap."""
        found, asked = [], []
        for vpn, pages in process.areas:
            for index, entry in enumerate(pagemap(process.pid, vpn, pages)):
                if entry & SWAPPED:
                    found.append((vpn + index, -2, 0))
                elif entry & PRESENT and entry & PFN == self.zero_pfn:
                    found.append((vpn + index, -1, 0))
                elif entry & PRESENT:
                    asked.append((vpn + index, entry & PFN))
        count = len(asked)
        addresses = (ctypes.c_void_p * count)(*(where(vpn) for vpn, _ in asked))
        status = (ctypes.c_int * count)()
        if count:
            system("move_pages", process.pid, count, addresses, None, status, 0)
        return found + [(vpn, status[i], pfn) for i, (vpn, pfn) in enumerate(asked)]

    # --- memory of nodes ---

    def do_offline(self, node: int) -> None:
        """Take all memory of a node away; if a part refuses, all of it is put back."""
        try:
            for block in blocks(node):
                with alarm(OFFLINE_PATIENCE):  # a kernel tries for ever to move what cannot be moved
                    write_file(block / "state", "offline")
                self.taken.append(block)
        except OSError:
            self.put_back(blocks(node))
            raise

    def do_online(self, node: int) -> None:
        """Put the memory of a node back."""
        self.put_back(blocks(node))

    def put_back(self, memory: list[Path]) -> None:
        """Put those of these blocks back that were taken away."""
        for block in [block for block in self.taken if block in memory]:
            write_file(block / "state", "online_movable")
            self.taken.remove(block)


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Let what is done inside fail with EBUSY if it takes longer."""

    def give_up(*_: object) -> None:
        raise OSError(errno.EBUSY, f"not done within {seconds:g} seconds")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def blocks(node: int) -> list[Path]:
    """Return the folders of a node's memory blocks."""
    found = sorted((NODES / f"node{node}").glob("memory[0-9]*"), key=lambda path: int(path.name[6:]))
    if not found:
        raise OSError(errno.ENODEV, f"node {node} has no memory blocks")
    return [MEMORY / path.name for path in found]


def zero_pfn() -> int:
    """Return the frame of the kernel's zero page: that of a page that was only read."""
    map_pages(0, 1)
    ctypes.string_at(where(0), 1)
    (entry,) = pagemap("self", 0, 1)
    unmap_pages(0, 1)
    return entry & PFN


def keep_out(process: Driven) -> None:
    """Make sure that of a process that merges anything only our areas are looked at; asking may itself make new areas."""
    for _ in range(10):
        process.ask("tidy")
        start = 0
        for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
            if line.startswith("VmFlags:"):
                if " mg" in line and not BASE <= start < TOP:
                    break
            elif "-" in (head := line.split(" ", 1)[0]) and ":" not in head:
                start = int(head.split("-")[0], 16)
        else:
            return
    raise OSError(errno.EAGAIN, f"process {process.pid} keeps making mergeable areas of its own")


def parse_ranges(text: str) -> list[int]:
    """Return the numbers of a list like 0-2,5."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def main() -> None:
    """Answer requests until standard input ends; then end all processes and unmerge."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # In the middle of a request too; our processes end when their sockets do.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    driver = Driver()
    while line := sys.stdin.buffer.readline():
        verb, *arguments = json.loads(line)
        answer = attempt(getattr(driver, f"do_{verb}"), arguments)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    driver.clear()


if __name__ == "__main__":
    main()
