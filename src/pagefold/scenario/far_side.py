"""Own the far side of a real-kernel host: a program that drives real processes and the kernel's merger, told what to do over a pipe.

Standard library and ctypes only, and one file, because it travels: it runs beside us on this machine's kernel, or alone in a guest.
That is also why it is not split. Must not know who asks, nor what is expected: it does, and says what it sees. One JSON request a line
on standard input, one JSON answer a line on standard output; it ends, and all its processes with it, when its standard input does.

How one full scan is let through, and never a page more (ksmd sleeps in one of two places, and both are interruptible sleeps, state S,
which it is in nowhere else):

1. `pages_to_scan` is as large as it can be, so a batch ends only with a full scan; `sleep_millisecs` is so long that a second batch
   never begins by itself. Between scans the kernel's `run` is 0.
2. ksmd may still sleep off the rest after its last batch. Writing another `sleep_millisecs` wakes it, once it is seen asleep; with
   `run` 0 it finds nothing to do and goes to the sleep that `run` 1 ends.
3. `run` 1: it scans one batch, and then rests. Once it is seen asleep, `run` 0 is written, which waits for the merger's lock: after
   that, whatever the counters say is final. If they did not move, nothing is there to be scanned.

Both knobs are put back after the scan. A `run` of 1 is remembered, and put into the kernel for scans alone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import platform
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

SYSFS = Path("/sys/kernel/mm/ksm")
MEMORY = Path("/sys/devices/system/memory")
NODES = Path("/sys/devices/system/node")
PAGE = mmap.PAGESIZE
BASE = 1 << 36  # page number 0 of every process stands here; only what lies above is ours
TOP = 1 << 40
MADV = {"MERGEABLE": 12, "UNMERGEABLE": 13}
MADV_NOHUGEPAGE = 15
PR_SET_CHILD_SUBREAPER, PR_SET_MEMORY_MERGE = 36, 67
MAP_FIXED_NOREPLACE = 0x100000
MPOL_PREFERRED, MPOL_F_STATIC_NODES, MPOL_MF_MOVE_ALL = 1, 1 << 15, 4
IORING_REGISTER_BUFFERS, IORING_UNREGISTER_BUFFERS = 0, 1
PRESENT, SWAPPED, PFN = 1 << 63, 1 << 62, (1 << 55) - 1
SYSCALLS = {
    "x86_64": {"mbind": 237, "set_mempolicy": 238, "move_pages": 279},
    "aarch64": {"mbind": 235, "set_mempolicy": 237, "move_pages": 239},
}.get(platform.machine(), {})
SYSCALLS.update(io_uring_setup=425, io_uring_register=427)
STEPPING = ("pages_to_scan", "sleep_millisecs")  # ours while a scan runs
SINCE_BOOT = ("pages_scanned", "pages_skipped")  # counters that nothing resets: told as from the last reset
LONG = (100_000_000, 100_000_001)  # ms of sleep: a day; two values, because a change wakes ksmd
UINT_MAX = 2**32 - 1

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
libc.syscall.restype = ctypes.c_long


def checked(result: int, name: str) -> int:
    """Return what a C function returned, or raise OSError with its errno."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def system(name: str, *arguments: Any) -> int:
    """Call the kernel by the name of a system call."""
    if name not in SYSCALLS:
        raise OSError(errno.ENOSYS, f"{name}: its number is not known on {platform.machine()}")
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return checked(libc.syscall(ctypes.c_long(SYSCALLS[name]), *words), name)


def where(vpn: int) -> int:
    """Return the address of a page number."""
    return BASE + vpn * PAGE


