"""Judge merging as users have it: processes that import pagefold, a daemon, and what the kernel counts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.live.conftest import Start
from tests.live.processes import DaemonProcess, eventually, limit_memory, memory_used

PAGE = 4096
HERE = Path(__file__).parent
PAGEFOLD = [sys.executable, "-c", "from pagefold.cli import command; command()"]


class Client:
    """One real_client.py."""

    def __init__(self, daemon: DaemonProcess, mib: int, seed: int, every: int, cgroup: Path | None) -> None:
        within = f"echo $$ > {cgroup}/cgroup.procs && " if cgroup else ""
        program = [sys.executable, str(HERE / "real_client.py"), str(mib), str(seed), str(every)]
        self.process = subprocess.Popen(
            ["sh", "-c", f'{within}exec "$@"', "sh", *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PAGEFOLD_SOCKET": str(daemon.path)},
        )

    def say(self, line: str = "") -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        if line:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer, "the client ended"
        return answer


@contextmanager
def clients(
    daemon: DaemonProcess, mib: int, seeds: list[int], every: int = 1, cgroup: Path | None = None
) -> Iterator[list[Client]]:
    """Run clients; at the end their memory must be what they wrote, and they must end well."""
    made = [Client(daemon, mib, seed, every, cgroup) for seed in seeds]
    try:
        for client in made:
            assert client.say() == "ready"
        eventually(lambda: len(daemon.stat()["clients"]) == len(made))
        yield made
        for client in made:
            assert client.say("check") == "intact"
    finally:
        for client in made:
            client.process.communicate()
    assert [client.process.returncode for client in made] == [0] * len(made)


def background(daemon: DaemonProcess) -> None:
    """Skip where windows are not possible."""
    if why := {client["why"] for client in daemon.stat()["clients"] if not client["background"]}:
        pytest.skip(f"no background merging here: {', '.join(why)}")


def kernels_count(crew: list[Client]) -> int:
    """Return the summed Pss of the clients' advised memory, in bytes; all have looked at all of it."""
    for client in crew:
        assert client.say("check") == "intact"
    return sum(int(client.say("pss")) for client in crew)


def test_what_is_reported_as_saved_is_what_the_kernel_counts(daemon: DaemonProcess) -> None:
    daemon.set(run=0)
    with clients(daemon, 16, [1, 2, 3, 4], every=2) as crew:  # a fourth of a page is a whole number of KiB
        background(daemon)
        before = kernels_count(crew)
        assert before == 4 * 16 * 2**20
        daemon.set(run=1)
        daemon.settle()
        after = kernels_count(crew)
        stat = daemon.stat()
        assert before - after == stat["saved_bytes"] == 3 * 16 * 128 * PAGE
        assert stat["counters"]["pages_sharing"] * PAGE == stat["saved_bytes"]
        assert [client["merged_pages"] for client in stat["clients"]] == [16 * 128] * 4


def test_given_back_memory_is_as_if_nothing_had_happened(daemon: DaemonProcess) -> None:
    daemon.set(run=0)
    with clients(daemon, 8, [1, 1]) as crew:
        background(daemon)
        maps = [Path(f"/proc/{client.process.pid}/smaps").read_text().count("VmFlags") for client in crew]
        before = [int(client.say("pss")) for client in crew]
        daemon.set(run=1)
        daemon.settle()
        assert [client.say("write 100") for client in crew] == ["written"] * 2
        for client in crew:
            assert client.say("unadvise") == "0"
            assert client.say("merging") == "0"
        assert [int(client.say("pss")) for client in crew] == before
        files = [Path(f"/proc/{client.process.pid}/maps").read_text() for client in crew]
        assert not any("rw-p" in line and "memfd:pagefold" in line for text in files for line in text.splitlines())
        assert len(maps) == 2
        eventually(lambda: daemon.stat()["store_bytes"] == 0)


