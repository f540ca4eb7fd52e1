"""Be a nursery of daemons: load everything once, then fork a daemon whenever a line of JSON on stdin asks for one.

    {"do": "start", "name", "runtime", "log", "knobs", "limits", "patch", "sabotage", "cgroup", "device"}  -> {"pid"}
    {"do": "reap", "pid"}  -> {"code"}, when it has ended

`patch` gives modules' constants other values: {"pagefold.live.daemon._SAMPLE_SECONDS": 0.02}. `sabotage` ends the daemon at the
n-th call of a function, perhaps counted since another one was called first: {"call": "pagefold.live.peer.Peer.send", "count": 3,
"after": false, "since": "pagefold.live.mirror.Mirror.set"}; faults live here, not in the daemon.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from pagefold.live.daemon import DEFAULTS, Daemon
from pagefold.live.merging import Merging

_PR_SET_PDEATHSIG = 1


def warm() -> None:
    """Load the compiled core, so that daemons need not."""
    knobs = {name: value for name, value in DEFAULTS.items() if name != "max_cpu_percent"}
    merging = Merging(1, knobs)
    mirror = merging.mirror
    process = mirror.attach()
    first = mirror.map(process, 4)
    pages = np.arange(first, first + 4)
    mirror.update(process, pages, np.full(4, 7, np.uint64), np.ones(4, np.uint64))
    for _ in range(3):
        mirror.engine.scan(100)
    mirror.refuse(process, pages)
    mirror.set("run", 2)
    mirror.engine.validate()
    mirror.set("merge_across_nodes", 0)
    mirror.detach(process)
    merging.store.close()


def find(dotted: str) -> tuple[Any, str]:
    """Return the owner of a name and its last part: a module's, or a class's in a module."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ImportError):
            owner: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:-1]:
                owner = getattr(owner, part)
            getattr(owner, parts[-1])  # there must be one
            return owner, parts[-1]
    raise LookupError(dotted)


def sabotage(call: str, count: int, after: bool, since: str = "") -> None:
    """Let the daemon be killed at the n-th call of a function, before it begins or after it has ended."""
    owner, name = find(call)
    assert call != since
    real, calls, counting = getattr(owner, name), 0, not since
    if since:
        begin_owner, begin_name = find(since)
        begin = getattr(begin_owner, begin_name)

        def beginning(*args: Any, **named: Any) -> Any:
            nonlocal counting
            counting = True
            return begin(*args, **named)

        setattr(begin_owner, begin_name, beginning)

    def deadly(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += counting
        if counting and calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = real(*args, **named)
        if counting and calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(owner, name, deadly)


def become_daemon(order: dict[str, Any]) -> int:
    """Serve a domain; return the exit code."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open("/dev/null", os.O_RDONLY)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.close(log)
    os.close(null)
    try:
        os.environ["XDG_RUNTIME_DIR"] = order["runtime"]
        os.environ.pop("PAGEFOLD_SOCKET", None)
        for name, value in order.get("limits", {}).items():
            number = getattr(resource, name)
            resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
        for dotted, value in order.get("patch", {}).items():
            setattr(*find(dotted), value)
        if order.get("sabotage"):
            sabotage(**order["sabotage"])
        if "cgroup" in order:
            (Path(order["cgroup"]) / "cgroup.procs").write_text(str(os.getpid()))
        device = os.open(order["device"], os.O_RDWR | os.O_CLOEXEC) if "device" in order else -1
        Daemon(order["name"], knobs=order.get("knobs", {}), device=device).serve()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 70
    return 0


def main() -> None:
    warm()
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, int]
        if order["do"] == "start":
            pid = os.fork()
            if pid == 0:
                os._exit(become_daemon(order))
            answer = {"pid": pid}
        else:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(order["pid"], 0)[1])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
