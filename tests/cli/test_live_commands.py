"""Judge the verbs of live merging as a user meets them: `run`, `serve`, `stat`, `set`, `stop`; most of it with a real daemon."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.running import PAGEFOLD, refusal, run, run_here

from pagefold.errors import KnobBusy
from pagefold.live import control, domain
from pagefold.live.knobs import NAMES

CLIENT = Path(__file__).parents[1] / "live" / "plain_client.py"
COUNTERS = {
    "pages_shared": 1001,
    "pages_sharing": 3003,
    "pages_unshared": 57,
    "pages_volatile": 6,
    "full_scans": 12,
    "pages_scanned": 98765,
    "pages_skipped": 0,
    "ksm_zero_pages": 17,
    "stable_node_chains": 0,
    "stable_node_dups": 0,
    "general_profit": 1,
}


def client_row(number: int) -> dict[str, Any]:
    return {
        "pid": 100 + number,
        "command": f"python [bold]worker.py {number}\n",
        "node_pages": {"0": 1000, "1": 1},
        "regions": 3,
        "pages": 2000,
        "merged_pages": 1001,
        "zero_pages": 4,
        "broken_pages": 5,
        "refused_pages": 6,
        "mappings": 7,
        "background": number != 3,
        "why": "userfaultfd(2): not permitted",
    }


STAT: dict[str, Any] = {
    "ok": True,
    "domain": "web",
    "pid": 4711,
    "uid": 0,
    "uptime_seconds": 61.25,
    "cpu_seconds": 3.5,
    "knobs": {"run": 1, "pages_to_scan": 100},
    "counters": COUNTERS,
    "saved_bytes": 3003 * 4096,
    "store_bytes": 1001 * 4096,
    "tracked_bytes": 512 << 20,
    "daemon_bytes": 99 << 20,
    "windows": 4321,
    "merged": 4004,
    "refused": {"pinned": 3, "no_vma": 2},
    "cow_breaks": 44,
    "settled": True,
    "settled_seconds": 7.75,
    "clients": [client_row(number) for number in range(4)],
    "groups": [
        {"node": 0, "pids": [100, 101, 102, 103], "pages": 900, "bytes": 900 * 4096},
        {"node": 1, "pids": [100, 103], "pages": 101, "bytes": 101 * 4096},
    ],
    "history": [[1.0, 5], [2.0, 3003 * 4096]],
    "notes": ["client 9 was dropped: \x1b[31mnonsense"],
}


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in ("PAGEFOLD_SOCKET", "PAGEFOLD_ENABLE", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def left(runtime: Path) -> list[str]:
    folder = runtime / "pagefold"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def eventually(condition: Callable[[], object]) -> bool:
    until = time.monotonic() + 120
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Pretender:
    """A daemon that answers what a test wants, and remembers what it was asked."""

    def __init__(self, answers: dict[str, dict[str, Any]]) -> None:
        self.answers = answers
        self.asked: list[dict[str, Any]] = []
        self.listening = domain.listen(domain.socket_path("web"))
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            with connection:
                if packet := connection.recv(control.MOST_BYTES):
                    request = control.parse_request(packet[control.HEADER.size :])
                    self.asked.append(request)
                    for piece in control.pack(self.answers[request["verb"]]):
                        connection.send(piece)

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listening.close()


@pytest.fixture
def pretender() -> Iterator[Pretender]:
    made = Pretender({"stat": STAT, "set": {"ok": True, "knobs": {"run": 1, "pages_to_scan": 7}}})
    yield made
    made.close()


# --- words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts", "code"),
    [
        (["stat"], ["default.sock", "no daemon there", "pagefold serve"], 77),
        (["set", "run=1"], ["default.sock", "no daemon there", "pagefold run"], 77),
        (["stop", "--domain", "web"], ["web.sock", "no daemon there"], 77),
        (["stat", "--domain", "a/b"], ["'a/b' cannot be the name of a domain", "letters, digits"], 2),
        (["stop", "--domain", ""], ["'' cannot be the name of a domain"], 2),
        (["serve", "--domain", "../x"], ["cannot be the name of a domain"], 2),
        (["run", "--domain", ".x", "true"], ["cannot be the name of a domain"], 2),
        (["stat", "5"], ["5 seconds", "add --watch"], 2),
        (["stat", "--watch", "--", "-1"], ["-1 seconds cannot be", "use 0 to 86400"], 2),
        (["stat", "--watch", "nan"], ["nan seconds cannot be"], 2),
        (["set", "run"], ["'run' sets nothing", "write NAME=VALUE"], 2),
        (["set", "nonsense=1"], ["no knob 'nonsense'", "max_cpu_percent", "pages_to_scan"], 2),
        (["set", "run=3"], ["run: 3 is out of range", "use 0 to 2"], 2),
        (["set", "run=1", "max_cpu_percent=0"], ["max_cpu_percent: '0' is out of range", "100 is one processor"], 2),
        (["set", "max_cpu_percent=1e2"], ["max_cpu_percent: '1e2' is out of range"], 2),
        (["serve", "--knob", "pages_to_scan"], ["'pages_to_scan' sets nothing"], 2),
        (["serve", "--max-cpu-percent", "lots"], ["max_cpu_percent: 'lots' is out of range"], 2),
        (["run", "--knob", "max_page_sharing=1", "true"], ["max_page_sharing: 1 is out of range"], 2),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], parts: list[str], code: int, runtime: Path) -> None:
    result = run_here(*arguments)
    line = refusal(result)
    for part in parts:
        assert part in line
    assert result.returncode == code
    assert left(runtime) == []


@pytest.mark.parametrize("verb", ["run", "serve", "stat", "set", "stop"])
def test_help_teaches(verb: str) -> None:
    result = run(verb, "--help")
    assert result.returncode == 0
    assert f"Examples: `pagefold {verb}" in re.sub(r"\s+", " ", result.stdout)
    assert "--lifeline" not in result.stdout


def test_every_knob_of_the_kernel_is_known() -> None:
    assert {"run", "merge_across_nodes", "max_page_sharing", "max_cpu_percent"} <= set(NAMES)


# --- stat, set and stop ---------------------------------------------------------------------------------------------------


def test_stat_shows_every_figure(pretender: Pretender) -> None:
    result = run_here("stat", "--domain", "web")
    assert (result.returncode, result.stderr) == (0, "")
    text = result.stdout
    assert "Domain web, daemon 4711: settled" in text
    figures = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in text.splitlines() if "│" in line}
    assert figures["saved_bytes"] == "11.7 MiB"
    assert figures["pages_sharing"] == "3,003"
    assert figures["ksm_zero_pages"] == "17"
    assert figures["cow_breaks"] == "44"
    assert figures["settled_seconds"] == "7.8 s"
    assert figures["daemon_bytes"] == "99.0 MiB"
    for client in STAT["clients"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"│ {client['pid']} ")]
        assert f"python [bold]worker.py {client['pid'] - 100}?" in line, "as it is, and nothing but letters"
        cells = [cell.strip() for cell in line.split("│")]
        assert cells[3:-1] == [
            "2,000",
            "1,001",
            "4",
            "5",
            "6",
            "7",
            "1,000",
            "1",
            "no" if client["pid"] == 103 else "yes",
        ]
    assert re.search(r"│\s+0 │\s+3\.5 MiB │\s+900 │ all 4\b", text)
    assert re.search(r"│\s+1 │\s+404\.0 KiB │\s+101 │ 100, 103 ", text)
    words = re.sub(r"\s+", " ", text)
    assert "3 are pinned by a device or io_uring; 2 would need more mappings than vm.max_map_count leaves" in words
    assert "No background merging in 1 client: userfaultfd(2): not permitted." in words
    assert "Note: client 9 was dropped: ?[31mnonsense." in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({"settled": False}, "merging"),
        ({"clients": [], "groups": []}, "no client"),
        ({"knobs": {"run": 0}}, "run is 0, nothing is merged"),
    ],
)
def test_stat_says_how_it_is(pretender: Pretender, change: dict[str, Any], state: str) -> None:
    pretender.answers["stat"] = {**STAT, **change}
    assert f"daemon 4711: {state}\n" in re.sub(r" +\n", "\n", run_here("stat", "--domain", "web").stdout)


def test_stat_as_json_is_the_daemons_answer(pretender: Pretender) -> None:
    result = run_here("stat", "--domain", "web", "--json")
    assert json.loads(result.stdout) == STAT
    assert pretender.asked == [{"verb": "stat"}]


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_watching_until_interrupted(pretender: Pretender, arguments: list[str]) -> None:
    command = [str(PAGEFOLD), "stat", "--domain", "web", *arguments, "--watch", "0.01"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert eventually(lambda: len(pretender.asked) > 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    if arguments:
        lines = out.splitlines()
        assert len(lines) >= 3
        assert all(json.loads(line) == STAT for line in lines)
    else:
        assert out.count("Domain web") >= 3


def test_the_variable_names_the_daemon(pretender: Pretender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFOLD_SOCKET", str(domain.socket_path("web")))
    assert json.loads(run_here("stat", "--json").stdout)["pid"] == 4711


def test_set_sends_the_words_and_shows_what_is_set(pretender: Pretender) -> None:
    result = run_here("set", "--domain", "web", "run=1", "pages_to_scan=7")
    assert (result.returncode, result.stdout) == (0, "run = 1\npages_to_scan = 7\n")
    assert pretender.asked == [{"verb": "set", "knobs": {"run": "1", "pages_to_scan": "7"}}]


def test_what_the_daemon_refuses_is_told_with_its_exit_code(pretender: Pretender) -> None:
    pretender.answers["set"] = control.failure(KnobBusy("merge_across_nodes", "merged pages exist; set run=2 first"))
    result = run_here("set", "--domain", "web", "merge_across_nodes=0")
    assert refusal(result) == "pagefold: merge_across_nodes: merged pages exist; set run=2 first"
    assert result.returncode == 1


# --- serve ----------------------------------------------------------------------------------------------------------------


class Manager:
    """A service manager: it starts `pagefold serve` and hears what it says."""

    def __init__(self, folder: Path) -> None:
        self.hears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.hears.bind(str(folder / "notify"))
        self.hears.settimeout(120)
        self.environment = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify")}
        self.process: subprocess.Popen[str] | None = None

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [str(PAGEFOLD), "serve", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )
        return self.process

    def start_with(self, sockets: dict[str, int], names: str) -> subprocess.Popen[str]:
        """Pass descriptors, from 3 on."""

        def place() -> None:
            high = [os.dup2(fd, 100 + at) for at, fd in enumerate(sockets.values())]
            for at, fd in enumerate(high):
                os.dup2(fd, 3 + at)

        script = f'export LISTEN_PID=$$ LISTEN_FDS={len(sockets)} LISTEN_FDNAMES={names}; exec "$0" serve'
        self.process = subprocess.Popen(
            ["sh", "-c", script, str(PAGEFOLD)],
            preexec_fn=place,  # noqa: PLW1509  (no thread runs here)
            pass_fds=range(3, 3 + len(sockets)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        return self.process

    def hear(self) -> str:
        return self.hears.recv(1000).decode()

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
        self.hears.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    made.close()


def test_a_daemon_from_its_start_to_its_end(manager: Manager, runtime: Path) -> None:
    process = manager.start("--domain", "web", "--knob", "pages_to_scan=123", "--max-cpu-percent", "20")
    assert manager.hear() == "READY=1"
    stat = json.loads(run("stat", "--domain", "web", "--json").stdout)
    assert (stat["pid"], stat["domain"], stat["uid"]) == (process.pid, "web", os.getuid())
    assert (stat["knobs"]["pages_to_scan"], stat["knobs"]["max_cpu_percent"]) == (123, 20)
    assert stat["clients"] == [] and stat["saved_bytes"] == 0
    assert "no client" in run("stat", "--domain", "web").stdout
    done = run("set", "--domain", "web", "pages_to_scan=77", "run=0")
    assert (done.returncode, done.stdout) == (0, "pages_to_scan = 77\nrun = 0\n")
    assert "run is 0" in run("stat", "--domain", "web").stdout
    done = run("stop", "--domain", "web")
    assert (done.returncode, done.stdout) == (0, f"daemon {process.pid} has ended\n")
    assert not alive(process.pid)
    assert manager.hear() == "STOPPING=1"
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    assert left(runtime) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ready", [True, False])
def test_signals_end_it_at_any_time(manager: Manager, runtime: Path, number: signal.Signals, ready: bool) -> None:
    process = manager.start()
    if ready:
        assert manager.hear() == "READY=1"
    else:
        assert eventually(lambda: left(runtime))
    process.send_signal(number)
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    assert left(runtime) == []


def test_a_second_daemon_is_refused(manager: Manager, runtime: Path) -> None:
    manager.start()
    manager.hear()
    result = run("serve")
    assert "a daemon serves this already; join it with" in refusal(result)
    assert result.returncode == 75
    assert run("stat").returncode == 0, "the first one goes on"


def test_the_variable_says_where_to_serve(manager: Manager, tmp_path: Path, runtime: Path) -> None:
    """As in a system service with a RuntimeDirectory of its own."""
    manager.environment["PAGEFOLD_SOCKET"] = str(tmp_path / "own.sock")
    process = manager.start()
    assert manager.hear() == "READY=1"
    stat = control.ask(tmp_path / "own.sock", {"verb": "stat"}, 120)
    assert (stat["domain"], stat["pid"]) == ("own", process.pid)
    assert left(runtime) == []
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert not (tmp_path / "own.sock").exists()


def test_with_what_a_service_manager_passes(manager: Manager, tmp_path: Path) -> None:
    path = tmp_path / "passed.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening, contextlib.ExitStack() as stack:
        listening.bind(str(path))
        listening.listen(4)
        passed = {"pagefold.socket": listening.fileno()}
        if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
            passed["userfaultfd"] = os.open("/dev/userfaultfd", os.O_RDWR)
            stack.callback(os.close, passed["userfaultfd"])
        process = manager.start_with(passed, ":".join(passed))
        answer = control.ask(path, {"verb": "stat"}, 120)
        assert (answer["pid"], answer["domain"]) == (process.pid, "passed")
        if "userfaultfd" in passed:
            with contextlib.suppress(FileNotFoundError):
                held = {str(file.readlink()) for file in Path(f"/proc/{process.pid}/fd").iterdir()}
                assert "/dev/userfaultfd" in held
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 0
        assert path.is_socket(), "it is the manager's"


def test_what_it_cannot_use_is_refused(manager: Manager, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream, (tmp_path / "file").open("w") as file:
        stream.bind(str(tmp_path / "stream"))
        for passed, what in (
            ({"a": stream.fileno()}, "ListenSequentialPacket"),
            ({"b": file.fileno()}, "is of no use"),
        ):
            process = manager.start_with(passed, ":".join(passed))
            _, err = process.communicate()
            assert process.returncode == 2
            assert what in err and err.startswith("pagefold: ")


# --- run ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)]
)
def test_the_commands_exit_code_is_ours(script: str, code: int, runtime: Path) -> None:
    result = run("run", "--", "sh", "-c", script)
    assert result.returncode == code
    assert result.stdout == ""
    assert (
        result.stderr
        == "pagefold: nothing was saved: no process enabled pagefold, or none lived long enough to be asked\n"
    )
    assert left(runtime) == []


def test_a_command_that_is_not_there(runtime: Path) -> None:
    result = run("run", "pagefold-nonsense", "--help")
    assert refusal(result).startswith("pagefold: pagefold-nonsense: No such file or directory")
    assert result.returncode == 127
    assert eventually(lambda: left(runtime) == [])


def test_options_behind_the_command_are_its_own() -> None:
    result = run("run", "sh", "-c", 'echo "$@"', "sh", "--json", "--domain", "x", "--", "-h")
    assert result.stdout == "--json --domain x -- -h\n"


@pytest.mark.parametrize("enable", [True, False])
def test_the_environment_of_the_command(enable: bool, runtime: Path) -> None:
    script = "import os, json; print(json.dumps(dict(os.environ)))"
    result = run("run", *([] if enable else ["--no-enable"]), "--", sys.executable, "-S", "-c", script)
    said = json.loads(result.stdout)
    assert Path(said["PAGEFOLD_SOCKET"]).parent == runtime / "pagefold"
    assert said.get("PAGEFOLD_ENABLE") == ("1" if enable else None)
    assert said["PYTHONPATH"].split(":")[0].endswith("pagefold/live/site")


def client_command(file: Path) -> list[str]:
    return [sys.executable, str(CLIENT), str(file)]


def started(command: list[str], file: Path) -> tuple[subprocess.Popen[str], int]:
    """Start `pagefold run` with a client; return when it has joined, with its PID."""
    words = [str(PAGEFOLD), "run", "--no-enable", *command, "--", *client_command(file)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert eventually(file.exists)
    return process, int(file.read_text())


def daemon_of(path: Path) -> int:
    return int(control.ask(path, {"verb": "stat"}, 120)["pid"])


def run_beside(pretender: Pretender, *options: str) -> str:
    """Run a command in the pretender's domain until it was asked twice; return what was said on stderr."""
    words = [str(PAGEFOLD), "run", "--domain", "web", *options, "--", "cat"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert eventually(lambda: len(pretender.asked) >= 2)
    _, err = process.communicate()
    assert process.returncode == 0
    return err


def test_what_was_saved_is_said_at_the_end(pretender: Pretender) -> None:
    lines = run_beside(pretender).splitlines()
    assert re.fullmatch(
        r"pagefold: saved 11\.7 MiB at most \(after \d+\.\d s\), 11\.7 MiB at the end, in 4 processes; settled after \d+\.\d s",
        lines[0],
    )
    assert lines[1:] == [
        "pagefold: No background merging in 1 client: userfaultfd(2): not permitted",
        "pagefold: Note: client 9 was dropped: ?[31mnonsense",
    ]
    assert [request["verb"] for request in pretender.asked][:2] == ["stat", "stat"]


def test_what_was_saved_as_json(pretender: Pretender) -> None:
    said = json.loads(run_beside(pretender, "--json"))
    assert (said["saved_bytes"], said["peak_saved_bytes"]) == (3003 * 4096, 3003 * 4096)
    assert said["peak_seconds"] >= 0 and said["settled_seconds"] >= 0
    assert (said["command"], said["exit_code"], said["domain"], said["troubles"]) == (["cat"], 0, "web", [])
    for name in ("counters", "clients", "groups", "refused", "notes", "windows", "knobs", "daemon_bytes"):
        assert said[name] == STAT[name]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tracked_bytes": 0}, "no memory was advised"),
        ({"knobs": {"run": 0}}, "run is 0"),
        ({"clients": [client_row(3)]}, "background merging was off"),
        ({}, "of 512.0 MiB that were advised no two pages were equal, or it ended too soon"),
    ],
)
def test_why_nothing_was_saved(pretender: Pretender, change: dict[str, Any], why: str) -> None:
    pretender.answers["stat"] = {**STAT, "saved_bytes": 0, "history": [], **change}
    line = run_beside(pretender).splitlines()[0]
    assert line.startswith("pagefold: nothing was saved in ")
    assert why in line


