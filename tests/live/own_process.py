"""Own tests that need a process to themselves: the agent is one per process, and so are NumPy's memory handler and how a process ends."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BOUND = 120.0  # seconds; nothing takes a tenth of it, and nothing may hang
ROOT = Path(__file__).parents[2]
_RUN = "import sys; sys.path.insert(0, {root!r}); from {module} import {name} as test; test.__wrapped__(*{arguments!r})"


def own_process(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a fresh interpreter; whatever it says on stderr is an error.

    Its arguments must be plain values. A daemon is one too: the interpreter's domain is that daemon's, and the test gets its socket.
    """

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        module = f"tests.live.{Path(test.__code__.co_filename).stem}"
        sockets = [str(value.path) for value in arguments.values() if hasattr(value, "ask")]
        values = [str(value.path) if hasattr(value, "ask") else value for value in arguments.values()]
        code = _RUN.format(root=str(ROOT), module=module, name=test.__name__, arguments=values)
        done = python("-c", code, **({"PAGEFOLD_SOCKET": sockets[0]} if sockets else {}))
        if done.returncode == 75:
            pytest.skip(done.stdout.strip().splitlines()[-1])
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        assert not done.stderr, done.stderr

    return run


def skip(why: str) -> None:
    """End the process of a test that cannot be run here."""
    print(why, flush=True)
    os._exit(75)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an interpreter of its own to its end; if it hangs, it says where."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PAGEFOLD_")}
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | {"PAGEFOLD_SOCKET": f"/tmp/pagefold-no-daemon-{os.getpid()}"} | environment,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=BOUND)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler prints where it hangs
        out, errors = process.communicate()
        errors = f"hung for {BOUND:.0f} s\n{errors}"
    finally:
        with contextlib.suppress(ProcessLookupError):  # children that were left behind
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)
