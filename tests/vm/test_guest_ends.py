"""Judge how guests end: by themselves with any status, by a panic, by force; and that nothing is left of them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kernelguest import Guest, GuestDied, GuestError, GuestHung

pytestmark = [pytest.mark.guest, pytest.mark.usefixtures("guests")]
Program = Callable[[str], Path]
VM = Path(__file__).parents[2] / "vm"
PATIENCE = 60.0  # seconds for a process to be gone; it is in one


def group_of(guest: Guest) -> int:
    """Return the group of the guest's processes."""
    assert guest._process is not None
    return guest._process.pid


def gone(group: int) -> bool:
    """Wait until no process of a group is left."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def folder_of(guest: Guest) -> Path:
    """Return the guest's temporary folder."""
    assert guest._folder is not None
    return guest._folder


def test_a_program_that_reads_to_the_end_can_still_answer(program: Program, tmp_path: Path) -> None:
    """The command line, two nodes, two processors, and a code that is not 0."""
    path = program("""
        import hashlib, os, sys
        online = open("/sys/devices/system/node/online").read().strip()
        data = sys.stdin.buffer.read()
        print(hashlib.sha256(data).hexdigest(), os.cpu_count(), online, sys.argv[1:], flush=True)
        sys.stdout.buffer.write(data + data)
        sys.exit(3)
    """)
    data = os.urandom(1 << 20)
    words = ["run", str(path), "--nodes", "2", "--cpus", "2", "--bound", "120", "--", "-x", "--nodes"]
    done = subprocess.run(
        [sys.executable, "-m", "kernelguest", *words],
        input=data,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(VM)},
        check=False,
    )
    line, _, rest = done.stdout.partition(b"\n")
    assert line.decode() == f"{hashlib.sha256(data).hexdigest()} 2 0-1 ['-x', '--nodes']", done.stderr.decode()
    assert rest == data + data
    assert done.returncode == 3
    assert b"reboot: Power down" in done.stderr


def test_an_exception_is_code_1_and_a_traceback_on_the_console(program: Program) -> None:
    with Guest(
        program("print(open('/sys/devices/system/node/online').read())\nraise ValueError('told so')"), bound=120
    ) as guest:
        group = group_of(guest)
        assert guest.stdout.readline() == b"0\n"
        while guest.stdout.read(1 << 16):
            pass
    assert guest.exit_code == 1
    assert "raise ValueError('told so')" in guest.log() and "ValueError: told so" in guest.log()
    assert guest.complaints() == []
    assert gone(group)


def test_a_signal_is_a_negative_code(program: Program) -> None:
    """And an orphan of the program ends with the guest."""
    path = program("""
        import os, signal, time
        if not os.fork():
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGSEGV)
    """)
    with Guest(path, bound=120) as guest:
        assert folder_of(guest).exists()
        assert guest.stdout.read(1) == b""
    assert guest.exit_code == -signal.SIGSEGV
    assert not folder_of(guest).exists()


def test_a_panic_is_a_death_with_the_kernels_own_words(program: Program) -> None:
    path = program("""
        import sys
        print(sys.stdin.readline(), end="", flush=True)
        sys.stderr.write("[    0.000000] half a line ")
        with open("/proc/sysrq-trigger", "w") as trigger:
            trigger.write("c")
        sys.stdin.read()
    """)
    guest = Guest(path, bound=120)
    with (
        pytest.raises(GuestDied, match="before its program did; Kernel panic - not syncing: sysrq triggered crash"),
        guest,
    ):
        guest.stdin.write(b"answer\n")
        assert guest.stdout.readline() == b"answer\n"
        assert guest.stdout.read(1) == b""
    assert guest.exit_code is None
    assert guest.complaints() == ["Kernel panic - not syncing: sysrq triggered crash"]
    assert "Call Trace:" in guest.log()


def test_a_hung_guest_is_ended_at_its_bound_and_its_host_error_says_so(program: Program) -> None:
    path = program("""
        import signal, time
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(3600)
    """)
    with pytest.raises(EOFError, match="no answer") as caught, Guest(path, bound=6) as guest:
        group = group_of(guest)
        if not guest.stdout.read(1):
            raise EOFError("no answer")
    assert caught.value.__notes__[0].startswith("the guest did not end within its bound of 6 s; killed")
    assert guest.exit_code is None
    assert gone(group) and not folder_of(guest).exists()


def test_a_program_that_ignores_the_end_of_its_input_is_killed(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernelguest.guest._GRACE", 0.5)
    guest = Guest(program("import time\ntime.sleep(3600)"), bound=120)
    with pytest.raises(GuestHung, match=r"went on for 0\.5 s after the end of its input; killed"), guest:
        group = group_of(guest)
    assert gone(group)


def test_a_killed_parent_leaves_no_guest(program: Program) -> None:
    """The program sees the end of its input, as it would had we closed it, and the guest powers off long before its bound."""
    echo = program("import sys\nfor line in sys.stdin: print(line, end='', flush=True)")
    parent = f"""
import sys, time
from pathlib import Path
from kernelguest import Guest
with Guest(Path({str(echo)!r}), bound=500) as guest:
    guest.stdin.write(b"up\\n")
    guest.stdout.readline()
    print(guest._process.pid, guest._folder, flush=True)
    time.sleep(3600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(VM)},
    ) as process:
        assert process.stdout is not None
        group, folder = process.stdout.readline().split()
        process.kill()
    assert gone(int(group))
    for file in Path(os.fsdecode(folder)).iterdir():  # a killed parent cannot
        file.unlink()
    Path(os.fsdecode(folder)).rmdir()


def test_a_machine_that_qemu_refuses_is_a_death_in_its_words(program: Program) -> None:
    guest = Guest(program("pass"), kernel=Path(__file__), bound=60)
    with pytest.raises(GuestDied, match="before its program did; qemu: linux kernel too old"), guest:
        assert guest.stdout.read(1) == b""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(nodes=0), "0 nodes: choose 1 to 8"),
        (dict(nodes=9), "9 nodes"),
        (dict(cpus=0), "0 processors"),
        (dict(mib_per_node=100), "100 MiB a node: choose a multiple of 128"),
        (dict(nodes=2, hotplug=[0]), "node 0 cannot be hot-plugged"),
        (dict(nodes=2, hotplug=[2]), "node 2 cannot be hot-plugged"),
        (dict(bound=0), "a bound of 0 seconds"),
        (dict(arguments=["x" * 1000]), "characters too long"),
        (dict(arguments=["a\0b"]), "zero byte"),
    ],
)
def test_a_machine_that_cannot_be_is_refused_at_once(options: dict[str, object], reason: str) -> None:
    with pytest.raises(GuestError, match=reason):
        Guest(Path("program.py"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("def broken(:\n", r"does not compile: .*program\.py:1: "), (None, "cannot be read: No such file")],
)
def test_a_program_that_cannot_run_is_refused_before_the_boot(
    program: Program, text: str | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "missing.py" if text is None else program(text)
    with pytest.raises(GuestError, match=reason), Guest(path):
        pass


def test_a_missing_kernel_is_named() -> None:
    with (
        pytest.raises(GuestError, match="the kernel /nowhere/vmlinuz cannot be read"),
        Guest(Path(__file__), kernel=Path("/nowhere/vmlinuz")),
    ):
        pass