def pagemap(pid: int | str, vpn: int, pages: int) -> tuple[int, ...]:
    """Return the pagemap entries of some pages."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as file:
        return struct.unpack(f"{pages}Q", os.pread(file.fileno(), 8 * pages, where(vpn) // PAGE * 8))


def nodemask(node: int) -> Any:
    """Return a kernel nodemask with one node, and its length in bits."""
    return (ctypes.c_ulong * 16)(*(1 << node % 64 if i == node // 64 else 0 for i in range(16)))


# --- in a driven process ---------------------------------------------------------------------------------------------


class Worker:
    """One driven process: carries out what the driver asks over its socket, until that is closed."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.rings: dict[int, list[int]] = {}  # by page number: descriptors of the io_urings that hold it

    def serve(self) -> None:
        """Answer requests for ever."""
        while request := self.channel.recv(65536):
            verb, *arguments = json.loads(request)
            self.channel.send(json.dumps(attempt(getattr(self, f"do_{verb}"), arguments)).encode())
        os._exit(0)

    def do_fork(self) -> int:
        """Fork; the child gets the socket that the driver sends along."""
        _, descriptors, _, _ = socket.recv_fds(self.channel, 1, 1)
        pid = os.fork()
        if pid == 0:
            self.channel.close()
            for rings in self.rings.values():
                for ring in rings:
                    os.close(ring)
            Worker(socket.socket(fileno=descriptors[0])).serve()
        os.close(descriptors[0])
        return pid

    def do_mmap(self, vpn: int, pages: int, node: int | None) -> None:
        """Map private anonymous memory without huge pages, preferably on a node; the wish outlives that node's being offline."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        address = libc.mmap(where(vpn), pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if address != where(vpn):
            checked(-1, "mmap")
        if libc.madvise(address, pages * PAGE, MADV_NOHUGEPAGE) and ctypes.get_errno() != errno.EINVAL:
            checked(-1, "madvise")  # EINVAL: this kernel has no huge pages
        if node is not None:
            mode = MPOL_PREFERRED | MPOL_F_STATIC_NODES
            system("mbind", ctypes.c_void_p(address), pages * PAGE, mode, nodemask(node), 1024, 0)

    def do_munmap(self, vpn: int, pages: int) -> None:
        """Unmap."""
        checked(libc.munmap(where(vpn), pages * PAGE), "munmap")

    def do_write(self, vpn: int, content: int) -> None:
        """Fill a page with a number, highest byte first: memcmp orders pages as the numbers are ordered."""
        ctypes.memmove(where(vpn), content.to_bytes(8, "big") * (PAGE // 8), PAGE)

    def do_read(self, vpn: int) -> int:
        """Return what fills a page; a page that was never touched stays so."""
        if not pagemap("self", vpn, 1)[0] & (PRESENT | SWAPPED):
            return 0
        found = ctypes.string_at(where(vpn), PAGE)
        if found != found[:8] * (PAGE // 8):
            raise OSError(errno.EILSEQ, f"page {vpn} is not one content's fill")
        return int.from_bytes(found[:8], "big")

    def do_madvise(self, vpn: int, pages: int, advice: str) -> None:
        """Advise."""
        checked(libc.madvise(where(vpn), pages * PAGE, MADV[advice]), "madvise")

    def do_merge_any(self, on: bool) -> None:
        """Let everything merge, or nothing."""
        checked(libc.prctl(PR_SET_MEMORY_MERGE, int(on), 0, 0, 0), "prctl")

    def do_tidy(self) -> None:
        """After merge_any: keep the interpreter's own memory out of it."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(word, 16) for word in line.split(None, 1)[0].split("-"))
            if not BASE <= start < TOP and start < 1 << 47:
                libc.madvise(start, end - start, MADV["UNMERGEABLE"])

    def do_move(self, vpn: int, node: int) -> int:
        """Move a page to a node; return the node where it is, or a negative errno."""
        status = ctypes.c_int(-errno.EBUSY)  # the kernel leaves it alone where it could not move a page
        address, wish = ctypes.c_void_p(where(vpn)), ctypes.c_int(node)
        references = (ctypes.byref(address), ctypes.byref(wish), ctypes.byref(status))
        try:
            failed = system("move_pages", 0, 1, *references, MPOL_MF_MOVE_ALL)
        except OSError as error:
            return -(error.errno or errno.EIO)
        return -errno.EBUSY if failed else status.value

    def do_pin(self, vpn: int) -> None:
        """Hold a long-term reference: register the page as a buffer of an io_uring of its own."""
        ring = system("io_uring_setup", 1, ctypes.byref(ctypes.create_string_buffer(120)))
        iovec = (ctypes.c_size_t * 2)(where(vpn), PAGE)
        try:
            system("io_uring_register", ring, IORING_REGISTER_BUFFERS, iovec, 1)
        except OSError:
            os.close(ring)
            raise
        self.rings.setdefault(vpn, []).append(ring)

    def do_unpin(self, vpn: int) -> None:
        """Give a reference back: unregistering waits until it is, closing alone would not."""
        ring = self.rings[vpn].pop()
        system("io_uring_register", ring, IORING_UNREGISTER_BUFFERS, None, 0)
        os.close(ring)