def test_knobs_go_to_the_daemon_that_is_joined(pretender: Pretender) -> None:
    run_beside(pretender, "--knob", "run=1", "--knob", "pages_to_scan=7")
    assert pretender.asked[0] == {"verb": "set", "knobs": {"run": "1", "pages_to_scan": "7"}}


@pytest.mark.parametrize("answer", [{"ok": True}, {**STAT, "clients": 3}, {"ok": False, "error": "no"}])
def test_a_daemon_of_another_version_does_not_harm_the_command(pretender: Pretender, answer: dict[str, Any]) -> None:
    pretender.answers["stat"] = answer
    assert run_beside(pretender).startswith(("pagefold: nothing was saved", "pagefold: what was saved cannot be told"))


def test_signals_reach_the_command(tmp_path: Path, runtime: Path) -> None:
    process, pid = started([], tmp_path / "one")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not alive(pid)
    assert err.startswith("pagefold: ")
    assert left(runtime) == []


def test_two_commands_share_a_domain(tmp_path: Path, runtime: Path) -> None:
    first, one = started(["--domain", "web"], tmp_path / "one")
    second, two = started(["--domain", "web", "--knob", "pages_to_scan=55"], tmp_path / "two")
    path = domain.socket_path("web")
    assert {client["pid"] for client in control.ask(path, {"verb": "clients"}, 120)["clients"]} == {one, two}
    stat = control.ask(path, {"verb": "stat"})
    assert stat["knobs"]["pages_to_scan"] == 55
    (tmp_path / "one").unlink()
    _, err = first.communicate()
    assert f"a process still uses the daemon (PID {stat['pid']}); it ends with the last of them" in err
    assert alive(stat["pid"]) and alive(two)
    (tmp_path / "two").unlink()
    second.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert eventually(lambda: not alive(stat["pid"]))
    assert left(runtime) == []


