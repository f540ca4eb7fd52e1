"""Measure live merging against the kernel's ksmd, both at full speed on the same pages in the same run; figures are ratios.

1. Time until merged: two processes, all of their pages equal (long runs), and isolated equal pages (runs of one).
2. CPU of one pass over memory that is unshared and does not change.
3. Latency of a thread's writes while its memory is merged, and without.
4. Memory of the daemon and of a client per GiB tracked.

usage: python benchmarks/live_merge.py [--mib N] [--rounds N] [--json]     (needs root for ksmd; without, pagefold is measured alone)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pagefold.errors import PagefoldError
from pagefold.live import control
from pagefold.scenario.kernel_ksm import KernelKsm

HERE = Path(__file__).parent
PAGE = 4096
ISOLATED = 12_000  # equal pages in runs of one: within the budget of mappings
FULL_SPEED = ["run=0", "sleep_millisecs=0", "pages_to_scan=1000000", "max_cpu_percent=200"]


class Worker:
    """One live_worker.py."""

    def __init__(self, who: str, pages: int, every: int, seed: int, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "live_worker.py"), who, str(pages), str(every), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )

    def say(self, line: str) -> str:
        """Send a line (none if empty) and return the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if line:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer, "a worker ended early"
        return answer


@contextmanager
def crew(who: str, pages: int, every: int, count: int, env: dict[str, str]) -> Iterator[list[Worker]]:
    """Run workers until the block ends."""
    workers = [Worker(who, pages, every, seed + 1, env) for seed in range(count)]
    try:
        for worker in workers:
            assert worker.say("") == "ready"
        yield workers
    finally:
        for worker in workers:
            worker.process.communicate()


@contextmanager
def daemon() -> Iterator[tuple[Path, dict[str, str], int]]:
    """Run a daemon that stands still; yield its socket, what workers need in their environment, and its pid."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"PAGEFOLD_SOCKET": str(Path(folder) / "daemon.sock")}
        command = [sys.executable, "-c", "from pagefold.cli import command; command()", "serve"]
        for knob in FULL_SPEED:
            command += ["--knob", knob]
        process = subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.DEVNULL)
        path = Path(env["PAGEFOLD_SOCKET"])
        try:
            until = time.monotonic() + 120
            while not answers(path):
                assert process.poll() is None and time.monotonic() < until, "the daemon did not start"
                time.sleep(0.05)
            yield path, env, process.pid
        finally:
            process.terminate()
            process.wait()


def answers(path: Path) -> bool:
    """Tell whether a daemon answers there; it compiles first, if it must."""
    try:
        return bool(control.ask(path, {"verb": "history"}, 120))
    except PagefoldError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> float:
    """Return the seconds until a condition holds."""
    began = time.perf_counter()
    while not condition():
        assert time.perf_counter() - began < seconds, "it did not come to that"
        time.sleep(0.02)  # asking takes time of those who merge
    return time.perf_counter() - began


def ask(path: Path, verb: str, **more: object) -> dict[str, object]:
    return control.ask(path, {"verb": verb, **more}, None)


def merged(path: Path) -> int:
    """Return how many pages of all clients map the store."""
    return sum(int(row["merged_pages"]) for row in ask(path, "clients")["clients"])  # type: ignore[attr-defined]


def ours_until_merged(pages: int, every: int) -> float:
    """Return seconds until two workers' equal pages are merged by pagefold."""
    equal = len(range(0, pages, every))
    with daemon() as (path, env, _), crew("pagefold", pages, every, 2, env):
        wait_for(lambda: len(ask(path, "clients")["clients"]) == 2)  # type: ignore[arg-type]
        ask(path, "set", knobs={"run": "1"})
        return wait_for(lambda: merged(path) >= 2 * equal)


@contextmanager
def fast_ksm(smart_scan: int = 0) -> Iterator[KernelKsm]:
    """Borrow the kernel's KSM at full speed, standing still."""
    with KernelKsm() as ksm:
        for knob, value in (("smart_scan", smart_scan), ("sleep_millisecs", 0), ("pages_to_scan", 1_000_000)):
            ksm.set(knob, value)
        yield ksm


def kernel_until_merged(pages: int, every: int) -> float:
    """Return seconds until two workers' equal pages are merged by ksmd."""
    equal = len(range(0, pages, every))
    with fast_ksm() as ksm, crew("ksmd", pages, every, 2, {}):
        ksm.set("run", 1)
        seconds = wait_for(lambda: ksm.get("pages_sharing") >= equal)
        ksm.set("run", 0)
        return seconds


