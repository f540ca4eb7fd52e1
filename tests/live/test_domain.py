"""Judge where daemons are found: names and folders are checked, one daemon has a path, the dead leave it to the living."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagefold.errors import NotPermitted, UsageError
from pagefold.live import domain
from pagefold.live.domain import DomainBusy, check_name, listen, socket_path, sweep, sweep_private

LISTENER = """
import sys, time
from pathlib import Path
from pagefold.live.domain import listen
sock = listen(Path(sys.argv[1]))
print("listening", flush=True)
sys.stdin.read()
sock.close()
"""


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("PAGEFOLD_SOCKET", raising=False)
    return tmp_path


def listener(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "listening\n"
    return process


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


# --- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "a", "web-2", "A_b.c", "0", "-", "x" * 64, domain.private_name()])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a b", "a\n", "ä", "x" * 65, "a\0b", "$HOME"])
def test_bad_names(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a domain; use 1 to 64"):
        socket_path(name)


def test_private_names_differ() -> None:
    assert len({domain.private_name() for _ in range(50)}) == 50


def test_the_variable_names_the_socket_and_a_named_domain_wins(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert socket_path() == runtime / "pagefold" / "default.sock"
    monkeypatch.setenv("PAGEFOLD_SOCKET", "/somewhere/else")
    assert socket_path() == Path("/somewhere/else")
    assert socket_path("web") == runtime / "pagefold" / "web.sock"


def test_a_runtime_folder_of_another_user_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after sudo, which keeps the variable."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(tmp_path, 65534, 65534)
    assert domain.folder() == Path("/tmp/pagefold-0")
    for value in ("", "relative", str(tmp_path / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert domain.folder() == Path("/tmp/pagefold-0")


def test_a_path_that_no_socket_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFOLD_SOCKET", "/" + "x" * 107)
    with pytest.raises(UsageError, match="longer than the 107 bytes"):
        socket_path()


def open_to_all(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)


def of_others(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)


def a_link(folder: Path) -> None:
    folder.with_name("real").mkdir(mode=0o700)
    folder.symlink_to("real")


def a_file(folder: Path) -> None:
    folder.touch(0o700)


@pytest.mark.parametrize("make", [open_to_all, of_others, a_link, a_file])
def test_a_folder_that_others_may_write_to_is_refused(make: object, runtime: Path) -> None:
    if make is of_others and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    assert callable(make)
    make(runtime / "pagefold")
    for use in (socket_path, lambda: listen(runtime / "pagefold" / "default.sock")):
        with pytest.raises(NotPermitted, match="XDG_RUNTIME_DIR"):
            use()


# --- listening ------------------------------------------------------------------------------------------------------------


def test_the_socket_is_for_this_user_alone_and_leaves_nothing(runtime: Path) -> None:
    path = socket_path()
    listening = listen(path)
    assert listening.type == socket.SOCK_SEQPACKET and not listening.get_inheritable()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_ISSOCK(path.stat().st_mode) and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert connects(path)
    listening.close()
    listening.close()
    assert list(path.parent.iterdir()) == []


def test_two_daemons_do_not_share_a_path() -> None:
    path = socket_path()
    with listen(path) as first:
        for _ in range(2):
            with pytest.raises(DomainBusy, match="a daemon serves this already"):
                listen(path)
        assert connects(path), "the first one lost its socket"
        assert first.fileno() >= 0
    with listen(path):
        assert connects(path)


def test_what_a_killed_daemon_left_is_replaced() -> None:
    path = socket_path()
    process = listener_in_folder(path)
    process.kill()
    process.communicate()
    assert path.exists() and not connects(path)
    with listen(path):
        assert connects(path)
    assert list(path.parent.iterdir()) == []


def listener_in_folder(path: Path) -> subprocess.Popen[str]:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return listener(path)


def test_the_lock_is_not_inherited() -> None:
    """A child that outlives its daemon must not keep the path."""
    path = socket_path()
    script = LISTENER.replace('print("', 'import subprocess; child = subprocess.Popen(["sleep", "1000"])\nprint("')
    script = script.replace('"listening"', "child.pid")
    path.parent.mkdir(mode=0o700)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        listen(path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_socket_of_somebody_else_stays() -> None:
    """As one that systemd listens at: there is no lock, but it answers."""
    path = socket_path()
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs:
        theirs.bind(str(path))
        theirs.listen(8)
        with pytest.raises(DomainBusy):
            listen(path)
        assert not sweep(path)
        assert connects(path)


def test_one_of_many_at_once_gets_the_path() -> None:
    path = socket_path()
    path.parent.mkdir(mode=0o700)
    script = LISTENER.replace("sock = listen", "sys.stdin.readline()\nsock = listen")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    said = []
    for process in processes:  # a loser ends by itself, the winner waits for the end of its stdin
        assert process.stdout
        said.append(process.stdout.readline())
    assert sorted(said) == ["", "", "", "", "", "listening\n"]
    assert connects(path)
    for process in processes:
        process.communicate()
    assert list(path.parent.iterdir()) == []


def test_a_place_that_cannot_be(runtime: Path) -> None:
    with pytest.raises(NotPermitted, match="name another place"):
        listen(runtime / "missing" / "a.sock")


# --- sweeping -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dead() -> Iterator[Path]:
    path = socket_path(domain.private_name())
    process = listener_in_folder(path)
    process.kill()
    process.communicate()
    yield path


def test_sweeping_takes_what_the_dead_left_and_spares_the_living(dead: Path) -> None:
    living = socket_path(domain.private_name())
    with listen(living), listen(socket_path("web")):
        half = dead.with_name(f"{domain.PRIVATE}half.sock.lock")
        half.touch()
        sweep_private()
        assert {path.name for path in dead.parent.iterdir()} == {
            *(living.name, f"{living.name}.lock"),
            *("web.sock", "web.sock.lock"),
        }
        assert not sweep(living)
        assert connects(living)
    assert sweep(living)


def test_nothing_to_sweep() -> None:
    assert sweep(socket_path())
    sweep_private()