def test_a_killed_runner_leaves_nothing_once_its_command_has_ended(tmp_path: Path, runtime: Path) -> None:
    process, pid = started([], tmp_path / "one")
    (path,) = (path for path in (tmp_path / "pagefold").glob("run-*.sock"))
    daemon = daemon_of(path)
    process.kill()
    process.wait()
    assert eventually(lambda: control.ask(path, {"verb": "clients"}, 120)["clients"])
    assert alive(daemon) and alive(pid), "the command is the user's: it goes on, and its daemon with it"
    (tmp_path / "one").unlink()
    assert eventually(lambda: not alive(daemon) and not alive(pid))
    process.communicate()
    assert left(runtime) == []


def test_a_killed_daemon_does_not_end_the_command(tmp_path: Path, runtime: Path) -> None:
    process, pid = started([], tmp_path / "one")
    (path,) = (path for path in (tmp_path / "pagefold").glob("run-*.sock"))
    os.kill(daemon_of(path), signal.SIGKILL)
    time.sleep(0.5)
    assert alive(pid)
    (tmp_path / "one").unlink()
    _, err = process.communicate()
    assert process.returncode == 0
    assert "the daemon had ended early, and nothing was merged since: exit code -9" in err
    assert left(runtime) == []


def test_stopping_the_daemon_from_within_is_no_trouble(runtime: Path) -> None:
    result = run("run", "--", PAGEFOLD, "stop")
    assert result.returncode == 0
    assert re.match(r"daemon \d+ has ended\n", result.stdout)
    assert "early" not in result.stderr
    assert left(runtime) == []


