"""Judge the talk with a service manager: states arrive, descriptors are found, and without one nothing happens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pagefold.live.sd_notify import notify, passed_descriptors

SHOW = """
import os
from pagefold.live.sd_notify import passed_descriptors
for name, fd in passed_descriptors():
    print(repr(name), fd, os.get_inheritable(fd), os.readlink(f"/proc/self/fd/{fd}"))
print(sorted(name for name in os.environ if name.startswith("LISTEN_")), passed_descriptors())
"""


@pytest.mark.parametrize("abstract", [False, True])
def test_a_state_arrives(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"\0pagefold-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        assert notify("READY=1")
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all", "@pagefold-nobody-listens"])
def test_no_manager(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not notify("READY=1")


def passing(count: int, names: str | None, pid: str = "$$") -> list[str]:
    """Run SHOW as a manager would, with /dev/null and /dev/zero as descriptors 3 and 4."""

    def place() -> None:
        null, zero = os.open("/dev/null", os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)
        high = [os.dup2(null, 100), os.dup2(zero, 101)]
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    told = "" if names is None else f"LISTEN_FDNAMES={names}"
    script = f'export LISTEN_PID={pid} LISTEN_FDS={count} {told}; exec "$0" -c "$1"'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, SHOW],
        preexec_fn=place,
        pass_fds=(3, 4),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_descriptors_are_found_by_name() -> None:
    lines = passing(2, "one:userfaultfd")
    assert lines == ["'one' 3 False /dev/null", "'userfaultfd' 4 False /dev/zero", "[] []"]


def test_descriptors_without_names() -> None:
    assert passing(2, None)[:2] == ["'' 3 False /dev/null", "'' 4 False /dev/zero"]
    assert passing(2, "one")[:2] == ["'one' 3 False /dev/null", "'' 4 False /dev/zero"]


def test_what_is_meant_for_another_process_is_not_taken() -> None:
    assert passing(2, "one:two", pid="1") == ["[] []"]


def test_nothing_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "many")
    assert passed_descriptors() == []
    assert "LISTEN_FDS" not in os.environ
