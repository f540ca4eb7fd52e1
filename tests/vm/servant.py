"""Serve in the guest: a request a line as JSON, an answer a line; show what the guest is made of, and make a noise if told to."""

import ctypes
import json
import os
import sys
from pathlib import Path

NODES = Path("/sys/devices/system/node")


def argv():
    """Return the arguments."""
    return sys.argv


def echo(length):
    """Read so many bytes and write them; the answer follows."""
    data = sys.stdin.buffer.read(length)
    sys.stdout.buffer.write(data)
    return len(data)


def noise(lines):
    """Write to everything that is not the channel."""
    for line in range(lines):
        os.write(2, b"noise on stderr, half a line\xff\x00 " + b"\n" * (line % 2))
        Path("/dev/kmsg").write_text(f"<3>noise {line} in the kernel's log\n")
    return lines


def nodes():
    """Return by node: MiB, processors and the state of each block."""
    found = {}
    for node in map(int, json.loads(f"[{expand((NODES / 'online').read_text())}]")):
        folder = NODES / f"node{node}"
        total = next(line.split()[3] for line in (folder / "meminfo").read_text().splitlines() if "MemTotal" in line)
        states = {path.parent.name: path.read_text().strip() for path in sorted(folder.glob("memory[0-9]*/state"))}
        found[node] = [int(total) // 1024, (folder / "cpulist").read_text().strip(), states]
    return found


def expand(ranges):
    """Return '0,2-4' as '0,2,3,4'."""
    spans = [span.split("-") for span in ranges.strip().split(",")]
    return ",".join(str(node) for span in spans for node in range(int(span[0]), int(span[-1]) + 1))


def set_state(node, state):
    """Take a node's blocks offline, or online."""
    for path in (NODES / f"node{node}").glob("memory[0-9]*/state"):
        path.write_text(state)
    return nodes()


def zones():
    """Return the names of the zones that have pages, by node."""
    found, node, zone = {}, "", ""
    for line in Path("/proc/zoneinfo").read_text().splitlines():
        if line.startswith("Node"):
            node, zone = line.split()[1].rstrip(","), line.split()[3]
        elif line.split()[:1] == ["present"] and int(line.split()[1]):
            found.setdefault(node, []).append(zone)
    return found


def processor():
    """Return what the processor can, by the kernel's words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].split() for line in lines if line.startswith("flags"))


def kernel_log():
    """Return all that the kernel said since its start, at any level (syslog(2), SYSLOG_ACTION_READ_ALL)."""
    buffer = ctypes.create_string_buffer(1 << 20)
    length = ctypes.CDLL(None).klogctl(3, buffer, len(buffer))
    return buffer.raw[:length].decode(errors="replace")


VERBS = {verb.__name__: verb for verb in (argv, echo, noise, nodes, set_state, zones, processor, kernel_log)}

while request := sys.stdin.buffer.readline():
    name, *arguments = json.loads(request)
    sys.stdout.write(json.dumps(VERBS[name](*arguments)) + "\n")
    sys.stdout.flush()
