"""Own the machine: its nodes, its ports and the kernel's command line, as QEMU's arguments. Starts nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from kernelguest import initramfs
from kernelguest.errors import GuestError

BLOCK_MIB = 128  # what x86 takes offline and online at once
_MOST_NODES = 8
_MOST_CPUS = 8
_COMMAND_LINE = 2047  # COMMAND_LINE_SIZE less its zero
# Initcalls of what nothing here uses: random numbers from jitter, keys, certificates, BPF's types. 0.5 s of an emulated boot.
_NOT_NEEDED = (
    *("jent_mod_init", "crypto_kdf108_init", "load_system_certificate_list", "init_encrypted"),
    *("bpf_dummy_struct_ops_init", "bpf_tcp_ca_kfunc_init"),
)
_KERNEL = (
    *("console=ttyS0", "loglevel=5"),  # warnings and worse: each character costs two exits
    *("panic=-1", "oops=panic"),  # an oops can leave a lock held: better an end with its text in the log than a hang
    *("transparent_hugepage=never", "numa_balancing=disable"),
    *("memhp_default_state=online_movable", "swiotlb=noforce"),  # a bounce buffer would take 64 MiB of the last node
    *("nokaslr", "mitigations=off", "no_timer_check", "random.trust_cpu=on", "i8042.noaux", "i8042.nokbd"),
    # 0.3 s more: no locks patched away, no clock checked by another, no security modules, no cryptography that tests itself.
    *("noreplace-smp", "tsc=reliable", "lsm=capability", "audit=0", "cryptomgr.notests"),
    f"initcall_blacklist={','.join(_NOT_NEEDED)}",
)


class Shape(NamedTuple):
    """How much of what a guest has."""

    nodes: int = 1
    hotplug: Collection[int] = ()
    cpus: int = 1
    mib_per_node: int = 256


class Files(NamedTuple):
    """What QEMU reads and writes, by name."""

    kernel: str
    initrd: str
    console: str
    status: str


def check(shape: Shape) -> None:
    """Raise GuestError for a machine that cannot be."""
    if not 1 <= shape.nodes <= _MOST_NODES:
        raise GuestError(f"{shape.nodes} nodes: choose 1 to {_MOST_NODES}")
    if not 1 <= shape.cpus <= _MOST_CPUS:
        raise GuestError(f"{shape.cpus} processors: choose 1 to {_MOST_CPUS}")
    if shape.mib_per_node < BLOCK_MIB or shape.mib_per_node % BLOCK_MIB:
        raise GuestError(f"{shape.mib_per_node} MiB a node: choose a multiple of {BLOCK_MIB}, the size of a block")
    for node in shape.hotplug:
        if not 0 < node < shape.nodes:
            raise GuestError(f"node {node} cannot be hot-plugged: choose from 1 to {shape.nodes - 1}; node 0 boots")


def command_line(shape: Shape, arguments: Sequence[str]) -> str:
    """Return the kernel's; after the dashes what its first process gets. GuestError if it is too long for the kernel."""
    words = [
        *_KERNEL,
        f"possible_cpus={shape.cpus}",
        f"rdinit=/{initramfs.PYTHON}",
        "--",
        "-I",
        "-S",
        "-B",
        f"/{initramfs.INIT}",
    ]
    if arguments:
        if any("\0" in argument for argument in arguments):
            raise GuestError("an argument of the program holds a zero byte; none can")
        words.append("".join(f"{argument}\0" for argument in arguments).encode(errors="surrogateescape").hex())
    line = " ".join(words)
    if len(line) > _COMMAND_LINE:
        raise GuestError(
            f"the program's arguments are {len(line) - _COMMAND_LINE} characters too long for the kernel's command line; "
            "send them by stdin"
        )
    return line


def qemu_arguments(shape: Shape, files: Files, line: str) -> list[str]:
    """Return QEMU's arguments; its own standard input and output become the program's."""
    return [
        # mem-merge=off: the host's own KSM must not work on the guest's memory.
        # -avx2: as QEMU 7.2 emulates it, NumPy's argsort of ten or more numbers of 64 bits is wrong.
        *("-machine", "pc,mem-merge=off", "-accel", "tcg", "-cpu", "max,-avx2"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"),
        *_nodes(shape),
        *("-kernel", files.kernel, "-initrd", files.initrd, "-append", line),
        *("-serial", f"file:{files.console}"),
        *("-device", "virtio-serial-pci"),
        # One port each way: when the host's end of a port is closed, the guest can write to it no more, and the program must be able
        # to answer after it saw the end of its input. The output is QEMU's own, opened a second time.
        *("-chardev", "stdio,id=input,signal=off", "-device", "virtserialport,chardev=input,name=input"),
        *("-chardev", "file,id=output,path=/dev/stdout", "-device", "virtserialport,chardev=output,name=output"),
        *("-chardev", f"file,id=status,path={files.status}", "-device", "virtserialport,chardev=status,name=status"),
    ]


def _nodes(shape: Shape) -> list[str]:
    """Return processors and memory, node by node.

    The guest numbers its nodes in the order in which the firmware's table (SRAT) first names them, processors before memory, and a node
    without either at boot is not in it: what is plugged there later would land on node 0. So where one is hot-plugged, each node but
    the first is given a socket that stays empty.
    """
    plugged = sorted(set(shape.hotplug))
    total = shape.nodes * shape.mib_per_node
    at_boot = total - len(plugged) * shape.mib_per_node
    sockets = shape.cpus + (shape.nodes - 1 if plugged else 0)
    words = ["-smp", f"{shape.cpus},maxcpus={sockets},sockets={sockets},cores=1,threads=1"]
    words += ["-m", f"{at_boot}M,slots={len(plugged)},maxmem={total}M" if plugged else f"{at_boot}M"]
    for node in range(shape.nodes):
        memdev = "" if node in plugged else f",memdev=mem{node}"
        words += ["-object", f"memory-backend-ram,id=mem{node},size={shape.mib_per_node}M"]
        words += ["-numa", f"node,nodeid={node}{memdev}"]
    for socket in range(sockets):
        words += ["-numa", f"cpu,node-id={max(socket - shape.cpus + 1, 0)},socket-id={socket},core-id=0,thread-id=0"]
    words += _distances(shape.nodes)
    for node in plugged:
        words += ["-device", f"pc-dimm,id=dimm{node},memdev=mem{node},node={node}"]
    return words


def _distances(nodes: int) -> list[str]:
    """Return distances that put the nodes on a ring, each nearest to the next one; two are at the usual 10 and 20 anyway.

    Were all equally far, where memory comes from when a node has none would be decided anew by every boot.
    """
    if nodes <= 2:
        return []
    pairs = ((one, other) for one in range(nodes) for other in range(nodes))
    ring = ((one, other, 10 + 10 * ((other - one) % nodes)) for one, other in pairs)
    return [word for one, other, far in ring for word in ("-numa", f"dist,src={one},dst={other},val={far}")]
