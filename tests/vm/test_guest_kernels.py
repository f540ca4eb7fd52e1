"""Judge how kernels are found and fetched, by an apt of our own; and the command line's words."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernelguest import GuestError, fetch, find, kernels, why_not
from kernelguest.__main__ import main

VM = Path(__file__).parents[2] / "vm"
VERSION = "6.12.3+deb12-cloud-amd64"
APT = {
    "apt-cache": f'echo "{kernels.VERSIONS["kernel"]["package"]}"; echo "  Depends: linux-image-{VERSION}"',
    "apt-get": 'echo "$@" >> "$CALLS"; echo debian > "$2.deb"',
    "dpkg-deb": f"mkdir boot && echo kernel > boot/vmlinuz-{VERSION}",
}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give us an empty cache and an apt that downloads nothing; return the file that lists its downloads."""
    (tmp_path / "bin").mkdir()
    for name, text in APT.items():
        replace(tmp_path, name, text)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def replace(folder: Path, name: str, text: str) -> None:
    """Write a command of our own."""
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_kernel_is_fetched_once(calls: Path) -> None:
    assert find() is None
    path = fetch()
    assert path.name == f"vmlinuz-{VERSION}" and path.read_text() == "kernel\n"
    assert fetch() == path == find()
    assert calls.read_text() == f"download linux-image-{VERSION}\n"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_newest_kernel_is_found_by_its_numbers(calls: Path) -> None:
    folder = fetch().parent
    for version in ("6.9.12-amd64", "6.12.117+deb12-cloud-amd64", "6.12.20+deb12-cloud-amd64"):
        (folder / f"vmlinuz-{version}").touch()
    assert find() == folder / "vmlinuz-6.12.117+deb12-cloud-amd64"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("apt-cache", "exit 0", "apt knows no kernel behind linux-image-6.12-cloud-amd64; run apt-get update"),
        ("apt-cache", "echo 'E: No packages found' >&2; exit 100", "apt-cache depends .* failed: E: No packages found"),
        ("apt-get", "echo 'E: Failed to fetch' >&2; exit 100", "apt-get download .* failed: E: Failed to fetch"),
        ("apt-get", "exit 1", "apt-get download .* failed: exit code 1"),
        ("apt-get", "true", "apt-get downloaded 0 files"),
        ("dpkg-deb", "mkdir boot", "has no boot/vmlinuz-"),
    ],
)
def test_each_failure_to_fetch_is_a_line(calls: Path, name: str, text: str, reason: str) -> None:
    replace(calls.parent, name, text)
    with pytest.raises(GuestError, match=reason):
        fetch()
    assert find() is None
    assert not (calls.parent / "cache" / "kernelguest").exists() or not list(
        (calls.parent / "cache" / "kernelguest").iterdir()
    )


def test_without_apt_the_remedy_is_said(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(GuestError, match="apt-cache is not installed: kernels are fetched with Debian's apt"):
        fetch()


def test_what_is_missing_is_said_in_order(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timeout", "ldd"):
        replace(calls.parent, name, "")
    monkeypatch.setenv("PATH", str(calls.parent / "bin"))
    assert why_not() == "qemu-system-x86_64 is not installed; on Debian: apt-get install qemu-system-x86"
    replace(calls.parent, "qemu-system-x86_64", "")
    assert (
        why_not() == f"no kernel for guests in {calls.parent}/cache/kernelguest; fetch one: python -m kernelguest fetch"
    )
    assert why_not(Path(__file__)) is None
    assert why_not(Path("/nowhere/vmlinuz")) == "the kernel /nowhere/vmlinuz cannot be read"
    (calls.parent / "bin" / "timeout").unlink()
    assert why_not() == "timeout is not installed"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert why_not() == "guests run this machine's Python on x86_64, and this is aarch64"


def test_the_command_line_fetches(calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch"]) == 0
    assert capsys.readouterr().out == f"{find()}\n"
    replace(calls.parent, "apt-cache", "exit 0")
    assert main(["fetch"]) == 125
    assert capsys.readouterr().err.startswith("kernelguest: apt knows no kernel")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["run", "program.py", "--nodes", "9"], "kernelguest: 9 nodes: choose 1 to 8\n"),
        (["run", "program.py", "--nodes", "2", "--hotplug", "0"], "kernelguest: node 0 cannot be hot-plugged"),
        (["run", "program.py"], "kernelguest: "),
    ],
)
def test_a_failure_of_ours_is_a_line_and_125(
    calls: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    assert main(words) == 125
    told = capsys.readouterr().err
    assert told.startswith(reason) and told.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["fetch", "--help"], ["run", "--help"]])
def test_help_is_there(words: list[str]) -> None:
    command = [sys.executable, "-m", "kernelguest", *words]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(VM)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m kernelguest")


@pytest.mark.parametrize("words", [[], ["walk"], ["run"], ["run", "program.py", "--nodes", "two"]])
def test_bad_words_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and "usage: " in capsys.readouterr().err


def test_the_package_stands_alone() -> None:
    """It imports the standard library and itself, in one direction; what runs in the guest not even itself."""
    order = [
        "errors",
        "complaints",
        "cache",
        "cpio",
        "vmlinux",
        "packages",
        "initramfs",
        "machine",
        "kernels",
        "guest",
        "__init__",
        "__main__",
    ]
    for path in sorted((VM / "kernelguest").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                package, _, rest = name.partition(".")
                if package == "kernelguest":
                    assert path.stem in order and order.index(rest.partition(".")[0]) < order.index(path.stem), (
                        path,
                        name,
                    )
                else:
                    assert package in sys.stdlib_module_names, (path, name)
