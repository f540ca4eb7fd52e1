"""Own a driven process: it carries out what the driver asks, on its own memory."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
from pathlib import Path

from calls import (
    BASE,
    PAGE,
    PRESENT,
    SWAPPED,
    TOP,
    attempt,
    checked,
    libc,
    map_pages,
    nodemask,
    pagemap,
    system,
    unmap_pages,
    where,
)

MADV = {"MERGEABLE": 12, "UNMERGEABLE": 13}
PR_SET_MEMORY_MERGE = 67
MPOL_PREFERRED, MPOL_F_STATIC_NODES, MPOL_MF_MOVE_ALL = 1, 1 << 15, 4
IORING_REGISTER_BUFFERS, IORING_UNREGISTER_BUFFERS = 0, 1


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
        map_pages(vpn, pages)
        if node is not None:
            mode = MPOL_PREFERRED | MPOL_F_STATIC_NODES
            try:
                system("mbind", ctypes.c_void_p(where(vpn)), pages * PAGE, mode, nodemask(node), 1024, 0)
            except OSError:
                unmap_pages(vpn, pages)
                raise

    def do_munmap(self, vpn: int, pages: int) -> None:
        """Unmap."""
        unmap_pages(vpn, pages)

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
