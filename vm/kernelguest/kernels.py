"""Own where kernels come from: a cache folder, filled from Debian's archive by apt."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

from kernelguest import cache
from kernelguest.errors import GuestError

VERSIONS = tomllib.loads(Path(__file__).with_name("versions.toml").read_text())
_FETCH = "python -m kernelguest fetch"


def qemu() -> str:
    """Return the name of QEMU's program."""
    return str(VERSIONS["qemu"]["binary"])


def find() -> Path | None:
    """Return the newest kernel in the cache."""
    found = cache.folder().glob("vmlinuz-*")
    return max(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)], default=None)


def why_not(kernel: Path | None = None) -> str | None:
    """Say in a line what is missing to start a guest here, with that kernel if one is given; None if nothing is."""
    if platform.machine() != "x86_64":
        return f"guests run this machine's Python on x86_64, and this is {platform.machine()}"
    if shutil.which(qemu()) is None:
        return f"{qemu()} is not installed; on Debian: apt-get install {VERSIONS['qemu']['package']}"
    for tool in ("timeout", "ldd"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if kernel is not None and not os.access(kernel, os.R_OK):
        return f"the kernel {kernel} cannot be read"
    if kernel is None and find() is None:
        return f"no kernel for guests in {cache.folder()}; fetch one: {_FETCH}"
    return None


def fetch() -> Path:
    """Return the kernel that Debian's archive has today, downloaded if it is not in the cache. GuestError if apt cannot."""
    package = _concrete_package()
    path = cache.folder() / package.replace("linux-image", "vmlinuz", 1)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
        _output(["apt-get", "download", package], Path(folder))
        archives = list(Path(folder).glob("*.deb"))
        if len(archives) != 1:
            raise GuestError(f"apt-get downloaded {len(archives)} files for {package}, not one; try again")
        _output(["dpkg-deb", "--extract", archives[0].name, "."], Path(folder))
        image = Path(folder) / "boot" / path.name
        if not image.is_file():
            raise GuestError(f"the package {package} has no boot/{path.name}; give a kernel by hand")
        image.replace(path)
    return path


def _concrete_package() -> str:
    meta = VERSIONS["kernel"]["package"]
    listing = _output(["apt-cache", "depends", "--important", meta])
    found = re.findall(r"Depends: (linux-image-\S+)", listing)
    if not found:
        raise GuestError(f"apt knows no kernel behind {meta}; run apt-get update, or name another in versions.toml")
    return str(found[0])


def _output(command: list[str], folder: Path | None = None) -> str:
    """Return what a command says; GuestError with its last line of complaint if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise GuestError(
            f"{command[0]} is not installed: kernels are fetched with Debian's apt; give one by hand"
        ) from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise GuestError(f"{' '.join(command)} failed: {said[-1].strip()}")
    return done.stdout
