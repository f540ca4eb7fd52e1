"""Own what tests of the live merger share: daemons and clients, each test's own, always ended, and judged at the end.

`daemons` starts daemons, `daemon` is one of them; `crowd` are clients in this process, `workers` are clients that are processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.live.clients import Crowd
from tests.live.processes import DaemonProcess, Nursery, WorkerProcess, eventually

from pagefold.live.headroom import Headroom

Start = Callable[..., DaemonProcess]


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A folder for sockets, as $XDG_RUNTIME_DIR is one."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def daemons(nursery: Nursery, runtime: Path) -> Iterator[Start]:
    """Start daemons: `daemons("name", knobs={...}, limits={...}, patch={...}, sabotage={...})`.

    Those that still live at the end must be sound, and end well.
    """
    made: list[DaemonProcess] = []

    def start(name: str = "d", **order: Any) -> DaemonProcess:
        made.append(DaemonProcess(nursery, runtime, name, order))
        return made[-1]

    yield start
    living = [one for one in made if one._code is None]
    try:
        for one in living:
            if not one.ended():
                one.judge()
            assert not one.ended(), one.log.read_text()
        for one in living:
            one.stop()
            assert not one.log.read_text()
    finally:
        for one in living:
            if one._code is None:
                one.kill()


@pytest.fixture
def daemon(daemons: Start) -> DaemonProcess:
    """A daemon that merges."""
    return daemons()


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    """Clients in this process: `crowd.join(daemon)`."""
    made = Crowd()
    yield made
    made.close()
    assert made.right(), "memory of a client changed"
    for client in made.clients:
        for buffer in client.buffers.values():
            buffer.unmap()


@pytest.fixture
def workers() -> Iterator[Callable[[Path], WorkerProcess]]:
    """Start clients that are processes; those that still live at the end have the memory they must have."""
    made: list[WorkerProcess] = []

    def start(path: Path) -> WorkerProcess:
        made.append(WorkerProcess(path))
        return made[-1]

    yield start
    living = [one for one in made if one.process.poll() is None]
    try:
        assert all(one.right() for one in living), "memory of a client changed"
    finally:
        for one in made:
            one.kill()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of our own."""
    above = next((folder for folder, _ in Headroom()._groups if os.getuid() == 0 and os.access(folder, os.W_OK)), None)
    if above is None or not any((above / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
        pytest.skip("needs root and a memory cgroup")
    folder = above / f"pagefold-daemon-{os.getpid()}"
    folder.mkdir()
    yield folder
    eventually(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()
