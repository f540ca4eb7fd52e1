"""Judge daemons that live for somebody: they end with him and their last client, however he ends, and leave nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pagefold.live import control, domain, lifeline

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("PAGEFOLD_SOCKET", raising=False)
    return tmp_path


def eventually(condition: Callable[[], object]) -> bool:
    until = time.monotonic() + 120
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def left(runtime: Path) -> list[str]:
    """Return what lies in the folder of sockets."""
    return sorted(path.name for path in (runtime / "pagefold").iterdir())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Client:
    """A process that joined a daemon."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "plain_client.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PAGEFOLD_SOCKET": str(path)},
        )
        assert self.process.stdout and self.process.stdout.readline() == "joined\n"

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def started() -> Iterator[lifeline.Started]:
    one = lifeline.start(domain.private_name(), {"pages_to_scan": "77"})
    yield one
    if one.process.poll() is None:
        one.process.kill()
    one.let_go()


def test_it_ends_when_it_is_let_go(started: lifeline.Started, runtime: Path) -> None:
    stat = control.ask(started.path, {"verb": "stat"}, 120)
    assert stat["pid"] == started.pid
    assert stat["domain"] == started.name
    assert stat["knobs"]["pages_to_scan"] == 77
    assert started.ended() is None
    assert started.let_go() == ""
    assert not alive(started.pid) and left(runtime) == []
    assert started.ended() is None, "as it should, and not badly"


def test_it_stays_for_its_last_client(started: lifeline.Started, runtime: Path) -> None:
    client = Client(started.path)
    assert started.let_go() == f"a process still uses the daemon (PID {started.pid}); it ends with the last of them"
    assert alive(started.pid) and control.served_by(started.path)
    client.end()
    assert started.let_go() == ""
    assert left(runtime) == []


def test_what_a_killed_daemon_leaves_is_swept(started: lifeline.Started, runtime: Path) -> None:
    assert len(left(runtime)) == 2
    started.process.kill()
    started.process.wait()
    assert started.ended() == "exit code -9"
    assert started.let_go() == ""
    assert left(runtime) == []


def test_it_hears_no_signal_of_the_terminal(started: lifeline.Started) -> None:
    assert os.getsid(started.pid) == started.pid != os.getsid(0)


STARTER = """
import sys, time
from pagefold.live import domain, lifeline
started = lifeline.start(sys.argv[1], {})
print(started.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("name", ["run-killed", "shared"])
def test_it_ends_when_whoever_started_it_is_killed(name: str, runtime: Path) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, name], stdout=subprocess.PIPE, text=True)
    assert starter.stdout
    pid = int(starter.stdout.readline())
    client = Client(domain.socket_path(name))
    starter.kill()
    starter.communicate()
    time.sleep(1)
    assert alive(pid), "its client still lives"
    assert control.ask(domain.socket_path(name), {"verb": "clients"}, 120)["clients"]
    client.process.kill()
    client.end()
    assert eventually(lambda: not alive(pid))
    assert left(runtime) == []


def test_it_ends_when_its_socket_was_taken_away(started: lifeline.Started) -> None:
    """Nobody can reach it any more."""
    control.ask(started.path, {"verb": "stat"}, 120)
    started.path.unlink()
    assert started.let_go() == ""


def test_a_daemon_that_cannot_start_says_why(runtime: Path) -> None:
    name = domain.private_name()
    with pytest.raises(lifeline.NotStarted, match=r"^run: 9 is out of range; use 0 to 2$"):
        lifeline.start(name, {"run": "9"})
    assert left(runtime) == [] if (runtime / "pagefold").exists() else True


def test_joining(started: lifeline.Started) -> None:
    control.ask(started.path, {"verb": "stat"}, 120)
    assert lifeline.join_or_start(started.name, {"sleep_millisecs": "5"}) is None
    assert control.ask(started.path, {"verb": "stat"})["knobs"]["sleep_millisecs"] == 5
    with pytest.raises(lifeline.NotStarted, match="a daemon serves this already"):
        lifeline.start(started.name, {})


def test_of_many_at_once_one_starts_it_and_all_use_it(runtime: Path) -> None:
    script = """
import json, sys
from pagefold.live import control, domain, lifeline
sys.stdin.readline()
started = lifeline.join_or_start("crowd", {})
print(json.dumps([started is not None, control.ask(domain.socket_path("crowd"), {"verb": "stat"}, 120)["pid"]]), flush=True)
sys.stdin.readline()
if started: started.let_go()
"""
    crowd = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for _ in range(1):
        for one in crowd:
            assert one.stdin
            one.stdin.write("\n")
            one.stdin.flush()
    answers = []
    for one in crowd:
        assert one.stdout
        answers.append(json.loads(one.stdout.readline()))
    assert sum(began for began, _ in answers) == 1
    assert len({pid for _, pid in answers}) == 1
    for one in crowd:
        one.communicate("\n")
    assert eventually(lambda: not alive(answers[0][1]))
    assert left(runtime) == []


def test_the_daemon_is_no_client_of_itself(started: lifeline.Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFOLD_SOCKET", "/somewhere")
    monkeypatch.setenv("PAGEFOLD_ENABLE", "1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/somewhere")
    monkeypatch.setenv("PYTHONPATH", f"{lifeline.SITE}:/also:")
    other = lifeline.start(domain.private_name(), {})
    said = Path(f"/proc/{other.pid}/environ").read_bytes().split(b"\0")
    assert not [word for word in said if word.startswith((b"PAGEFOLD_", b"NOTIFY_"))]
    assert b"PYTHONPATH=/also" in said
    assert other.let_go() == ""


def test_the_environment_of_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"/one:{lifeline.SITE}::/two")
    monkeypatch.setenv("PAGEFOLD_ENABLE", "1")
    environment = lifeline.client_environment(Path("/there"), enable=False)
    assert environment["PAGEFOLD_SOCKET"] == "/there"
    assert "PAGEFOLD_ENABLE" not in environment
    assert environment["PYTHONPATH"] == f"{lifeline.SITE}:/one::/two", "an empty one is the folder the command is in"
    assert environment["PATH"] == os.environ["PATH"]
    monkeypatch.delenv("PYTHONPATH")
    environment = lifeline.client_environment(Path("/there"), enable=True)
    assert (environment["PAGEFOLD_ENABLE"], environment["PYTHONPATH"]) == ("1", str(lifeline.SITE))
    assert (lifeline.SITE / "sitecustomize.py").is_file()