def attempt(action: Any, arguments: list[Any]) -> dict[str, Any]:
    """Return {"ok": result}, or what OSError came."""
    try:
        return {"ok": action(*arguments)}
    except OSError as error:
        return {"errno": error.errno, "text": error.strerror or str(error)}


# --- the driver --------------------------------------------------------------------------------------------------------


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
        self.waiting = False  # `run` is 1 for whoever asks; the kernel's is 0 between scans
        self.base: dict[str, int] = {}
        self.ksmd = find_ksmd()
        self.zero_pfn = zero_pfn()

    # --- processes ---

    def do_hello(self) -> dict[str, Any]:
        """Say what this kernel is and has."""
        features = ["merge_any"] if libc.prctl(68, 0, 0, 0, 0) >= 0 else []  # PR_GET_MEMORY_MERGE
        if not read_number("/proc/sys/kernel/io_uring_disabled", 0):
            features.append("pin")
        features += [knob.name for knob in SYSFS.iterdir()]
        nodes = parse_ranges((NODES / "online").read_text())
        return {"release": platform.release(), "nodes": len(nodes), "page": PAGE, "features": sorted(features)}

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
        process.channel.shutdown(socket.SHUT_WR)
        while process.channel.recv(1):
            pass
        process.channel.close()

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
        """End all processes and unmerge everything; the kernel's `run` is 0 then."""
        for number in list(self.driven):
            self.do_exit(number)
        for value in (0, 2, 0):
            write("run", value)

    def do_reset(self, knobs: dict[str, int | str]) -> None:
        """Begin afresh with these knobs."""
        self.clear()
        if self.one_batch():
            raise OSError(
                errno.EBUSY, "memory of another process is advised MERGEABLE (as a virtual machine's often is)"
            )
        self.waiting = True
        for name, setting in knobs.items():
            if (SYSFS / name).exists():
                self.do_set(name, setting)
        self.base = {name: read_number(SYSFS / name, 0) for name in SINCE_BOOT}

    def do_set(self, name: str, value: int | str) -> None:
        """Write a knob; the kernel judges the value. `run` 1 waits for the next scan."""
        waiting = name == "run" and str(value).strip() == "1"
        write(name, 0 if waiting else value)
        if name == "run":
            self.waiting = waiting

    def do_get(self, name: str) -> int | str:
        """Read a knob or counter."""
        if name == "run" and self.waiting:
            return 1
        text = (SYSFS / name).read_text().strip()
        if "[" in text:
            return text[text.index("[") + 1 : text.index("]")]
        return int(text) - self.base.get(name, 0)

    def do_scan(self, passes: int) -> int:
        """Let that many full scans through; return how many there were: fewer if nothing is there to be scanned."""
        for process in self.driven.values():
            if process.merge_any:
                keep_out(process)
        tuned = self.do_get("advisor_mode") != "none" if (SYSFS / "advisor_mode").exists() else False
        kept = {name: read_number(SYSFS / name, 0) for name in STEPPING}
        first = read_number(SYSFS / "full_scans", 0)
        try:
            if not tuned:
                write("pages_to_scan", UINT_MAX)
            for done in range(1, passes + 1):
                while read_number(SYSFS / "full_scans", 0) < first + done:
                    if not self.one_batch():
                        return done - 1
        finally:
            for name, value in kept.items():
                if not (tuned and name == "pages_to_scan"):
                    write(name, value)
        return passes

    def one_batch(self) -> bool:
        """Let ksmd scan one batch; False if there was nothing to scan."""
        before = progress()
        self.wait_asleep()
        write("sleep_millisecs", LONG[read_number(SYSFS / "sleep_millisecs", 0) == LONG[0]])
        self.wait_asleep()
        write("run", 1)
        self.wait_asleep()
        write("run", 0)
        return progress() != before

    def wait_asleep(self) -> None:
        """Wait until ksmd rests."""
        rest = 0.0001
        while Path(f"/proc/{self.ksmd}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(rest)
            rest = min(rest * 1.5, 0.01)

    # --- what can be seen ---

    def do_observe(self, counters: list[str]) -> dict[str, Any]:
        """Return counters, each process's own, and of every page that is there: process, page number, node, frame."""
        stats, pages = {}, []
        for number, process in self.driven.items():
            lines = Path(f"/proc/{process.pid}/ksm_stat").read_text().splitlines()
            stats[number] = {
                words[0]: int(words[1]) for words in map(str.split, lines) if words[1].lstrip("-").isdigit()
            }
            pages += [(number, *page) for page in self.pages_of(process)]
        return {"counters": {name: self.do_get(name) for name in counters}, "stats": stats, "pages": pages}

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
        taken: list[Path] = []
        try:
            for block in blocks(node):
                (block / "state").write_text("offline")
                taken.append(block)
        except OSError:
            for block in taken:
                (block / "state").write_text("online_movable")
            raise

    def do_online(self, node: int) -> None:
        """Put the memory of a node back."""
        for block in blocks(node):
            if (block / "state").read_text().strip() == "offline":
                (block / "state").write_text("online_movable")


def blocks(node: int) -> list[Path]:
    """Return the folders of a node's memory blocks."""
    found = sorted((NODES / f"node{node}").glob("memory*"), key=lambda path: int(path.name[6:]))
    if not found:
        raise OSError(errno.ENODEV, f"node {node} has no memory blocks")
    return [MEMORY / path.name for path in found]


def write(name: str, value: int | str) -> None:
    """Write a file of the merger."""
    with (SYSFS / name).open("wb", buffering=0) as file:
        file.write(str(value).encode())


def read_number(path: Path | str, default: int) -> int:
    """Read a number from a file; the default if there is no such file."""
    try:
        return int(Path(path).read_text())
    except FileNotFoundError:
        return default


def progress() -> tuple[int, int, int]:
    """Return what grows when ksmd scans."""
    names = ("full_scans", *SINCE_BOOT)
    scans, scanned, skipped = (read_number(SYSFS / name, 0) for name in names)
    return scans, scanned, skipped


def find_ksmd() -> int:
    """Return the pid of the merger's thread."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text() == "ksmd\n" and not (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:
            continue  # it ended meanwhile
    raise OSError(errno.ESRCH, "no thread ksmd is to be seen: is this the kernel's own pid namespace?")


def zero_pfn() -> int:
    """Return the frame of the kernel's zero page: that of a page that was only read."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    libc.mmap(where(0), PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    libc.madvise(where(0), PAGE, MADV_NOHUGEPAGE)
    ctypes.string_at(where(0), 1)
    frame = pagemap("self", 0, 1)[0] & PFN
    libc.munmap(where(0), PAGE)
    return frame


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
