"""Own the processes of a test of the live merger: daemons, forked from a nursery that has everything loaded, and clients.

Must not know: pytest.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.live.clients import ready

from pagefold.live import control

HERE = Path(__file__).parent
PATIENCE = 60.0  # seconds that anything may take; nothing should
# Rests are short, so that nobody waits for them; what is true does not depend on them.
QUICK: dict[str, Any] = {
    "pagefold.live.daemon._IDLE_SECONDS": [0.005, 0.02],
    "pagefold.live.daemon._SAMPLE_SECONDS": 0.02,
}
KNOBS: dict[str, int | str] = {"sleep_millisecs": 0, "max_cpu_percent": 200 if (os.cpu_count() or 1) > 1 else 100}


def eventually(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait, long if need be, for what must become true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


class Nursery:
    """The process whose children all daemons are (nursery.py)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, **order: Any) -> dict[str, int]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, int] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class DaemonProcess:
    """A daemon of a test."""

    def __init__(self, nursery: Nursery, folder: Path, name: str, order: dict[str, Any]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.path = folder / "pagefold" / f"{name}.sock"
        self._nursery = nursery
        self._code: int | None = None
        order["knobs"] = {**KNOBS, **order.get("knobs", {})}
        order["patch"] = {**QUICK, **order.get("patch", {})}
        self.pid = nursery.tell(do="start", name=name, runtime=str(folder), log=str(self.log), **order)["pid"]
        self._pidfd = os.pidfd_open(self.pid)
        eventually(lambda: self.ended() or self.serves())

    def serves(self) -> bool:
        """Tell whether it accepts connections."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            return probe.connect_ex(str(self.path)) == 0

    def ended(self) -> bool:
        """Tell whether it has ended."""
        return self._code is not None or bool(ready([self._pidfd], 0))

    def code(self) -> int:
        """Wait for its end and return its exit code, a signal's number negative."""
        if self._code is None:
            assert ready([self._pidfd], PATIENCE), "the daemon does not end"
            self._code = self._nursery.tell(do="reap", pid=self.pid)["code"]
            os.close(self._pidfd)
        return self._code

    def ask(self, verb: str, **more: Any) -> dict[str, Any]:
        """Ask it as the command line does."""
        return control.ask(self.path, {"verb": verb, **more}, PATIENCE)

    def stat(self) -> dict[str, Any]:
        return self.ask("stat")

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.stat()["counters"]
        return found

    def set(self, **knobs: int | str) -> dict[str, Any]:
        answer: dict[str, Any] = self.ask("set", knobs=knobs)["knobs"]
        return answer

    def settled(self) -> bool:
        """Tell whether it has settled now."""
        return bool(self.ask("settled", timeout=0)["settled"])

    def settle(self) -> dict[str, Any]:
        """Wait until nothing more can merge, and return what it says then. For clients that are processes."""
        assert self.ask("settled", timeout=PATIENCE - 5)["settled"], self.stat()
        return self.stat()

    def descriptors(self) -> list[str]:
        """Return what its descriptors are, but for what it has open only for a moment."""
        found = []
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(str(link.readlink()).split(":[")[0])
        return sorted(name for name in found if not name.endswith("/maps"))

    def resident(self) -> int:
        """Return its own anonymous memory, in bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise LookupError("RssAnon")

    def judge(self) -> dict[str, Any]:
        """Let it judge itself."""
        return self.ask("validate")

    def stop(self) -> None:
        """End it as `pagefold stop` does; it leaves nothing behind."""
        self.ask("stop")
        assert self.code() == 0, self.log.read_text()
        assert not self.path.exists()
        assert not self.path.with_name(self.path.name + ".lock").exists()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.code()


class WorkerProcess:
    """A client that is a process (clients.py)."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "clients.py"), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = int(self._answer())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def tell(*arguments: object) -> Any:
            assert self.process.stdin
            self.process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
            self.process.stdin.flush()
            return self._answer()

        return tell

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"client {self.process.pid} ended by itself"
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def limit_memory(cgroup: Path, size: int) -> None:
    """Let a memory cgroup, of the first version or the second, have so many bytes."""
    first = cgroup / "memory.limit_in_bytes"
    (first if first.exists() else cgroup / "memory.max").write_text(str(size))


def memory_used(cgroup: Path) -> int:
    """Return the bytes that a memory cgroup has now."""
    first = cgroup / "memory.usage_in_bytes"
    return int((first if first.exists() else cgroup / "memory.current").read_text())