def ksmd_cpu() -> float:
    """Return the CPU seconds ksmd has used since boot."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(") ", 1)
        except OSError:
            continue
        if name.endswith("(ksmd"):
            fields = rest.split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    raise RuntimeError("this kernel has no ksmd")


def ours_per_pass(pages: int) -> tuple[float, float, float, float]:
    """Return CPU seconds per look at unchanging memory, and per full pass of the engine; and bytes of daemon and client per GiB."""
    before = after = 0.0
    with daemon() as (path, env, pid):
        empty, memory = anonymous(pid), 0.0
        with crew("nobody", 1, 0, 1, env) as (plain,):
            bare = anonymous(plain.process.pid)
        with crew("pagefold", pages, 0, 1, env) as (worker,):
            loaded = anonymous(worker.process.pid) - bare - pages * PAGE
            ask(path, "set", knobs={"run": "1"})
            assert ask(path, "settled", timeout=120)["settled"]
            first = ask(path, "history")
            time.sleep(6)
            last = ask(path, "history")
            looks = int(last["looks"]) - int(first["looks"])  # type: ignore[call-overload]
            before = (float(last["cpu_seconds"]) - float(first["cpu_seconds"])) / max(looks, 1)  # type: ignore[arg-type]
            ask(path, "set", knobs={"sleep_millisecs": "1"})  # stirs: some full passes over everything
            begin = ask(path, "history")
            assert ask(path, "settled", timeout=120)["settled"]
            end = ask(path, "history")
            passes = int(end["passes"]) - int(begin["passes"])  # type: ignore[call-overload]
            after = (float(end["cpu_seconds"]) - float(begin["cpu_seconds"])) / max(passes, 1)  # type: ignore[arg-type]
            memory = anonymous(pid) - empty
    gib = pages * PAGE / 2**30
    return before, after, memory / gib, loaded / gib


def anonymous(pid: int) -> int:
    """Return the private anonymous memory of a process in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def kernel_per_pass(pages: int, smart_scan: int) -> float:
    """Return ksmd's CPU seconds per pass over unchanging, unshared memory."""
    with fast_ksm(smart_scan) as ksm, crew("ksmd", pages, 0, 1, {}):
        ksm.set("run", 1)
        ksm.wait_scans(10 if smart_scan else 3)  # until it knows the pages
        passes, cpu = ksm.get("full_scans"), ksmd_cpu()
        ksm.wait_scans(8)
        cpu, passes = ksmd_cpu() - cpu, ksm.get("full_scans") - passes
        ksm.set("run", 0)
        return cpu / passes


def latency(who: str, pages: int, library: Path) -> dict[str, float]:
    """Return the figures of a thread that writes all over its memory while that is merged by `who`."""

    def measure(workers: list[Worker], begin: Callable[[], object], done: Callable[[], object]) -> dict[str, float]:
        assert workers[0].say(f"latency {library} 2000") == "writing"
        begin()
        done()
        figures: dict[str, float] = json.loads(workers[0].say("stop"))
        return figures

    with ExitStack() as stack:
        if who == "nobody":
            workers = stack.enter_context(crew("nobody", pages, 1, 2, {}))
            return measure(workers, lambda: None, lambda: time.sleep(3))
        if who == "ksmd":
            ksm = stack.enter_context(fast_ksm())
            workers = stack.enter_context(crew("ksmd", pages, 1, 2, {}))
            return measure(workers, lambda: ksm.set("run", 1), lambda: (time.sleep(3), ksm.set("run", 0)))
        path, env, _ = stack.enter_context(daemon())
        workers = stack.enter_context(crew("pagefold", pages, 1, 2, env))
        start = lambda: ask(path, "set", knobs={"run": "1"})  # noqa: E731
        return measure(workers, start, lambda: time.sleep(3))


def compare(rounds: int, ours: Callable[[], float], theirs: Callable[[], float] | None) -> dict[str, float]:
    """Return medians of interleaved rounds, and of their ratios."""
    pairs = [(ours(), theirs() if theirs else 0.0) for _ in range(rounds)]
    answer = {"pagefold": statistics.median(one for one, _ in pairs)}
    if theirs:
        answer["ksmd"] = statistics.median(other for _, other in pairs)
        answer["ratio"] = statistics.median(one / other for one, other in pairs)
    return answer


def main() -> None:
    """Print the figures and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="memory of all workers together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pages = options.mib * 256
    kernel = KernelKsm.why_not() is None
    result: dict[str, object] = {"mib": options.mib, "rounds": options.rounds}
    half = pages // 2
    every = max(-(-half // ISOLATED), 2)
    result["until_merged_long_runs"] = compare(
        options.rounds,
        lambda: ours_until_merged(half, 1),
        (lambda: kernel_until_merged(half, 1)) if kernel else None,
    )
    result["until_merged_single_pages"] = compare(
        options.rounds,
        lambda: ours_until_merged(half, every),
        (lambda: kernel_until_merged(half, every)) if kernel else None,
    )
    look, full, daemon_bytes, client_bytes = ours_per_pass(pages)
    result["cpu_seconds_per_pass"] = {"pagefold, unchanged": look, "pagefold, whole pass of the engine": full}
    if kernel:
        ksmd = {f"ksmd, smart_scan {smart}": kernel_per_pass(pages, smart) for smart in (0, 1)}
        result["cpu_seconds_per_pass"] |= ksmd  # type: ignore[operator]
        result["cpu_ratio"] = look / ksmd["ksmd, smart_scan 0"]
        result["cpu_ratio_smart_scan"] = look / ksmd["ksmd, smart_scan 1"]
    result["bytes_per_gib"] = {"daemon": round(daemon_bytes), "client": round(client_bytes)}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "write_latency.so"
        source = HERE / "write_latency.c"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        for who in ("nobody", "pagefold", "ksmd") if kernel else ("nobody", "pagefold"):
            result[f"write_us_{who}"] = latency(who, half, library)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.mib} MiB in all; medians of {options.rounds} rounds")
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"  {name}: " + ", ".join(f"{key} {figure:,.6g}" for key, figure in value.items()))
        elif name not in ("mib", "rounds"):
            print(f"  {name}: {value:.4f}")
    print(
        "  wanted: until merged at most 1/3 of ksmd's (long runs), at most equal (single pages); CPU ratio at most 0.05"
    )


if __name__ == "__main__":
    main()
