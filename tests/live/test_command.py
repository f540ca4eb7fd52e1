"""Judge the running of a command as if nobody stood between: exit codes, descriptors, terminal, and every signal once."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUNNER = """
import os, sys
from pagefold.errors import PagefoldError
from pagefold.live.command import run
try:
    code = run(sys.argv[1:], {**os.environ, "TOLD": "yes"}, lambda pid: None)
except PagefoldError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
sys.exit(code)
"""
# Counts what it gets, says so, and ends at SIGUSR2.
COUNTER = """
import os, signal, sys
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: (got.append(number), print("got", signal.Signals(number).name, flush=True)))
signal.signal(signal.SIGUSR2, lambda number, frame: (print("in all", len(got), flush=True), sys.exit(0)))
print("ready", os.getpid(), flush=True)
while True:
    signal.pause()
"""


def words(*command: str) -> list[str]:
    return [sys.executable, "-c", RUNNER, *command]


def run(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words(*command), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("code", [0, 1, 7, 77, 255])
def test_exit_codes(code: int) -> None:
    assert run("sh", "-c", f"exit {code}").returncode == code


@pytest.mark.parametrize("name", ["KILL", "TERM", "SEGV", "INT"])
def test_ended_by_a_signal(name: str) -> None:
    assert run("sh", "-c", f"kill -{name} $$").returncode == 128 + signal.Signals[f"SIG{name}"]


def test_input_output_and_environment() -> None:
    done = run("sh", "-c", "cat; echo $TOLD; echo err >&2", input="in\n")
    assert (done.stdout, done.stderr) == ("in\nyes\n", "err\n")


def test_descriptors_go_through() -> None:
    """As those of a job server or a service manager."""
    reading, writing = os.pipe()
    done = subprocess.run(words("sh", "-c", f"echo through > /dev/fd/{writing}"), pass_fds=[writing], check=False)
    os.close(writing)
    with os.fdopen(reading) as file:
        assert file.read() == "through\n"
    assert done.returncode == 0


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    done = run("pagefold-nonsense", "x")
    assert done.returncode == 127
    assert done.stderr.startswith("pagefold-nonsense: No such file or directory; give")
    (tmp_path / "text").write_text("no program\n")
    done = run(str(tmp_path / "text"))
    assert done.returncode == 126
    assert "Permission denied" in done.stderr


def masks(text: str) -> dict[str, int]:
    """Return the signals of lines of /proc/PID/status, less those that Python ignores and the two that the C library keeps."""
    ordinary = (1 << 31) - 1 & ~sum(1 << number - 1 for number in (signal.SIGPIPE, signal.SIGXFSZ))
    words = [line.split() for line in text.splitlines() if line.startswith(("SigIgn", "SigBlk"))]
    return {name: int(mask, 16) & ordinary for name, mask in words}


def test_dispositions_are_a_programs() -> None:
    """Python ignores SIGPIPE; what it starts must not. None is left blocked, or ignored that the caller (nohup) does not ignore."""
    done = run("sh", "-c", "exec grep -E 'Sig(Ign|Blk)' /proc/self/status")
    assert masks(done.stdout) == masks(Path("/proc/self/status").read_text())
    for line in done.stdout.splitlines():
        assert not int(line.split()[1], 16) & 1 << signal.SIGPIPE - 1
    assert masks(done.stdout)["SigBlk:"] == 0


def start(*command: str) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(words(*command), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    ready, pid = process.stdout.readline().split()
    assert ready == "ready"
    return process, int(pid)


def test_signals_are_passed_on() -> None:
    process, _ = start(sys.executable, "-c", COUNTER)
    assert process.stdout
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1):
        process.send_signal(number)
        assert process.stdout.readline() == f"got {number.name}\n"
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.read() == "in all 5\n"
    assert process.wait() == 0


def test_what_the_command_sends_to_us_does_not_return_to_it() -> None:
    """It signals its whole group, as an init does at the end: it got that by itself."""
    script = COUNTER.replace('print("ready"', 'os.kill(0, signal.SIGTERM)\nprint("ready"')
    process = subprocess.Popen(
        words(sys.executable, "-c", script), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    assert process.stdout.readline() == "got SIGTERM\n"
    assert process.stdout.readline().startswith("ready ")
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.read() == "in all 1\n"
    process.wait()


def test_ignored_children_are_waited_for() -> None:
    """Some callers leave SIGCHLD ignored."""
    done = subprocess.run(
        words("sh", "-c", "exit 5"), preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN), check=False
    )
    assert done.returncode == 5


class Terminal:
    """A terminal of its own, with a program in its foreground."""

    def __init__(self, *command: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)
        self.text = ""

    def until(self, text: str) -> str:
        """Read until this was printed; return all that was."""
        end = time.monotonic() + 60
        while text not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.fd, 4096).decode()
                except OSError:  # it was hung up
                    assert text in self.text, self.text
        said, self.text = self.text, ""
        return said

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def end(self) -> int:
        """Wait for the program's end; return its exit code."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return code

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)  # hangs up: whoever is left in its session ends
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.end()


def test_the_terminal_is_the_commands() -> None:
    with Terminal(
        *words("sh", "-c", "test -t 0 && test -t 1 && test -t 2 && read line && echo said $line")
    ) as terminal:
        terminal.type(b"hello\n")
        terminal.until("said hello")
        assert terminal.end() == 0


def test_what_a_terminal_sends_arrives_once() -> None:
    with Terminal(*words(sys.executable, "-c", COUNTER)) as terminal:
        pid = int(terminal.until("\n").split()[1])
        terminal.type(b"\x03")
        terminal.until("got SIGINT")
        terminal.type(b"\x1c")
        terminal.until("got SIGQUIT")
        os.kill(pid, signal.SIGUSR2)
        terminal.until("in all 2")
        assert terminal.end() == 0


def test_stopping_and_going_on() -> None:
    """Ctrl-Z stops both, and the shell has its job."""
    script = 'set -m; "$@"; echo "stopped with $?"; fg; exit $?'
    with Terminal("/bin/bash", "-c", script, "bash", *words(sys.executable, "-c", COUNTER)) as terminal:
        pid = int(terminal.until("\n").split()[1])
        terminal.type(b"\x1a")
        terminal.until(f"stopped with {128 + signal.SIGTSTP}")
        runner = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(runner, signal.SIGUSR1)
        terminal.until("got SIGUSR1")
        os.kill(runner, signal.SIGUSR2)
        terminal.until("in all 1")
        assert terminal.end() == 0