def test_sixty_four_processes(daemon: DaemonProcess) -> None:
    with clients(daemon, 16, list(range(64)), every=1) as crew:
        background(daemon)
        stat = daemon.settle()
        assert stat["saved_bytes"] == 63 * 16 * 256 * PAGE
        assert [client["merged_pages"] for client in stat["clients"]] == [16 * 256] * 64
        assert stat["groups"][0]["pages"] == 16 * 256 and len(stat["groups"][0]["pids"]) == 64
        assert crew[5].say("write 256") == "written"
        eventually(lambda: daemon.stat()["cow_breaks"] == 256)


def test_more_mappings_than_one_page_may_have(daemons: Start) -> None:
    daemon = daemons(knobs={"max_page_sharing": 4})
    with clients(daemon, 1, list(range(10)), every=1):
        background(daemon)
        stat = daemon.settle()
        assert stat["counters"]["stable_node_chains"] == 256
        assert stat["store_bytes"] == stat["counters"]["pages_shared"] * PAGE
        assert stat["saved_bytes"] == 10 * 256 * PAGE - stat["store_bytes"]


def test_a_client_at_its_limit_of_mappings(daemon: DaemonProcess) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    isolated = limit // 2  # every second page can merge: two mappings each
    mib = isolated * 2 // 256 + 1
    with clients(daemon, mib, [1, 2], every=2) as crew:
        background(daemon)
        stat = daemon.settle()
        merged = [client["merged_pages"] for client in stat["clients"]]
        assert all(limit // 5 < pages <= limit // 4 for pages in merged), merged
        mappings = [len(Path(f"/proc/{client.process.pid}/maps").read_text().splitlines()) for client in crew]
        assert all(count < limit * 2 // 3 for count in mappings)
        assert [client.say("check") for client in crew] == ["intact"] * 2


def test_client_and_daemon_survive_each_other(daemons: Start) -> None:
    daemon = daemons("twice")
    with clients(daemon, 4, [1, 1]) as crew:
        background(daemon)
        daemon.settle()
        daemon.kill()
        assert [client.say("check") for client in crew] == ["intact"] * 2
        assert [client.say("write 7") for client in crew] == ["written"] * 2
        second = daemons("twice")
        assert second.path == daemon.path
        eventually(lambda: len(second.stat()["clients"]) == 2)
        eventually(lambda: second.stat()["tracked_bytes"] == 2 * 4 * 2**20)
        second.settle()
        assert second.stat()["counters"]["pages_sharing"] >= 4 * 256 - 7
        crew[0].process.kill()
        crew[0].process.wait()
        eventually(lambda: len(second.stat()["clients"]) == 1)
        assert crew.pop(0).process.returncode == -9


def test_daemon_and_clients_in_one_full_memory_cgroup(cgroup: Path, daemons: Start) -> None:
    daemon = daemons(cgroup=str(cgroup), knobs={"run": 0})
    with clients(daemon, 16, [1, 2, 3, 4], cgroup=cgroup) as crew:
        background(daemon)
        limit_memory(cgroup, memory_used(cgroup) + (24 << 20))  # enough to look, too little for the store
        daemon.set(run=1)
        eventually(lambda: "memory cgroup" in shown(daemon))
        assert "merging pauses" in shown(daemon)
        assert daemon.stat()["merged"] == 0
        assert [client.say("check") for client in crew] == ["intact"] * 4
        assert [client.say("write 5") for client in crew] == ["written"] * 4
        limit_memory(cgroup, 1 << 30)
        eventually(lambda: daemon.settle()["notes"] == [])
        assert "merging pauses" not in shown(daemon)
        assert daemon.stat()["saved_bytes"] >= 3 * (16 * 256 - 5) * PAGE
    killed = re.search(r"oom_kill (\d+)", "".join(path.read_text() for path in cgroup.glob("memory.[eo]*[sl]")))
    assert killed and killed[1] == "0"
    daemon.stop()


def shown(daemon: DaemonProcess) -> str:
    """Return what `pagefold stat` prints."""
    env = {**os.environ, "PAGEFOLD_SOCKET": str(daemon.path)}
    done = subprocess.run([*PAGEFOLD, "stat"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())
