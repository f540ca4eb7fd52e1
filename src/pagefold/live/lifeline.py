"""Own a daemon that lives for somebody: it is started with the reading end of a pipe, and ends when the pipe and its last client are gone.

However whoever started it ends, by SIGKILL for instance, the kernel closes the pipe. Must not know: what it is needed for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from pagefold.errors import NotHere, NotPermitted, PagefoldError
from pagefold.live import control, domain

SITE = Path(__file__).parent / "site"  # whose sitecustomize.py lets Python processes find a daemon
_OURS = ("PAGEFOLD_SOCKET", "PAGEFOLD_ENABLE", "NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_START = "from pagefold.cli import command; command()"
_LOOKS = 2  # in a row without any client: others may be about to connect. A domain of one command has no others.
_BETWEEN_LOOKS = 0.5  # seconds
_POLL = 0.01
_ATTEMPTS = 10  # to join or start
_PATIENCE = 60.0  # seconds: a daemon that was just started may be compiling its engine
_MOST_SAID = 65536


class NotStarted(PagefoldError):  # noqa: N818
    """The daemon ended before it served; in its own words."""

    def __init__(self, said: str, exit_code: int) -> None:
        super().__init__(said)
        self.exit_code = exit_code if exit_code > 0 else 1


class Started:
    """A daemon of our own and our end of its pipe."""

    def __init__(self, name: str, path: Path, process: subprocess.Popen[bytes], pipe: int, errors: IO[bytes]) -> None:
        self.name, self.path, self.process = name, path, process
        self._pipe, self._errors = pipe, errors

    @property
    def pid(self) -> int:
        """Return its PID."""
        return self.process.pid

    def ended(self) -> str | None:
        """Return what it said last if it has ended by itself and badly, None while all is well."""
        code = self.process.poll()
        return None if code in (None, 0) else self.last_words() or f"exit code {code}"

    def last_words(self) -> str:
        """Return the last line it wrote on stderr, without its name."""
        self._errors.seek(0)
        lines = self._errors.read(_MOST_SAID).decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("pagefold: ") if lines else ""

    def let_go(self, patience: float = 30.0) -> str:
        """Close our end; "" once it has ended and nothing of it is left, else why it goes on: it ends by itself later.

        Waits no longer than `patience` seconds, and only moments if it has clients.
        """
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        until, seen = time.monotonic() + patience, 0
        while self.process.poll() is None:
            with contextlib.suppress(PagefoldError):
                count = len(control.ask(self.path, {"verb": "clients"}, 1.0)["clients"])
                seen = seen + 1 if count else 0
                if seen > _LOOKS:
                    processes = "a process still uses" if count == 1 else f"{count} processes still use"
                    return f"{processes} the daemon (PID {self.pid}); it ends with the last of them"
            if time.monotonic() > until:
                return f"the daemon (PID {self.pid}) is still busy, and ends when it is done"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_BETWEEN_LOOKS / 2)
        domain.sweep(self.path)
        self._errors.close()
        return ""


def start(name: str, knobs: Mapping[str, str]) -> Started:
    """Start a daemon for a domain and return when it can be connected to. NotStarted: it said why; DomainBusy: another one serves it."""
    path = domain.socket_path(name)
    reading, writing = os.pipe()
    errors = tempfile.TemporaryFile()  # noqa: SIM115  (kept open as long as it may write)
    words = [sys.executable, "-P", "-c", _START, "serve", "--domain", name, "--lifeline", str(reading)]
    words += [word for knob, value in knobs.items() for word in ("--knob", f"{knob}={value}")]
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=[reading],
            env=_own_environment(),
            start_new_session=True,  # what a terminal sends to the command is not meant for it
        )
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    started = Started(name, path, process, writing, errors)
    try:
        while control.served_by(path) != process.pid:
            if process.poll() is not None:
                said = started.last_words()
                raise NotStarted(
                    said or f"the daemon ended at once (exit code {process.returncode})", process.returncode
                )
            time.sleep(_POLL)
    except BaseException:
        started.let_go(0.0)
        raise
    return started


def join_or_start(name: str, knobs: Mapping[str, str]) -> Started | None:
    """Start a daemon for a domain, None if one serves it already: that one gets the knobs."""
    path = domain.socket_path(name)
    for attempt in range(_ATTEMPTS):
        if control.served_by(path):
            if knobs:
                control.ask(path, {"verb": "set", "knobs": dict(knobs)}, _PATIENCE)
            return None
        try:
            return start(name, knobs)
        except NotStarted as error:
            # Another one was faster, and perhaps does not listen yet.
            if error.exit_code != domain.DomainBusy.exit_code or attempt == _ATTEMPTS - 1:
                raise
        time.sleep(_BETWEEN_LOOKS / 10)
    raise AssertionError("unreachable")


def watch(pipe: int, name: str, path: Path) -> None:
    """In the daemon: stop it once nobody holds the other end of the pipe and no client is left. Returns at once."""
    looks = 1 if name.startswith(domain.PRIVATE) else _LOOKS
    threading.Thread(target=_watch, args=(pipe, path, looks), name="lifeline", daemon=True).start()


def _watch(pipe: int, path: Path, looks: int) -> None:
    while os.read(pipe, 1):
        pass
    empty = 0
    while True:
        with contextlib.suppress(control.NoAnswer, control.Refused):
            try:
                empty = 0 if control.ask(path, {"verb": "clients"})["clients"] else empty + 1
                if empty >= looks:
                    control.ask(path, {"verb": "stop"})
                    return
            except (NotHere, NotPermitted):  # it is ending already, or nobody can reach it any more
                os.kill(os.getpid(), signal.SIGTERM)
                return
        time.sleep(_BETWEEN_LOOKS)


def _own_environment() -> dict[str, str]:
    """Return our environment without what would make the daemon a client, of itself or of a daemon around us."""
    environment = {name: value for name, value in os.environ.items() if name not in _OURS}
    folders = environment.pop("PYTHONPATH", "").split(os.pathsep)
    if kept := [folder for folder in folders if folder and Path(folder) != SITE]:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    return environment


def client_environment(path: Path, *, enable: bool) -> dict[str, str]:
    """Return the environment in which every Python process finds the daemon at this path, and enables pagefold if that is wanted."""
    environment = {name: value for name, value in os.environ.items() if name != "PAGEFOLD_ENABLE"}
    environment["PAGEFOLD_SOCKET"] = str(path)
    if enable:
        environment["PAGEFOLD_ENABLE"] = "1"
    before = environment.get("PYTHONPATH")
    folders = before.split(os.pathsep) if before else []  # an empty one is the folder the command is in
    kept = [folder for folder in folders if not folder or Path(folder) != SITE]
    environment["PYTHONPATH"] = os.pathsep.join([str(SITE), *kept])
    return environment
