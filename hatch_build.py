"""Own the build of the agent (csrc) when pagefold is installed, editable or not: a wheel contains the library and is for this machine."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BuildAgent(BuildHookInterface):  # type: ignore[type-arg]
    """Run `make` in csrc; the library lands in src/pagefold/live."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library before the files of the wheel are gathered."""
        missing = [tool for tool in ("make", "gcc") if shutil.which(tool) is None]
        if missing:
            raise RuntimeError(f"pagefold's agent is C: install {' and '.join(missing)}, then install pagefold again")
        done = subprocess.run(
            ["make", "--no-print-directory", "-C", str(Path(self.root) / "csrc")],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"pagefold's agent could not be built:\n{done.stdout}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"  # ctypes loads it: any Python 3
