"""Own a forked process that does what a test tells it, function by function: agents are one per process, so each test has its own."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

BOUND = 60.0  # seconds; nothing that a test waits for takes long, and nothing may hang


class ChildFailed(AssertionError):  # noqa: N818
    """What was run in a child raised; says where."""


def wait_until(true: Callable[[], object], what: str) -> None:
    """Wait for a condition."""
    until = time.monotonic() + BOUND
    while not true():
        assert time.monotonic() < until, f"waited {BOUND:.0f} s for {what}"
        time.sleep(0.005)


class Child:
    """Run functions in a process of its own; they may keep things in `kept`, which is the child's."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._ours.close()
                _serve(theirs)
            finally:
                os._exit(99)  # whatever happens, no second test run
        theirs.close()
        self.status: int | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a function begin; `result` waits for it."""
        _send(self._ours, (function, arguments))

    def result(self) -> Any:
        """Return what the function returned."""
        said = _receive(self._ours)
        if said is None:
            raise ChildFailed(f"the child died: wait status {self.wait()}")
        good, value = said
        if not good:
            raise ChildFailed(value)
        return value

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function there and return what it returned."""
        self.begin(function, *arguments)
        return self.result()

    def wait(self) -> int:
        """Wait for its end and return its exit code, negative for a signal."""
        if self.status is None:
            fd = os.pidfd_open(self.pid)
            ended = select.select([fd], [], [], BOUND)[0]
            os.close(fd)
            if not ended:
                os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            assert ended, f"process {self.pid} did not end in {BOUND:.0f} s"
        return self.status

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def end(self) -> None:
        """Let it end, by force if need be."""
        self._ours.close()
        if self.status is None:
            with contextlib.suppress(AssertionError):
                self.wait()


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run one function in a process of its own and return what it returned."""
    with Child() as child:
        return child.do(function, *arguments)


def _serve(channel: socket.socket) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while True:
        asked = _receive(channel, None)
        if asked is None:
            os._exit(0)
        function, arguments = asked
        try:
            answer = (True, function(*arguments))
            pickle.dumps(answer)
        except BaseException:
            answer = (False, traceback.format_exc())
        _send(channel, answer)


def _send(channel: socket.socket, value: Any) -> None:
    data = pickle.dumps(value)
    channel.sendall(struct.pack("<q", len(data)) + data)


def _receive(channel: socket.socket, bound: float | None = BOUND) -> Any:
    def exactly(size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            if not select.select([channel], [], [], bound)[0]:
                raise ChildFailed(f"no answer in {bound} s")
            try:
                more = channel.recv(size - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                return None
            data += more
        return data

    head = exactly(8)
    if head is None:
        return None
    body = exactly(struct.unpack("<q", head)[0])
    return None if body is None else pickle.loads(body)