def test_a_run_within_a_run_has_its_own_domain(runtime: Path) -> None:
    show = [sys.executable, "-S", "-c", "import os; print(os.environ['PAGEFOLD_SOCKET'], os.environ['PYTHONPATH'])"]
    script = "; ".join(shlex.join(command) for command in (show, [str(PAGEFOLD), "run", "--", *show]))
    result = run("run", "--", "sh", "-c", script)
    outer, nested = result.stdout.splitlines()
    assert outer.split()[0] != nested.split()[0]
    assert outer.split()[1] == nested.split()[1], "the path was added twice"
    assert left(runtime) == []


PAIR = """
import os, sys, time
import numpy as np
child = os.fork()  # before there is anything to share
table = np.random.default_rng(7).integers(0, 2**62, 1 << 20)  # 8 MiB
if child == 0:
    time.sleep(1000)
import pagefold
until = time.monotonic() + 120
while time.monotonic() < until:
    stat = pagefold.stats()["domain"]
    rows = [client for client in stat["clients"] if client["pages"]]
    if len(rows) == 2 and not all(row["background"] for row in rows):
        print("no background:", rows[0]["why"])
        break
    if stat["saved_bytes"] >= 8 << 20 and stat["settled"]:
        print("saved")
        break
    time.sleep(0.1)
time.sleep(2)  # more than one look of the runner
os.kill(child, 9)
os.waitpid(child, 0)
assert (table == np.random.default_rng(7).integers(0, 2**62, 1 << 20)).all()
"""


def test_processes_that_know_nothing_of_it_hold_equal_arrays_once(runtime: Path) -> None:
    result = run("run", "--json", "--", sys.executable, "-c", PAIR)
    assert result.returncode == 0, result.stderr
    if result.stdout.startswith("no background"):
        pytest.skip(result.stdout.strip())
    assert result.stdout == "saved\n"
    said = json.loads(result.stderr.splitlines()[-1])
    assert said["peak_saved_bytes"] == 8 << 20
    assert sum(client["merged_pages"] for client in said["clients"]) == 2 * (8 << 20) // 4096
    assert [(group["bytes"], len(group["pids"])) for group in said["groups"]] == [(8 << 20, 2)]
    assert left(runtime) == []
