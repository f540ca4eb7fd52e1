"""Own the command line: fetch a kernel, or run a program in a guest as if it ran here."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

from kernelguest import kernels
from kernelguest.errors import GuestError
from kernelguest.guest import Guest

_OUR_FAILURE = 125  # as `timeout` and `env` do: not the program's code


def parser() -> argparse.ArgumentParser:
    """Return the parser of everything before a `--`."""
    top = argparse.ArgumentParser(
        prog="python -m kernelguest", description="Run Python programs in a kernel of their own."
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="{fetch,packages,run}")
    verbs.add_parser("fetch", help="download a Debian kernel into the cache and print where it is")
    verbs.add_parser("packages", help="print the Debian packages that guests need, to be installed by apt-get")
    run = verbs.add_parser(
        "run",
        help="boot a guest and run a program in it",
        usage="%(prog)s PROGRAM [options] [-- ARGUMENT ...]",
        epilog="The program's exit code is ours, 128 and the number if a signal ended it, 125 if the guest failed. "
        "The guest's console goes to standard error at the end.",
    )
    run.add_argument(
        "program",
        type=Path,
        metavar="PROGRAM",
        help="a Python file; it finds the standard library, modules beside it, and the packages given",
    )
    run.add_argument("--nodes", type=int, default=1, metavar="N", help="NUMA nodes (default: 1)")
    run.add_argument(
        "--hotplug",
        type=int,
        action="append",
        default=[],
        metavar="NODE",
        help="a node that can be taken offline; may be repeated",
    )
    run.add_argument("--cpus", type=int, default=1, metavar="N", help="processors, all on node 0 (default: 1)")
    run.add_argument("--mib", type=int, default=256, metavar="MIB", help="memory of each node (default: 256)")
    run.add_argument(
        "--package",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a folder or module that the program can import; may be repeated",
    )
    run.add_argument(
        "--bound", type=float, default=600.0, metavar="S", help="seconds after which it is killed (default: 600)"
    )
    run.add_argument("--kernel", type=Path, metavar="VMLINUZ", help="a kernel other than the newest in the cache")
    return top


def copy_input(guest: Guest) -> None:
    """Pass on our input until it ends, or the guest does."""
    try:
        while block := os.read(0, 1 << 16):
            guest.stdin.write(block)
        guest.stdin.close()
    except (OSError, ValueError):  # the guest is gone, or was closed by the main thread
        pass


def copy_output(blocks: SimpleQueue[bytes]) -> None:
    """Pass on what the program said, until an empty block."""
    with contextlib.suppress(BrokenPipeError):
        while block := blocks.get():
            sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the program, and return what the shell shall see."""
    guest = Guest(
        options.program,
        kernel=options.kernel,
        nodes=options.nodes,
        hotplug=options.hotplug,
        cpus=options.cpus,
        mib_per_node=options.mib,
        bound=options.bound,
        arguments=arguments,
        packages=options.package,
    )
    blocks: SimpleQueue[bytes] = SimpleQueue()
    writer = threading.Thread(target=copy_output, args=(blocks,), daemon=True)
    try:
        with guest:
            threading.Thread(target=copy_input, args=(guest,), daemon=True).start()
            writer.start()
            while block := guest.stdout.read(1 << 16):  # at once, however slow our own reader is: see Guest
                blocks.put(block)
    finally:
        blocks.put(b"")
        if writer.is_alive():
            writer.join()
        sys.stderr.write(guest.log())
    assert guest.exit_code is not None
    return guest.exit_code if guest.exit_code >= 0 else 128 - guest.exit_code


def main(words: Sequence[str]) -> int:
    """Do what the words say and return the exit code."""
    cut = words.index("--") if "--" in words else len(words)
    options = parser().parse_args(words[:cut])
    try:
        if options.verb == "run":
            return run(options, words[cut + 1 :])
        print(kernels.fetch() if options.verb == "fetch" else kernels.VERSIONS["qemu"]["package"])
        return 0
    except GuestError as error:
        print(f"kernelguest: {error}", file=sys.stderr)
        return _OUR_FAILURE
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
