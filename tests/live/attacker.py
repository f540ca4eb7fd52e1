"""Own a hostile client: it has a descriptor of an extent, and tries everything to change or shorten what is in it.

    attacker.py DESCRIPTOR BYTES DAEMON_PID DAEMON_DESCRIPTOR DAEMON_ADDRESS UID

Prints the names of the attacks whose call succeeded; whether they did any damage is for the caller to see. A call that succeeds is no
harm in itself: to make a private copy, for instance.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

EVIL = b"\xbd" * 4096
PUNCH_HOLE, KEEP_SIZE, ZERO_RANGE, COLLAPSE, MADV_REMOVE = 2, 1, 16, 8, 9
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def map_shared(fd: int, size: int, protection: int) -> int:
    address = libc.mmap(None, size, protection, mmap.MAP_SHARED, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        check(-1)
    return int(address)


def on_descriptor(fd: int, size: int) -> dict[str, Callable[[], object]]:
    """Return the attacks that need no more than a descriptor."""

    def store_through_mapping() -> None:
        ctypes.memset(map_shared(fd, size, 3), 0xBD, size)

    def make_mapping_writable() -> None:
        address = map_shared(fd, size, 1)
        check(libc.mprotect(address, size, 3))
        ctypes.memset(address, 0xBD, size)

    def remove_through_mapping() -> None:
        check(libc.madvise(map_shared(fd, size, 1), size, MADV_REMOVE))

    def write_own_memory() -> None:
        address = map_shared(fd, size, 1)
        memory = os.open("/proc/self/mem", os.O_RDWR)
        os.pwrite(memory, EVIL, address)

    def copy_into() -> None:
        source = os.memfd_create("evil")
        os.write(source, EVIL)
        os.copy_file_range(source, fd, 4096, 0, 0)

    def send_into() -> None:
        source = os.memfd_create("evil")
        os.write(source, EVIL)
        os.lseek(fd, 0, os.SEEK_SET)
        os.sendfile(fd, source, 0, 4096)

    def splice_into() -> None:
        reading, writing = os.pipe()
        os.write(writing, EVIL)
        os.splice(reading, fd, 4096, offset_dst=0)

    return {
        "write": lambda: os.write(fd, EVIL),
        "pwrite": lambda: os.pwrite(fd, EVIL, 0),
        "shared writable mapping": store_through_mapping,
        "mprotect": make_mapping_writable,
        "MADV_REMOVE": remove_through_mapping,
        "own memory by force": write_own_memory,
        "shrink": lambda: os.ftruncate(fd, 0),
        "grow": lambda: os.ftruncate(fd, size * 2),
        "punch": lambda: check(libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, size)),
        "zero range": lambda: check(libc.fallocate(fd, ZERO_RANGE, 0, size)),
        "collapse": lambda: check(libc.fallocate(fd, COLLAPSE, 0, 4096)),
        "extend": lambda: check(libc.fallocate(fd, 0, size, 4096)),
        "copy_file_range": copy_into,
        "sendfile": send_into,
        "splice": splice_into,
        "more seals": lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    }


def on_path(path: str, size: int) -> dict[str, Callable[[], object]]:
    """Return the attacks on something that can be opened anew."""
    attacks: dict[str, Callable[[], object]] = {
        "truncate": lambda: os.truncate(path, 0),
        "open and truncate": lambda: os.close(os.open(path, os.O_RDWR | os.O_TRUNC)),
        "mode": lambda: Path(path).chmod(0o666),
    }
    for mode, flags in (("read-write", os.O_RDWR), ("write-only", os.O_WRONLY), ("append", os.O_RDWR | os.O_APPEND)):
        with contextlib.suppress(OSError):
            fd = os.open(path, flags)
            attacks |= {f"{mode}, {name}": attack for name, attack in on_descriptor(fd, size).items()}
    return attacks


def on_daemon(pid: int, address: int) -> dict[str, Callable[[], object]]:
    """Return the attacks on the daemon's own mapping."""

    def by_force() -> None:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
        os.pwrite(memory, EVIL, address)

    def by_vm_writev() -> None:
        class Part(ctypes.Structure):
            _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]

        buffer = ctypes.create_string_buffer(EVIL)
        here, there = Part(ctypes.addressof(buffer), 4096), Part(address, 4096)
        libc.process_vm_writev.restype = ctypes.c_ssize_t
        done = libc.process_vm_writev(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        check(0 if done > 0 else -1)

    return {"by force": by_force, "process_vm_writev": by_vm_writev}


def main() -> None:
    fd, size, pid, daemon_fd, address, uid = map(int, sys.argv[1:])
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    attacks = {"mode": lambda: os.fchmod(fd, 0o666), **on_descriptor(fd, size)}
    places = {"own descriptor": f"/proc/self/fd/{fd}", "daemon's descriptor": f"/proc/{pid}/fd/{daemon_fd}"}
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/map_files").iterdir():
            if int(file.name.split("-")[0], 16) <= address < int(file.name.split("-")[1], 16):
                places["map_files"] = str(file)
    for name, attack in attacks.items():
        tried(name, attack)
    for place, path in places.items():
        for name, attack in on_path(path, size).items():
            tried(f"{place}: {name}", attack)
    for name, attack in on_daemon(pid, address).items():
        tried(f"daemon's mapping: {name}", attack)


def tried(name: str, attack: Callable[[], object]) -> None:
    """Run an attack in a child: some end it, where they succeed."""
    child = os.fork()
    if child == 0:
        try:
            attack()
        except (OSError, ValueError):
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"{'refused' if code == 1 else 'done'}: {name}", flush=True)


if __name__ == "__main__":
    main()
