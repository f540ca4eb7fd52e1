"""Judge the plan by the kernel on programs that are not ours: what was predicted, and what ksmd then reached on the same living processes.

Every program is started by a wrapper that lets its own process merge as a whole (PR_SET_MEMORY_MERGE, which is kept over exec since Linux
6.10) and then becomes it. At rest it is planned; then ksmd runs at full speed until its counters stay. Both figures are a line of a table.

usage: python benchmarks/accuracy.py [NAME ...] [--rounds N] [--interval SECONDS] [--json]     (needs root: it borrows the kernel's KSM)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pagefold.errors import PagefoldError
from pagefold.plan import PageTable, predict
from pagefold.plan.reading import Reader
from pagefold.scenario.kernel_ksm import KernelKsm

OPT_IN = (
    "import ctypes, os, sys; assert ctypes.CDLL(None).prctl(67, 1, 0, 0, 0) == 0; os.execvp(sys.argv[1], sys.argv[1:])"
)
FULL_SPEED = {"smart_scan": 0, "sleep_millisecs": 0, "pages_to_scan": 100_000}
CALM = 0.001  # of pages_sharing: what may still come or go between two looks at counters that stay
MOST_SCANS = 200
PYTHON = sys.executable
LOAD = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print("ready", flush=True)
sys.stdin.read()
"""
FORKS = """
import multiprocessing, sys
import numpy, pandas
table = pandas.DataFrame({name: numpy.random.default_rng(number).normal(size=500_000) for number, name in enumerate("abcdefgh")})

def work(number, ready, end):
    part = table.iloc[number * 100_000:(number + 1) * 100_000].copy()  # its own
    everybody = table.groupby(table["a"].round(1)).mean()  # equal in all of them
    ready.put((len(part), len(everybody)))
    end.wait()

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    ready, end = context.Queue(), context.Event()
    workers = [context.Process(target=work, args=(number, ready, end)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        ready.get()
    print("ready", flush=True)
    sys.stdin.read()
    end.set()
"""
PAGE = """<!DOCTYPE html><title>table</title><body><table id=t></table><script>
for (let row = 0; row < 3000; row++) document.getElementById("t").insertRow().innerHTML = `<td>${row}<td>${row * row}<td>cell`;
</script>"""
TICKS = """<script>
let ticks = 0;
setInterval(() => document.getElementById("t").rows[ticks++ % 100].cells[2].textContent = Date.now(), 50);
</script>"""


@dataclass
class Row:
    """One program's result; pages."""

    name: str
    processes: int
    pages: int
    volatile: int
    predicted: int  # pages_sharing
    reached: int
    scans: int

    @property
    def error(self) -> float:
        """Return how far the prediction is from what was reached, in percent of the latter."""
        return 100 * (self.predicted - self.reached) / self.reached if self.reached else 0.0


class Crew:
    """Programs of one subject, and all processes below them; ended together."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.roots: list[subprocess.Popen[str]] = []

    def start(self, *command: str, talks: bool = True) -> subprocess.Popen[str]:
        """Start a program that may merge as a whole; what it says is read only if it talks."""
        process = subprocess.Popen(
            [PYTHON, "-I", "-S", "-c", OPT_IN, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if talks else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.roots.append(process)
        self.stack.callback(self._end, process)
        return process

    def await_word(self, process: subprocess.Popen[str], word: str = "ready") -> None:
        """Wait for a line with a word."""
        assert process.stdout is not None
        for line in process.stdout:
            if word in line:
                return
        raise PagefoldError(f"{process.args!r} ended before it was ready")

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        below = descendants(process.pid)
        if process.stdin is not None:
            process.stdin.close()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            for pid in [process.pid, *below]:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def pids(self) -> list[int]:
        """Return all processes."""
        return [pid for root in self.roots for pid in (root.pid, *descendants(root.pid))]


def descendants(pid: int) -> list[int]:
    """Return the processes below one."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for word in task.read_text().split():
            found += [int(word), *descendants(int(word))]
    return found


def imports(crew: Crew) -> None:
    """Start Python processes that import different libraries."""
    sets = (
        ["numpy"],
        ["numpy", "pandas"],
        ["pyarrow", "numpy"],
        ["numba"],
        ["rich.console", "typer", "xxhash"],
        ["json"],
    )
    for process in [crew.start(PYTHON, "-c", LOAD, *names) for names in sets]:
        crew.await_word(process)


def workers(crew: Crew) -> None:
    """Start four equal Python workers."""
    for process in [crew.start(PYTHON, "-c", LOAD, "numpy", "pandas", "pyarrow") for _ in range(4)]:
        crew.await_word(process)


def forked(crew: Crew) -> None:
    """Start a Python process whose four forked children work on its table."""
    script = crew.folder / "forks.py"
    script.write_text(FORKS)
    crew.await_word(crew.start(PYTHON, str(script)))


def postgres(crew: Crew) -> None:
    """Start a PostgreSQL server with a million rows and eight sessions that have read them."""
    tools = postgres_tools()
    assert tools is not None
    crew.folder.chmod(0o755)
    home = crew.folder / "data"
    home.mkdir()
    shutil.chown(home, "postgres", "postgres")
    become = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")

    def tool(name: str, *arguments: str) -> None:
        subprocess.run([*become, f"{tools}/{name}", *arguments], capture_output=True, check=True, cwd="/")

    tool("initdb", "-D", str(home), "--no-sync")
    settings = f"-c listen_addresses= -c unix_socket_directories={home} -c autovacuum=off -c fsync=off"
    server = crew.start(*become, f"{tools}/postgres", "-D", str(home), *settings.split(), talks=False)
    reach = ["-h", str(home)]
    for _ in range(200):
        if not subprocess.run([f"{tools}/pg_isready", *reach], stdout=subprocess.DEVNULL, check=False).returncode:
            break
        time.sleep(0.1)
    assert server.poll() is None
    tool("pgbench", *reach, "-i", "-s", "10", "postgres")
    work = "select count(*), sum(abalance) from pgbench_accounts a join pgbench_branches using (bid);\n\\echo ready\n"
    command = [*become, f"{tools}/psql", *reach, "-X", "-q", "postgres"]
    for _ in range(8):
        session = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
        crew.stack.callback(session.communicate)
        assert session.stdin is not None
        session.stdin.write(work)
        session.stdin.flush()
        crew.await_word(session)


