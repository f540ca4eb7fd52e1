"""Own a running guest: its process, its pipes, its temporary folder; and that no process is left, however it ends.

Why no guest outlives its use:

1. A healthy guest ends itself: its program sees the end of its input when our pipe closes, also when that is because we were killed.
2. QEMU runs under `timeout`, which outlives us and ends it after `bound` seconds whatever the guest does.
3. `close` waits for the first, not for long, then kills the process group, which holds `timeout` and QEMU and nobody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from kernelguest import cache, initramfs, kernels, machine, vmlinux
from kernelguest.complaints import complaints
from kernelguest.errors import GuestDied, GuestError, GuestHung

# What is in the pipe outlives QEMU, what waits in QEMU does not. 1 MiB is what everyone may ask for.
_PIPE_SIZE = 1 << 20
_TIMED_OUT = (
    124,
    -signal.SIGKILL,
)  # how `timeout` ends when it had to ask, and when it had to kill: its whole group, itself too
_GRACE = 30.0  # seconds from the end of input to the power-off; a guest that answers needs less than one


class Guest:
    """A guest for the time of a `with` block, running one program whose standard input and output are pipes here.

    `packages` are folders or modules that it can import, also in interpreters that it starts (`sys.executable`). `bound` is how many
    seconds it may live. However it ends, `stdout` is then at its end. Read what the program says while it runs: of what is unread when
    the power goes, the first mebibyte is kept (it is in the pipe) and the rest is lost (QEMU held it).
    """

    stdin: IO[bytes]
    stdout: IO[bytes]

    def __init__(
        self,
        program: Path,
        *,
        kernel: Path | None = None,
        nodes: int = 1,
        hotplug: Collection[int] = (),
        cpus: int = 1,
        mib_per_node: int = 256,
        bound: float = 600.0,
        arguments: Sequence[str] = (),
        packages: Sequence[Path] = (),
    ) -> None:
        self.program = program
        self.packages = packages
        self.kernel = kernel
        self.shape = machine.Shape(nodes, hotplug, cpus, mib_per_node)
        self.bound = bound
        self.exit_code: int | None = None
        machine.check(self.shape)
        if not bound > 0:
            raise GuestError(f"a bound of {bound} seconds: choose more than 0")
        self._line = machine.command_line(self.shape, arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._log = ""

    def __enter__(self) -> Guest:
        image = self.kernel or kernels.find()
        if (reason := kernels.why_not(self.kernel)) or image is None:
            raise GuestError(reason or "no kernel")
        try:
            kernel = vmlinux.startable(image, cache.folder())
            archive = initramfs.build(self.program, cache.folder(), self.packages)
            self._folder = Path(tempfile.mkdtemp(prefix="kernelguest-"))
        except OSError as error:
            raise GuestError(f"the guest's files cannot be made: {error}") from error
        try:
            self._process = self._start(kernel, archive, self._folder)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        assert self._process.stdin is not None and self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        return self

    def _start(self, kernel: Path, archive: Path, folder: Path) -> subprocess.Popen[bytes]:
        # Both files are passed open: another process may tidy the cache at any time.
        with kernel.open("rb") as first, archive.open("rb") as second, (folder / "errors").open("wb") as errors:
            words = machine.qemu_arguments(
                self.shape,
                machine.Files(
                    kernel=f"/proc/self/fd/{first.fileno()}",
                    initrd=f"/proc/self/fd/{second.fileno()}",
                    console=str(folder / "console"),
                    status=str(folder / "status"),
                ),
                self._line,
            )
            process = subprocess.Popen(
                ["timeout", "--kill-after=5", f"{self.bound:f}", kernels.qemu(), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                pass_fds=(first.fileno(), second.fileno()),
                process_group=0,
            )
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        return process

    def log(self) -> str:
        """Return the console's text so far: the kernel's warnings and what the program wrote to stderr."""
        return self._log or self._read("console")

    def complaints(self) -> list[str]:
        """Return the lines of the log in which the kernel complains."""
        return complaints(self.log())

    def _read(self, name: str) -> str:
        path = self._folder / name if self._folder else None
        return path.read_text(errors="replace") if path and path.exists() else ""

    def close(self) -> None:
        """End the guest and take its exit code. GuestHung if it had to be killed, GuestDied if it ended without a code."""
        if self._process is None or self._folder is None:
            return
        process, self._process = self._process, None
        patient = True
        try:
            self.stdin.close()
            patient = self._drain(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.stdout.close()
            self._log, errors, status = self._read("console"), self._read("errors"), self._read("status")
            shutil.rmtree(self._folder, ignore_errors=True)
        self.exit_code = int(status) if status else None
        if not patient:
            raise GuestHung(
                f"the guest went on for {_GRACE:g} s after the end of its input; killed{self._last(errors)}"
            )
        if process.returncode in _TIMED_OUT:
            raise GuestHung(f"the guest did not end within its bound of {self.bound:g} s; killed{self._last(errors)}")
        if self.exit_code is None:
            raise GuestDied(f"the guest ended before its program did{self._last(errors)}")

    def _drain(self, process: subprocess.Popen[bytes]) -> bool:
        """Read and drop what is still said, so that nobody waits to say it, until the guest ends; False if it does not in time."""
        deadline = time.monotonic() + _GRACE
        if not self.stdout.closed:
            poll = select.poll()  # select() has a highest descriptor
            poll.register(self.stdout, select.POLLIN)
            while poll.poll(max(deadline - time.monotonic(), 0) * 1000) and self.stdout.read(1 << 16):
                pass
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _last(self, errors: str) -> str:
        """Say the one line that tells most: the kernel's first complaint, init's, QEMU's, or the last on the console."""
        console = [line.strip() for line in self._log.splitlines() if line.strip()]
        ours = [line for line in console if line.startswith("init: ")]
        told = self.complaints()[:1] or ours[-1:] or errors.strip().splitlines()[-1:] or console[-1:]
        return f"; {told[0]}" if told else "; its console is empty"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except GuestError as reason:
            if error is None:
                raise
            error.add_note(str(reason))
