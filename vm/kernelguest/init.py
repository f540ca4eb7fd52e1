"""Be process 1 in the guest: make it habitable, let a child become the program, say how it ended, power off.

It is run from the initramfs, imports nothing of this package, and is told the program's arguments by the kernel's command line, in
hexadecimal (the kernel splits words, and knows no quoting that any text survives).

The child does not start an interpreter anew, it goes on in ours: that saves 0.3 s of a boot of 3 s. The program finds what it would
find: its own __main__, argv, stdin and stdout, and its end is the interpreter's end.

The order at the end matters: the status is written before the power goes, and the host believes only what was written. A guest without
a status has died.
"""

# pathlib takes longer to import here than all of this to run, and the program's streams outlive any block:
# ruff: noqa: PTH103, PTH112, PTH120, PTH123, PTH208, SIM115

import ctypes
import marshal
import os
import sys
import time
import types

MOUNTS = {
    "/proc": b"proc",
    "/sys": b"sysfs",
    "/dev": b"devtmpfs",
    "/dev/shm": b"tmpfs",
    "/tmp": b"tmpfs",
    "/sys/kernel/debug": b"debugfs",
}
PORTS = {"input": os.O_RDONLY, "output": os.O_WRONLY, "status": os.O_WRONLY}
PATIENCE = 60.0  # seconds for the ports to show up; the driver announces them from a work queue, so they need not be there at once
POWER_OFF = 0x4321FEDC  # include/uapi/linux/reboot.h


def mount_all(libc: ctypes.CDLL) -> None:
    """Mount what a program expects to find; what this kernel does not have is said and passed over."""
    for place, kind in MOUNTS.items():
        if place.startswith("/dev/"):
            os.makedirs(place, exist_ok=True)
        if libc.mount(kind, place.encode(), kind, 0, None):
            print(f"init: {place} is not mounted: {os.strerror(ctypes.get_errno())}", file=sys.stderr)


def open_ports() -> dict[str, int]:
    """Return an open descriptor for each of the host's ports, found by their names; there is no udev to make links."""
    folder = "/sys/class/virtio-ports"
    found: dict[str, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(found) < len(PORTS):
        for port in os.listdir(folder) if os.path.isdir(folder) else ():
            with open(f"{folder}/{port}/name") as file:
                name = file.read().strip()
            if name in PORTS and name not in found:
                found[name] = os.open(f"/dev/{port}", PORTS[name])
        if time.monotonic() > deadline:
            raise TimeoutError(f"of the host's ports only {sorted(found)} came")
        time.sleep(0.002)
    return found


def wait_for(program: int) -> int:
    """Return the program's status as subprocess does, -9 for SIGKILL; orphans come to us as well and are buried."""
    while True:
        pid, status = os.wait()
        if pid == program:
            return os.waitstatus_to_exitcode(status)


def become_program(ports: dict[str, int]) -> None:
    """Run the program in this process as if the interpreter had been started with it."""
    os.setsid()
    os.dup2(ports["input"], 0)
    os.dup2(ports["output"], 1)
    for descriptor in ports.values():
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    words = bytes.fromhex("".join(sys.argv[1:])).split(b"\0")
    sys.argv = ["/program.py", *map(os.fsdecode, words[:-1])]
    sys.path.append(
        f"{os.path.dirname(os.__file__)}/site-packages"
    )  # we were started without `site`; there if packages are
    with open("/program.pyc", "rb") as file:
        code = marshal.loads(file.read()[16:])
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = sys.argv[0]
    exec(code, main.__dict__)


def main() -> dict[str, int]:
    """Return in the child, with the ports; in process 1, never: one that ends makes the kernel panic."""
    libc = ctypes.CDLL(None, use_errno=True)
    ports: dict[str, int] = {}
    try:
        mount_all(libc)
        ports = open_ports()
        if program := os.fork():
            os.close(ports["input"])
            os.close(ports["output"])
            os.write(ports["status"], b"%d\n" % wait_for(program))
    except BaseException as error:
        print(f"init: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if os.getpid() == 1:
        libc.reboot(POWER_OFF)
    return ports


if __name__ == "__main__":
    become_program(main())
