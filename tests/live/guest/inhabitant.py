"""Own a process of the guest that has pages merged: what it does when asked, and how the program asks it.

It knows what every page of it must hold, and looks at all bytes whenever it is asked. Beside its pages it has a few restless ones, which a
thread of its own writes and checks without pause, equal to those of other inhabitants now and then.
"""

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import struct
import threading
import time

PAGE = 4096
RESTLESS = 4  # pages
WORDS = PAGE // 8
END = b"end"
SYS_SET_MEMPOLICY, SYS_MOVE_PAGES = 238, 279
MPOL_BIND, MPOL_MF_MOVE_ALL = 2, 4
PRESENT, FILE, FRAME = 1 << 63, 1 << 61, (1 << 55) - 1
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def system(number, *arguments):
    """Make a system call; OSError if it fails."""
    result = libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def fill(content):
    """Return a page of a content; 0 is a page of zeros."""
    return content.to_bytes(8, "big") * WORDS


def private_memory(pages):
    """Return private anonymous memory, and its address."""
    memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Restless(threading.Thread):
    """Write a few pages and read them back; `wrong` counts pages that were not as they had been written."""

    def __init__(self):
        super().__init__(daemon=True)
        self.memory, self.address = private_memory(RESTLESS)
        self.rounds = self.wrong = 0
        self.may_go = threading.Event()
        self.rests = threading.Event()

    def run(self):
        """For ever, while it may: hold for some rounds what all inhabitants hold, then what only this one does."""
        held = [fill(0)] * RESTLESS
        while True:
            if not self.may_go.is_set():
                self.rests.set()
                self.may_go.wait()
                self.rests.clear()
            for index in range(RESTLESS):
                at = index * PAGE
                self.wrong += self.memory[at : at + PAGE] != held[index]
                alone = self.rounds // 32 % 2
                held[index] = fill((os.getpid() << 32 | self.rounds) if alone else 0xA11 + index)
                for sector in range(0, PAGE, 512):  # piece by piece, so that a window may come between any two
                    self.memory[at + sector : at + sector + 512] = held[index][:512]
            self.rounds += 1
            time.sleep(0.001)

    def pause(self):
        """Let it rest, with pages that only it holds or that all do; return when it does."""
        self.may_go.clear()
        self.rests.wait()


class Inhabitant:
    """The process itself: serve requests until the socket closes."""

    def __init__(self, channel, node, contents):
        mask = ctypes.c_ulong(1 << node)
        system(SYS_SET_MEMPOLICY, MPOL_BIND, ctypes.byref(mask), 65)  # of the thread, and of those that it starts
        import pagefold

        self.pagefold = pagefold
        self.channel = channel
        self.held = list(contents)
        self.memory, self.address = private_memory(len(contents))
        self.restless = Restless()
        for index, content in enumerate(contents):
            self.memory[index * PAGE : (index + 1) * PAGE] = fill(content)
        self.handles = []

    def serve(self):
        """Answer requests for ever."""
        while (request := self.channel.recv(1 << 16)) != END:
            verb, *arguments = json.loads(request)
            try:
                answer = {"ok": getattr(self, f"do_{verb}")(*arguments)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            self.channel.send(json.dumps(answer).encode())
        os._exit(0)

    def do_advise(self):
        """Advise all there is; return how many regions that are."""
        self.handles = [self.pagefold.advise(self.memory), self.pagefold.advise(self.restless.memory)]
        return len(self.handles)

    def do_unadvise(self):
        """End that."""
        handles, self.handles = self.handles, []
        for handle in handles:
            self.pagefold.unadvise(handle)

    def do_restless(self, on):
        """Be restless, or stop it."""
        if on and not self.restless.is_alive():
            self.restless.start()
        if on:
            self.restless.may_go.set()
        elif self.restless.is_alive():
            self.restless.pause()
        return self.restless.rounds

    def do_write(self, index, content):
        """Fill a page."""
        self.memory[index * PAGE : (index + 1) * PAGE] = fill(content)
        self.held[index] = content

    def do_look(self):
        """Return (frame, node, whether it is the store's) of each page, in which every byte is checked first."""
        nodes = [-errno.ENOENT]
        while -errno.ENOENT in nodes:  # a window came between reading a page and asking for it
            self.verify()
            pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
            entries = struct.unpack(
                f"{len(self.held)}Q", os.pread(pagemap, len(self.held) * 8, self.address // PAGE * 8)
            )
            os.close(pagemap)
            nodes = self.move(range(len(self.held)), None)
        return [
            [entry & FRAME if entry & PRESENT else 0, node, bool(entry & FILE)]
            for entry, node in zip(entries, nodes, strict=True)
        ]

    def do_verify(self):
        """Check every byte."""
        self.verify()

    def do_move(self, indices, node):
        """Move pages to a node, whoever else maps them; return where each is then, or a negative errno."""
        return self.move(indices, node)

    def do_stats(self):
        """Return what the library says of this process."""
        return self.pagefold.stats()

    def verify(self):
        """Raise AssertionError for a page that does not hold what was written to it, or a restless thread that found one."""
        for index, content in enumerate(self.held):
            found = self.memory[index * PAGE : (index + 1) * PAGE]
            assert found == fill(content), f"page {index} holds {found[:32].hex()} ..., not {content}"
        assert self.restless.wrong == 0, f"restless pages were wrong {self.restless.wrong} times"

    def move(self, indices, node):
        """Call move_pages(2); without a node it only says where pages are."""
        count = len(indices)
        addresses = (ctypes.c_void_p * count)(*(self.address + index * PAGE for index in indices))
        for index in indices:
            assert self.memory[index * PAGE] == fill(self.held[index])[0]  # and so it is present
        wishes = None if node is None else (ctypes.c_int * count)(*[node] * count)
        statuses = (ctypes.c_int * count)(
            *[-errno.EBUSY] * count
        )  # where a page could not be moved the kernel leaves it so
        system(SYS_MOVE_PAGES, 0, count, addresses, wishes, statuses, MPOL_MF_MOVE_ALL if wishes else 0)
        return list(statuses)


class Neighbour:
    """An inhabitant as the program sees it."""

    def __init__(self, node, contents):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.node, self.held = node, list(contents)
        self.regions = 0  # advised now
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                Inhabitant(theirs, node, contents).serve()
            except BaseException as error:
                theirs.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
            finally:
                os._exit(1)
        theirs.close()
        self.channel = ours

    def ask(self, verb, *arguments):
        """Send a request and return its answer; AssertionError if it could not be done."""
        self.channel.send(json.dumps([verb, *arguments]).encode())
        answer = json.loads(self.channel.recv(1 << 20) or '{"error": "it is gone"}')
        assert "ok" in answer, f"process {self.pid} of node {self.node}: {verb}: {answer['error']}"
        return answer["ok"]

    def write(self, index, content):
        """Fill a page."""
        self.ask("write", index, content)
        self.held[index] = content

    def advise(self):
        """Let all of it be merged from now on."""
        self.regions = self.ask("advise")

    def unadvise(self):
        """End that."""
        self.ask("unadvise")
        self.regions = 0

    def kill(self):
        """End it at once."""
        os.kill(self.pid, signal.SIGKILL)
        self.bury()

    def close(self):
        """Let it end."""
        self.channel.send(END)  # those born later have this socket too, so closing it does not tell
        self.bury()

    def bury(self):
        """Wait for its end."""
        self.channel.close()
        os.waitpid(self.pid, 0)
