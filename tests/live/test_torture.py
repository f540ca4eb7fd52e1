"""Judge windows by torture: nothing is lost while memory is written in every way there is; and torture finds what is broken on purpose."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.live.mutants import ASLEEP, MUTANTS, Mutant
from tests.live.processes import DaemonProcess, eventually

TORTURE = Path(__file__).parents[1] / "torture"
AGENT = Path(__file__).parents[2] / "csrc"
BOUND = 300.0  # seconds that a run may take on a machine that does other things too; its own watchdog speaks earlier
IMPOSSIBLE = 4
WRITERS = {"store", "read", "pipe", "direct", "uring", "mem", "vm", "remote"}
READERS = {"look", "write", "vmread", "memread", "directwrite", "uringwrite"}
CHILDREN = {"fork", "forkmerge", "vfork", "spawn", "exec"}
# A fault of the specimen, and who meets it soonest.
SPECIMENS = [
    ("early", "store,look"),
    ("trust", "store,look"),
    ("protect", "uring,direct"),
    ("plain", "store,look"),
    ("fork", "store,fork"),
    ("unpinned", "store,uring"),
    ("tail", "store,look"),
]


def made(build: Path, *words: str) -> Path:
    """Build the programs of an agent's sources; return the folder they are in."""
    command = ["make", "-s", "-j2", "-C", str(TORTURE), f"BUILD={build}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return build


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the programs of the agent as it is."""
    return made(tmp_path_factory.mktemp("torture"))


@dataclass
class Outcome:
    """How a run of the program ended."""

    code: int
    figures: dict[str, Any]
    told: str


def run(program: Path, *words: str | int, seconds: float = BOUND) -> Outcome:
    """Run one of the programs; skip where no window is possible."""
    command = [program, "--quiet", "--json", "--directory", program.parent, *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode == IMPOSSIBLE:
        pytest.skip(done.stderr.strip())
    return Outcome(done.returncode, json.loads(done.stdout) if done.stdout.startswith("{") else {}, done.stderr)


def nothing_was_lost(outcome: Outcome) -> None:
    """Check that no byte was wrong, no call failed, nothing was left behind, and that there was something to lose."""
    assert outcome.code == 0, outcome.told
    figures = outcome.figures
    for name in ("wrong_bytes", "wrong_sectors", "bad_reads", "bad_children", "failures"):
        assert figures[name] == 0
    assert figures["windows"] > 0
    assert figures["by_status"]["merged"] > 0
    assert figures["restored"] > 0


def test_nothing_is_lost_whatever_writes(build: Path) -> None:
    for seconds in (15, 60):  # on a busy machine not everything has its turn in the first time
        outcome = run(build / "torture", "--seconds", seconds, "--seed", 1)
        nothing_was_lost(outcome)
        figures = outcome.figures
        if figures["extents_freed"]:
            break
    for kinds, names in ((figures["writes"], WRITERS), (figures["reads"], READERS), (figures["children"], CHILDREN)):
        direct = {"direct", "directwrite"} - set(kinds)  # a file system without O_DIRECT of 512 bytes
        assert set(kinds) == names - direct
        assert all(kinds.values())
    assert figures["advised_again"] > 0
    assert figures["extents_freed"] > 0


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        pytest.param("store,look", ["--windows", 20000], id="stores"),
        pytest.param("direct,uring,directwrite,uringwrite", ["--windows", 5000], id="pins"),
        pytest.param("store,uring,fork,exec,look", ["--windows", 2000, "--fork-pause", 5], id="forks"),
        pytest.param("mem,vm,remote,memread,vmread", ["--windows", 5000], id="by-address"),
        pytest.param("store,look,churn,limit", ["--windows", 1000], id="no-mappings-left"),
        pytest.param("store,read,look,huge,churn", ["--windows", 5000, "--huge", "--pages", 8192], id="huge-pages"),
    ],
)
def test_nothing_is_lost_when_one_kind_has_all_the_time(build: Path, kinds: str, words: list[str | int]) -> None:
    nothing_was_lost(run(build / "torture", "--kinds", kinds, "--seconds", BOUND / 2, "--seed", 2, *words))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--delay", 200], id="held-up"),
        pytest.param(["--lie", 8, "--delay", 50], id="lied-to"),
        pytest.param(["--refuse", 8], id="refused"),
        pytest.param(["--refuse", 16, "--lie", 16, "--delay", 200], id="all"),
    ],
)
def test_nothing_is_lost_in_a_hostile_world(build: Path, words: list[str | int]) -> None:
    """System calls of the window last, fail, are done in part, or are done and then told as failed, as in Linux 6.18."""
    nothing_was_lost(run(build / "torture-adverse", "--windows", 1500, "--seconds", BOUND / 2, "--seed", 3, *words))


def test_torture_finds_nothing_where_nothing_is_wrong(build: Path) -> None:
    outcome = run(build / "torture", "--windows-by", "specimen:none", "--seconds", 4, "--seed", 4)
    nothing_was_lost(outcome)


@pytest.mark.parametrize(("fault", "kinds"), SPECIMENS)
def test_torture_finds_what_is_broken_on_purpose(build: Path, fault: str, kinds: str) -> None:
    words = ["--kinds", kinds, "--delay", 100, "--fork-pause", 2, "--until-wrong", "--seconds", BOUND / 2, "--seed", 5]
    outcome = run(build / "torture-adverse", "--windows-by", f"specimen:{fault}", *words)
    assert outcome.code == 1
    assert outcome.figures["wrong_bytes"] > 0
    assert "torture: WRONG at 0x" in outcome.told
    assert "expected content" in outcome.told


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_torture_finds_every_mutant_of_the_agent(build: Path, tmp_path: Path, mutant: Mutant) -> None:
    """The agent itself with one line broken: so that line is needed, and torture would tell if it went."""
    mutant.make(AGENT, tmp_path / "agent")
    changed = Path(shutil.copytree(build, tmp_path / "build"))
    program = changed / "torture-adverse"
    made(changed, f"AGENT={tmp_path / 'agent'}", "CFLAGS=-Wno-error", str(program))
    words = ["--kinds", mutant.kinds, *mutant.words, "--delay", 50, "--fork-pause", 2, "--seed", 6]
    outcome = run(program, "--until-wrong", "--hang", 10, "--seconds", BOUND / 2, *words)
    assert outcome.code == mutant.code
    if mutant.code == 1:
        assert outcome.figures["wrong_bytes"] > 0


def test_torture_names_the_thread_that_hangs(build: Path) -> None:
    words = ["--kinds", "store,read,look", *ASLEEP, "--hang", 5, "--seconds", BOUND / 2]
    outcome = run(build / "torture", "--windows-by", "specimen:asleep", *words)
    assert outcome.code == 3
    assert "torture: HANG: " in outcome.told
    assert "stack: " in outcome.told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--kinds", "store,nonsense"], "no such kind: nonsense"),
        (["--windows-by", "specimen:nonsense"], "no such fault: nonsense"),
        (["--seconds", "0"], "it would never end"),
        (["--lie", "2"], "need the program torture-adverse"),
        (["--pages", "much"], "not a number"),
        (["--directory", "/nonexistent"], "no file in /nonexistent"),
    ],
)
def test_mistakes_are_told(build: Path, words: list[str], told: str) -> None:
    done = subprocess.run([build / "torture", *words], capture_output=True, text=True, timeout=BOUND, check=False)
    assert done.returncode == 2
    assert told in done.stderr


def test_nothing_is_lost_with_the_embedded_store(build: Path) -> None:
    nothing_was_lost(run(build / "torture", "--embedded", "--seconds", 6, "--seed", 7))


def test_nothing_is_lost_with_a_daemon(build: Path, daemon: DaemonProcess) -> None:
    nothing_was_lost(run(build / "torture", "--daemon", daemon.path, "--seconds", 6, "--seed", 8))


def sharing(daemon: DaemonProcess, torture: subprocess.Popen[str], some: bool) -> None:
    """Wait until the daemon says that pages are shared, or that none is."""
    eventually(lambda: torture.poll() is not None or (daemon.counters()["pages_sharing"] > 0) == some)


def test_nothing_is_lost_while_daemons_die_and_unmerge(build: Path, daemons: Callable[..., DaemonProcess]) -> None:
    """The memory of a client is its own whatever becomes of the daemon: killed, started anew, told to give all back."""
    daemon = daemons()
    words = ["--directory", build, "--daemon", daemon.path, "--seconds", BOUND, "--seed", 9]
    command = [str(word) for word in [build / "torture", "--quiet", "--json", *words]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as torture:
        for _ in range(3):
            sharing(daemon, torture, True)
            daemon.set(run=2)
            sharing(daemon, torture, False)
            daemon.set(run=1)
            sharing(daemon, torture, True)
            daemon.kill()
            daemon = daemons()
        sharing(daemon, torture, True)
        torture.terminate()
        figures, told = torture.communicate(timeout=BOUND)
    if torture.returncode == IMPOSSIBLE:
        pytest.skip(told.strip())
    nothing_was_lost(Outcome(torture.returncode, json.loads(figures), told))