def redis(crew: Crew) -> None:
    """Start two Redis servers with the same 200,000 keys."""
    for number in range(2):
        socket = str(crew.folder / f"redis{number}")
        settings = ("--port", "0", "--unixsocket", socket, "--save", "", "--enable-debug-command", "yes")
        crew.start("redis-server", *settings, talks=False)
        for _ in range(200):
            if Path(socket).exists():
                break
            time.sleep(0.05)
        load = ["redis-cli", "-s", socket, "debug", "populate", "200000", "key", "200"]
        assert "OK" in subprocess.run(load, capture_output=True, text=True, check=True).stdout


def browser(crew: Crew, more: str = "") -> None:
    """Start two browsers without a screen that show the same page."""
    program = browser_program()
    assert program is not None
    page = crew.folder / "page.html"
    page.write_text(PAGE + more)
    profiles = [crew.folder / f"profile{number}" for number in range(2)]
    for profile in profiles:
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")
        crew.start(program, *options, f"--user-data-dir={profile}", page.as_uri(), talks=False)
    for profile in profiles:
        for _ in range(400):
            if (profile / "DevToolsActivePort").exists():
                break
            time.sleep(0.1)
        else:
            raise PagefoldError(f"{program} did not start")
    time.sleep(10)  # it draws, and collects its garbage


def busy_browser(crew: Crew) -> None:
    """Start two browsers whose page changes all the time."""
    browser(crew, TICKS)


def postgres_tools() -> Path | None:
    """Return the folder of PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return found[-1].parent if found else None


def browser_program() -> str | None:
    """Return a browser of the Chromium family."""
    names = ("chromium-headless-shell", "chromium", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


SUBJECTS: dict[str, tuple[Callable[[Crew], None], Callable[[], object], str]] = {
    "imports": (imports, lambda: True, "six Python processes, different libraries"),
    "workers": (workers, lambda: True, "four Python workers, the same libraries"),
    "forked": (forked, lambda: True, "a Python process and four forked workers"),
    "postgres": (postgres, postgres_tools, "PostgreSQL, a million rows, eight sessions"),
    "redis": (redis, lambda: shutil.which("redis-server"), "two Redis servers, the same 200,000 keys"),
    "browser": (browser, browser_program, "two browsers, the same page"),
    "busy-browser": (busy_browser, browser_program, "two browsers, a page that changes 20 times a second"),
}


@contextmanager
def running(name: str) -> Iterator[Crew]:
    """Run a subject's programs until the block ends."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        crew = Crew(stack, folder)
        SUBJECTS[name][0](crew)
        time.sleep(2)  # what a program does once, after it is ready
        yield crew


def judge(name: str, interval: float) -> Row:
    """Plan a subject, let ksmd merge it, and compare."""
    with KernelKsm() as ksm, running(name) as crew:
        for knob, value in FULL_SPEED.items():
            ksm.set(knob, value)
        reader = Reader(advised_only=True, interval=interval)
        reader.add([str(pid) for pid in crew.pids()], [])
        sources = reader.read(lambda *_: None, time.sleep)
        table = PageTable.of(sources)
        planned = predict(table, max_page_sharing=ksm.get("max_page_sharing"))
        ksm.set("run", 1)
        reached, scans = settled(ksm)
        ksm.set("run", 2)
        return Row(name, len(sources), len(table), int(table.volatile.sum()), planned.pages_sharing, reached, scans)


def settled(ksm: KernelKsm) -> tuple[int, int]:
    """Let the kernel scan until pages_sharing stays about the same over five scans; return it (the median of five) and the scans."""
    last: list[int] = []
    for scans in range(1, MOST_SCANS + 1):
        ksm.wait_scans(1)
        last = [*last[-4:], ksm.get("pages_sharing")]
        if len(last) == 5 and max(last) - min(last) <= CALM * max(last):
            return int(statistics.median(last)), scans
    return int(statistics.median(last)), MOST_SCANS


def main() -> int:
    """Judge every subject that can be had here; print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUBJECTS)}; all if none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between the plan's two looks")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.names) - set(SUBJECTS):
        parser.error(f"{', '.join(unknown)}: not known; use {', '.join(SUBJECTS)}")
    rows = []
    for name in options.names or SUBJECTS:
        if not SUBJECTS[name][1]():
            print(f"left out: {name}: not installed here", file=sys.stderr)
            continue
        for _ in range(options.rounds):
            rows.append(judge(name, options.interval))
            print(f"{name}: {rows[-1].error:+.2f} %", file=sys.stderr)
    if options.json:
        print(json.dumps([{**asdict(row), "error_percent": row.error} for row in rows], indent=2))
        return 0
    print("| programs | processes | pages | volatile | planned `pages_sharing` | ksmd reached | error | scans |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        what = SUBJECTS[row.name][2]
        print(
            f"| {what} | {row.processes} | {row.pages:,} | {row.volatile:,} | {row.predicted:,} | {row.reached:,} "
            f"| {row.error:+.2f} % | {row.scans} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
