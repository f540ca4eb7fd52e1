"""Judge what the agent does for a daemon, and against one that talks nonsense: a daemon made for the test, and a real agent."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import resource
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.live.children import Child, in_child, wait_until
from tests.live.fake_daemon import PAGE, SEALS, Connection, FakeDaemon, extent
from tests.live.test_agent import LIBRARIES, ROOT, Pages, contents, safe, threads

from pagefold.live import messages
from pagefold.live.agent import Agent, Library

kept: dict[str, Any] = {}


# --- what runs in the client ------------------------------------------------------------------------------------------------


def start(path: str, faults: str = "") -> None:
    if faults:
        functions = Library(LIBRARIES / "_agent_faults.so")
        functions.functions.pf_set_fault(faults.encode())
        kept["agent"] = Agent(functions)
    else:
        kept.setdefault("agent", Agent())
    kept["agent"].start(path)


def advise(pages: int, seed: int = 1, quietly: bool = False, zeros: int = 0) -> tuple[int, int]:
    """Return number and address of a new region."""
    made = Pages(contents(pages, seed, zeros))
    number = kept["agent"].advise(made.start, made.size, quietly=quietly)
    kept.setdefault("regions", {})[number] = made
    return number, made.start


def end(number: int, how: str = "unadvise") -> int:
    result = getattr(kept["agent"], how)(number)
    return int(result or 0)


def write(number: int, page: int, value: int) -> None:
    kept["regions"][number].write(page, value)


def intact() -> bool:
    return all(pages.intact() for pages in kept["regions"].values())


def merge(number: int, timeout: float | None = None) -> tuple[int, dict[str, int], int, int]:
    report = kept["agent"].merge(number, timeout)
    return report.through_daemon, report.by_name(), report.zero_pages, report.saved_bytes


def state() -> dict[str, int]:
    found = kept["agent"].state()
    return {
        name: getattr(found, name)
        for name in ("started", "connected", "windows_safe", "regions", "remapped", "restored")
    }


def files_of_agent() -> list[str]:
    """Return the extents that the agent has open, and those mapped as a whole."""
    found = []
    for link in Path(f"/proc/self/task/{threads()['pagefold']}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    views = re.findall(r"r--s .*(/memfd:\S+)", Path("/proc/self/maps").read_text())
    return sorted(name for name in [*found, *views] if "memfd:extent" in name)


# --- the other side -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    made = FakeDaemon(tmp_path / "a.sock")
    yield made
    made.close()


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Child]:
    """A client that is about to connect; it must be whole at the end."""
    with Child() as child:
        child.do(start, str(daemon.path))
        yield child
        if child.status is None:
            assert child.do(intact) if child.do(has_regions) else True


def has_regions() -> bool:
    return "regions" in kept


@pytest.fixture
def met(daemon: FakeDaemon, client: Child) -> Connection:
    """The connection of that client, welcomed."""
    connection = daemon.accept()
    connection.welcome()
    return connection


@pytest.fixture(scope="module")
def windows() -> None:
    if not in_child(safe):
        pytest.skip("userfaultfd windows are not permitted here")


def advised(met: Connection, client: Child, *arguments: Any) -> tuple[int, int]:
    """Have the client advise a region, and hear of it."""
    number, at = client.do(advise, *arguments)
    said = met.hear(messages.ADVISE)
    assert (said["region"], said["start"], said["pages"]) == (number, at, arguments[0])
    return number, at


# --- meeting --------------------------------------------------------------------------------------------------------------------


def test_hello_comes_first_and_regions_after_welcome(daemon: FakeDaemon, client: Child, windows: None) -> None:
    connection = daemon.accept()
    assert connection.hello["windows_safe"] == 1
    assert connection.hello["max_map_count"] == int(Path("/proc/sys/vm/max_map_count").read_text())
    assert connection.hello["want_device"] == 0
    first = client.do(advise, 10)
    second = client.do(advise, 20, 2, True)
    assert not client.do(state)["connected"]
    connection.welcome()
    for (number, at), pages, quiet in ((first, 10, 0), (second, 20, 1)):
        said = connection.hear(messages.ADVISE)
        assert (said["region"], said["start"], said["pages"], said["quiet"]) == (number, at, pages, quiet)
        assert said["tracked"] == 1
    wait_until(lambda: client.do(state)["connected"], "the connection")


def advise_unseen(pages: int, advice: int = 0) -> tuple[int, int]:
    made = Pages(contents(pages, 1, 0))
    libc = ctypes.CDLL(None)
    assert not advice or libc.madvise(ctypes.c_void_p(made.start), ctypes.c_size_t(made.size), advice) == 0
    number = kept["agent"].library.functions.pf_advise_unseen(made.start, made.size, 0)
    kept.setdefault("regions", {})[number] = made
    return number, made.start


def suits(number: int) -> int:
    return int(kept["agent"].library.suits(number))


def refused(number: int) -> int:
    code, report = kept["agent"].library.merge(number)
    assert not report.pages
    return int(code)


def test_the_daemon_hears_of_what_suits_only(met: Connection, client: Child) -> None:
    """A region that nobody looked at is looked at before it is said; one that does not suit is not said, and can be ended."""
    special, _ = client.do(advise_unseen, 8, 10)  # MADV_DONTFORK
    number, start = client.do(advise_unseen, 8)
    said = met.hear(messages.ADVISE)
    assert (said["region"], said["start"], said["pages"]) == (number, start, 8)
    assert client.do(suits, number) == 0
    assert client.do(suits, special) == client.do(refused, special) == -errno.EOPNOTSUPP
    assert client.do(suits, 999) == -errno.ENOENT
    met.give(1, contents(8, 1, 0))
    assert met.windows((special, client.do(place_of, special), 8, 1, 0)) == ["unsuitable"] * 8
    assert client.do(state)["regions"] == 1
    client.do(end, special)
    client.do(end, number)
    assert met.hear(messages.UNADVISE)["region"] == number
    assert client.do(state)["regions"] == 0


def let_open(files: bool) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if files else 3, hard))


def test_a_look_that_fails_is_no_verdict(met: Connection, client: Child) -> None:
    """Where smaps cannot be read for the time being, regions wait, the agent does not spin, and it finds out by itself when it can."""
    client.do(calls_to_read)
    client.do(let_open, False)
    number, _ = client.do(advise_unseen, 8)
    special, _ = client.do(advise_unseen, 8, 10)  # MADV_DONTFORK
    later, _ = client.do(advise_unseen, 8)
    assert client.do(suits, number) == client.do(suits, special) == client.do(refused, number) == -errno.EMFILE
    before = client.do(calls_to_read)
    time.sleep(2.5)
    assert client.do(calls_to_read) - before < 1000, "it tries without a pause"
    client.do(let_open, True)
    assert [met.hear(messages.ADVISE)["region"] for _ in range(2)] == [number, later]
    assert client.do(suits, number) == 0
    assert client.do(suits, special) == -errno.EOPNOTSUPP


def calls_to_read() -> int:
    """Return how often the agent's threads have called read(2). What it asks is opened at the first call."""
    if "io" not in kept:
        kept["io"] = [os.open(f"/proc/self/task/{number}/io", os.O_RDONLY) for number in threads().values()]
    return sum(int(re.search(rb"syscr: (\d+)", os.pread(io, 1000, 0))[1]) for io in kept["io"])


def place_of(number: int) -> int:
    return int(kept["regions"][number].start)


def test_regions_that_go_are_said_before_others_come(met: Connection, client: Child) -> None:
    for how in ("unadvise", "forget", "discard") * 3:
        number, _ = advised(met, client, 4)
        client.do(end_and_drop, number, how)
        said = met.hear(messages.UNADVISE)
        assert said["region"] == number


def end_and_drop(number: int, how: str) -> None:
    end(number, how)
    del kept["regions"][number]


def churn(rounds: int) -> list[int]:
    """Let regions come and go on the same memory, faster than they can be said."""
    agent, left = kept["agent"], []
    pages = Pages(contents(64))
    chance = np.random.default_rng(rounds)
    there: dict[int, int] = {}
    for _ in range(rounds):
        if there and chance.integers(2):
            page = int(chance.choice(list(there)))
            (agent.discard if chance.integers(2) else agent.unadvise)(there.pop(page))
        else:
            page = int(chance.integers(64))
            if page not in there:
                there[page] = agent.advise(pages.start + page * PAGE, PAGE)
    left = sorted(there.values())
    kept["regions"] = {0: pages}
    return left


def test_the_daemon_never_hears_of_memory_twice(met: Connection, client: Child) -> None:
    client.begin(churn, 2000)
    known: dict[int, int] = {}
    expected: list[int] | None = None
    while expected is None or sorted(known) != expected:
        kind, said = met.hear(messages.ADVISE, messages.UNADVISE)
        if kind == messages.ADVISE:
            assert int(said["region"]) not in known
            assert int(said["start"]) not in known.values(), "advised twice"
            known[int(said["region"])] = int(said["start"])
        else:
            del known[int(said["region"])]
        if expected is None and int(said["region"]) > 500:
            expected = client.result()


def test_a_daemon_of_another_user_is_left_alone(tmp_path: Path) -> None:
    if not ROOT:
        pytest.skip("needs root to be two users")
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.geteuid() and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    with Child() as other, Child() as client:
        other.do(serve_as_nobody, str(tmp_path))
        client.do(start, str(tmp_path / "nobody" / "a.sock"))
        assert other.do(hung_up_without_a_word)


def serve_as_nobody(folder: str) -> None:
    place = Path(folder) / "nobody"
    place.mkdir(mode=0o755)
    os.chown(place, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    kept["daemon"] = FakeDaemon(place / "a.sock")
    (place / "a.sock").chmod(0o666)


def hung_up_without_a_word() -> bool:
    connection = kept["daemon"]._socket.accept()[0]
    connection.settimeout(30)
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


def become_nobody(path: str) -> None:
    import ctypes

    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
    start(path)


@pytest.mark.skipif(not ROOT, reason="needs root to become nobody")
def test_a_device_that_the_daemon_passes_makes_windows_safe(tmp_path: Path, windows: None) -> None:
    if (
        Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0"
        or not Path("/dev/userfaultfd").exists()
    ):
        pytest.skip("everybody may open userfaultfd here, or there is no device")
    for folder in [tmp_path, *tmp_path.parents][:4]:
        if folder != Path("/tmp"):
            folder.chmod(0o755)
    daemon = FakeDaemon(tmp_path / "a.sock")
    daemon.path.chmod(0o666)
    with Child() as client:
        client.do(become_nobody, str(daemon.path))
        connection = daemon.accept()
        assert (connection.hello["windows_safe"], connection.hello["want_device"]) == (0, 1)
        assert b"userfaultfd" in connection.hello["why"]
        number, at = client.do(advise, 8)
        connection.say(messages.WELCOME, (os.open("/dev/userfaultfd", os.O_RDWR),), has_device=1)
        assert connection.gone(), "it says HELLO anew, on a connection of its own"
        connection = daemon.accept()
        assert (connection.hello["windows_safe"], connection.hello["want_device"]) == (1, 0)
        connection.welcome()
        said = connection.hear(messages.ADVISE)
        assert (said["region"], said["tracked"]) == (number, 1), "what was advised before is tracked now"
        connection.give(1, contents(8))
        assert connection.windows((number, at, 8, 1, 0)) == ["merged"] * 8
        assert client.do(intact)
    daemon.close()


# --- windows ---------------------------------------------------------------------------------------------------------------------


def test_windows_merge_what_is_equal_and_nothing_else(met: Connection, client: Child, windows: None) -> None:
    number, at = advised(met, client, 64, 1, False, 8)
    data = contents(64, 1, False)
    data[:] = contents(64, 1, 8)
    data[5] ^= 1
    met.give(7, data)
    assert met.windows((number, at, 10, 7, 0)) == ["merged"] * 5 + ["differs"] + ["merged"] * 4
    assert client.do(intact)
    assert met.windows((number, at, 10, 7, 0)) == ["already"] * 5 + ["differs"] + ["already"] * 4
    client.do(write, number, 3, 9)
    assert met.windows((number, at + 2 * PAGE, 3, 7, 2)) == ["already", "broken", "already"]
    several = met.windows(
        (number, at + 20 * PAGE, 2, 7, 20),
        (number, at + 60 * PAGE, 4, 0, 0),  # zeros become a hole
        (number, at + 30 * PAGE, 2, 7, 40),  # other slots
        (number, at + 40 * PAGE, 1, 0, 0),  # not zeros
    )
    assert several == ["merged"] * 6 + ["differs"] * 3
    assert client.do(intact)


def test_windows_that_cannot_be_are_answered(met: Connection, client: Child, windows: None) -> None:
    number, at = advised(met, client, 64)
    met.give(1, contents(64))
    for run, expected in (
        ((number + 1, at, 2, 1, 0), "unmanaged"),
        ((0, at, 2, 1, 0), "unmanaged"),
        ((-1, at, 2, 1, 0), "unmanaged"),
        ((number, at, 2, 2, 0), "bad"),  # no such extent
        ((number, at, 2, 1, 63), "bad"),  # beyond its end
        ((number, at, 2, 1, 2**32 - 1), "bad"),
        ((number, at, 64, 1, 2**32 - 64), "bad"),
        ((number, at + 1, 2, 1, 0), "unmanaged"),
        ((number, at - PAGE, 2, 1, 0), "unmanaged"),
        ((number, at + 63 * PAGE, 2, 1, 0), "unmanaged"),
        ((number, 0, 2, 1, 0), "unmanaged"),
        ((number, 2**64 - PAGE, 2, 1, 0), "unmanaged"),
        ((number, at + 1, 2, messages.PRIVATE, 0), "unmanaged"),
        ((number, at - PAGE, 2, messages.PRIVATE, 0), "unmanaged"),
        ((number, at + 63 * PAGE, 2, messages.PRIVATE, 0), "unmanaged"),
        ((number, 2**64 - PAGE, 2, messages.PRIVATE, 0), "unmanaged"),
        ((number + 1, at, 2, messages.PRIVATE, 0), "unmanaged"),
    ):
        got = set(met.windows(run))
        assert got == {expected} or (expected == "unmanaged" and got == {"bad"}), (run, got)
    client.do(end, number)
    met.hear(messages.UNADVISE)
    assert met.windows((number, at, 2, 1, 0)) == ["unmanaged"] * 2


def test_a_full_batch(met: Connection, client: Child, windows: None) -> None:
    pages = messages.BATCH_PAGES
    number, at = advised(met, client, pages)
    met.give(1, contents(pages))
    runs = [(number, at + first * PAGE, messages.RUN_PAGES, 1, first) for first in range(0, pages, messages.RUN_PAGES)]
    assert met.windows(*runs) == ["merged"] * pages
    assert client.do(intact)


def test_runs_that_shall_be_private_again(met: Connection, client: Child, windows: None) -> None:
    number, at = advised(met, client, 32)
    met.give(1, contents(32))
    assert met.windows((number, at, 32, 1, 0)) == ["merged"] * 32
    client.do(write, number, 3, 9)
    assert met.windows((number, at, 20, messages.PRIVATE, 0)) == ["merged"] * 20
    assert client.do(intact)
    assert client.do(state)["restored"] == 20
    assert met.windows((number, at, 2, 1, 0)) == ["merged"] * 2, "it can merge again"
    assert met.windows((number, at + 19 * PAGE, 2, 1, 19)) == ["merged", "already"]


def test_a_released_extent_is_closed_and_its_pages_stay(met: Connection, client: Child, windows: None) -> None:
    number, at = advised(met, client, 16)
    met.give(1, contents(16))
    met.give(2, contents(16, 2))
    assert met.windows((number, at, 16, 1, 0)) == ["merged"] * 16
    assert len(client.do(files_of_agent)) == 4
    met.say(messages.RELEASE, extent=1)
    assert met.windows((number, at, 1, 1, 0)) == ["bad"]
    assert len(client.do(files_of_agent)) == 2
    assert client.do(intact)
    met.say(messages.RELEASE, extent=2)
    assert met.windows((number, at, 1, 2, 0)) == ["bad"]
    assert client.do(files_of_agent) == []


def test_slots_of_another_extent_take_the_place(met: Connection, client: Child, windows: None) -> None:
    number, at = advised(met, client, 16)
    met.give(1, contents(16))
    met.give(2, contents(16))
    assert met.windows((number, at, 16, 1, 0)) == ["merged"] * 16
    assert met.windows((number, at, 16, 2, 0)) == ["merged"] * 16
    assert client.do(state)["remapped"] == 16
    assert met.windows((number, at, 16, 2, 0)) == ["already"] * 16


def limit_descriptors() -> None:
    used = len(list(Path(f"/proc/self/task/{threads()['pagefold']}/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_more_extents_than_descriptors(met: Connection, client: Child, windows: None) -> None:
    number, at = advised(met, client, 16)
    met.give(1, contents(16))
    assert met.windows((number, at, 1, 1, 0)) == ["merged"]
    client.do(limit_descriptors)
    met.give(2, contents(16))
    met.give(3, contents(16))
    assert met.windows((number, at + PAGE, 1, 2, 1)) == ["merged"]
    assert met.windows((number, at + 2 * PAGE, 1, 3, 2)) == ["no_vma"], "its descriptor did not arrive"
    assert met.windows((number, at + 2 * PAGE, 1, 1, 2)) == ["merged"]
    met.say(messages.RELEASE, extent=3)
    met.say(messages.RELEASE, extent=2)
    met.give(4, contents(16))
    assert met.windows((number, at + 3 * PAGE, 1, 4, 3)) == ["merged"]


# --- merging now -------------------------------------------------------------------------------------------------------------------


def test_a_merge_goes_through_the_daemon(met: Connection, client: Child) -> None:
    number, _ = advised(met, client, 8)
    client.begin(merge, number)
    said = met.hear(messages.SYNC)
    assert said["region"] == number
    by_status = np.zeros(messages.STATUSES, np.uint64)
    by_status[[messages.MERGED, messages.UNKNOWN]] = 5, 3
    met.say(messages.SYNCED, token=int(said["token"]) + 1, pages=99)  # somebody else's
    met.say(messages.SYNCED, token=said["token"], pages=8, by_status=by_status, zero_pages=2, saved_bytes=12345)
    assert client.result() == (1, {"merged": 5, "unknown": 3}, 2, 12345)
    client.begin(merge, number)
    met.say(messages.SYNCED, token=met.hear(messages.SYNC)["token"], error=-11)
    with pytest.raises(AssertionError, match="run=1"):
        client.result()


def test_a_merge_that_takes_too_long(met: Connection, client: Child) -> None:
    number, _ = advised(met, client, 8)
    client.begin(merge, number, 0.05)
    token = met.hear(messages.SYNC)["token"]
    with pytest.raises(AssertionError, match="more time"):
        client.result()
    met.say(messages.SYNCED, token=token, pages=8)  # too late: nobody listens, nothing breaks
    client.begin(merge, number)
    met.say(messages.SYNCED, token=met.hear(messages.SYNC)["token"], pages=8)
    assert client.result()[0] == 1


def test_a_merge_waits_for_the_welcome(daemon: FakeDaemon, client: Child) -> None:
    number, _ = client.do(advise, 8)
    client.begin(merge, number)
    connection = daemon.accept()
    connection.welcome()
    connection.hear(messages.ADVISE)
    connection.say(messages.SYNCED, token=connection.hear(messages.SYNC)["token"], pages=8)
    assert client.result()[0] == 1


def test_a_daemon_that_goes_in_the_middle_of_a_merge(met: Connection, daemon: FakeDaemon, client: Child) -> None:
    number, _ = advised(met, client, 8)
    client.begin(merge, number)
    met.hear(messages.SYNC)
    daemon.close()
    met.close()
    assert client.result()[:2] == (0, {"unknown": 8}), "the embedded store takes over"


def plain_start(path: str) -> None:
    become_nobody(path)


@pytest.mark.skipif(not ROOT, reason="needs root to become nobody")
def test_plain_swaps_only_while_somebody_waits_for_them(tmp_path: Path) -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("everybody may open userfaultfd here")
    for folder in [tmp_path, *tmp_path.parents][:4]:
        if folder != Path("/tmp"):
            folder.chmod(0o755)
    daemon = FakeDaemon(tmp_path / "a.sock")
    daemon.path.chmod(0o666)
    with Child() as client:
        client.do(plain_start, str(daemon.path))
        connection = daemon.accept()
        connection.welcome()
        number, at = advised(connection, client, 8)
        other, there = advised(connection, client, 8, 2)
        connection.give(1, contents(8))
        connection.give(2, contents(8, 2))
        assert connection.windows((number, at, 2, 1, 0)) == ["off"] * 2
        assert connection.windows((number, at, 2, 1, 0), plain=1) == ["off"] * 2, "nobody promised anything"
        client.begin(merge, number)
        token = connection.hear(messages.SYNC)["token"]
        assert connection.windows((number, at, 2, 1, 0)) == ["off"] * 2
        both = connection.windows((number, at, 2, 1, 0), (other, there, 2, 2, 0), plain=1)
        assert both == ["merged"] * 2 + ["off"] * 2
        connection.say(messages.SYNCED, token=token, pages=8)
        client.result()
        assert connection.windows((number, at + 2 * PAGE, 2, 1, 2), plain=1) == ["off"] * 2
        assert client.do(intact)
    daemon.close()


# --- death on either side --------------------------------------------------------------------------------------------------------------


def test_another_daemon_learns_everything_anew(
    daemon: FakeDaemon, met: Connection, client: Child, windows: None
) -> None:
    number, at = advised(met, client, 16)
    met.give(1, contents(16))
    assert met.windows((number, at, 8, 1, 0)) == ["merged"] * 8
    met.close()
    again = daemon.accept()
    again.welcome()
    said = again.hear(messages.ADVISE)
    assert (said["region"], said["start"], said["pages"]) == (number, at, 16)
    assert client.do(files_of_agent) == [], "the extents of the dead one are closed; their pages stay"
    assert client.do(intact)
    again.give(1, contents(16))  # it counts from 1 again
    assert again.windows((number, at, 16, 1, 0)) == ["merged"] * 16, "no slot of the dead one passes for one of this"
    assert client.do(state)["remapped"] == 8
    assert client.do(end, number) == 0


def test_a_client_goes_where_it_is_sent(met: Connection, client: Child, tmp_path: Path) -> None:
    advised(met, client, 4)
    elsewhere = FakeDaemon(tmp_path / "b.sock")
    client.do(start, str(elsewhere.path))
    assert met.gone()
    connection = elsewhere.accept()
    connection.welcome()
    connection.hear(messages.ADVISE)
    client.do(start, "")
    assert connection.gone()
    wait_until(lambda: not client.do(state)["connected"], "the end")
    assert client.do(merge, 1)[0] == 0
    elsewhere.close()


def test_a_daemon_that_comes_late_is_found(tmp_path: Path) -> None:
    with Child() as client:
        client.do(start, str(tmp_path / "a.sock"))
        number, _ = client.do(advise, 4)
        assert client.do(merge, number)[0] == 0
        daemon = FakeDaemon(tmp_path / "a.sock")
        connection = daemon.accept()
        connection.welcome()
        connection.hear(messages.ADVISE)
        daemon.close()


def fork_and_connect(path: str) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            agent = kept["agent"]
            assert not agent.state().connected
            agent.start(path)
            number = next(iter(kept["regions"]))
            kept["regions"][number].write(1, 77)
            assert intact()
            agent.merge(number)
            assert intact()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_is_a_client_of_its_own(
    daemon: FakeDaemon, met: Connection, client: Child, windows: None
) -> None:
    number, at = advised(met, client, 16)
    met.give(1, contents(16))
    assert met.windows((number, at, 16, 1, 0)) == ["merged"] * 16
    client.begin(fork_and_connect, str(daemon.path))
    child = daemon.accept()
    child.welcome()
    assert child.hear(messages.ADVISE)["region"] == number
    token = child.hear(messages.SYNC)["token"]
    child.give(1, contents(16))
    assert child.windows((number, at, 16, 1, 0))[2:] == ["merged"] * 14, (
        "remapped: its own description holds the extent"
    )
    child.say(messages.SYNCED, token=token, pages=16)
    assert client.result() == 0
    assert child.gone()
    assert met.windows((number, at, 16, 1, 0)) == ["already"] * 16


@pytest.mark.parametrize("point", range(1, 13))
def test_killed_at_any_point_of_the_protocol(point: int, daemon: FakeDaemon, windows: None) -> None:
    with Child() as client:
        with contextlib.suppress(AssertionError, ConnectionError, BrokenPipeError):
            client.begin(live_through_everything, str(daemon.path), f"link:{point}")
            assert point > 1  # it never comes
            connection = daemon.accept()
            connection.welcome()
            said = connection.hear(messages.ADVISE)
            number, at = int(said["region"]), int(said["start"])
            token = connection.hear(messages.SYNC)["token"]
            connection.give(1, contents(8))
            connection.windows((number, at, 8, 1, 0))
            connection.say(messages.RELEASE, extent=1)
            connection.say(messages.SYNCED, token=token)
            connection.hear(messages.UNADVISE)
        assert client.wait() == -signal.SIGKILL


def live_through_everything(path: str, faults: str) -> None:
    start(path, faults)
    number, _ = advise(8)
    merge(number)
    end(number)
    signal.pause()


# --- nonsense ---------------------------------------------------------------------------------------------------------------------------


def packed(kind: int, **fields: Any) -> bytes:
    return messages.pack(kind, **fields)


def header(kind: int, size: int, **changes: int) -> bytes:
    about = {"magic": messages.MAGIC, "version": messages.VERSION, "type": kind, "length": size, "zero": 0} | changes
    return struct.pack("<IHHII", *about.values())


def bent(kind: int, **changes: int) -> bytes:
    whole = packed(kind)
    return header(kind, len(whole), **changes) + whole[16:]


def runs(*some: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.array(list(some), messages.run)


NONSENSE = {
    "a byte": b"x",
    "half a header": header(messages.SYNCED, 16)[:8],
    "only a header": header(messages.WINDOWS, 16),
    "another magic": bent(messages.SYNCED, magic=1),
    "another version": bent(messages.SYNCED, version=2),
    "another length": bent(messages.SYNCED, length=4),
    "a zero that is none": bent(messages.SYNCED, zero=1),
    "no such type": header(77, 16),
    "a client's message": packed(messages.HELLO),
    "control": header(messages.CONTROL, 18) + b"{}",
    "too long": packed(messages.SYNCED) + b"\0",
    "far too long": packed(messages.WINDOWS) + bytes(60000),
    "welcomed twice": packed(messages.WELCOME),
    "no runs": packed(messages.WINDOWS, count=0),
    "too many runs": packed(messages.WINDOWS, count=messages.BATCH_RUNS + 1),
    "far too many runs": packed(messages.WINDOWS, count=2**32 - 1),
    "a run of nothing": packed(messages.WINDOWS, count=1, runs=runs((1, PAGE, 0, 0, 0, 0))),
    "a run too long": packed(messages.WINDOWS, count=1, runs=runs((1, PAGE, messages.RUN_PAGES + 1, 0, 0, 0))),
    "a run of everything": packed(messages.WINDOWS, count=1, runs=runs((1, 0, 2**32 - 1, 0, 0, 0))),
    "a run with a secret": packed(messages.WINDOWS, count=1, runs=runs((1, PAGE, 1, 0, 0, 1))),
    "very plain": packed(messages.WINDOWS, count=1, plain=2, runs=runs((1, PAGE, 1, 0, 0, 0))),
    "an extent without a descriptor": packed(messages.EXTENT, extent=5, slots=4),
    "released what never was": packed(messages.RELEASE, extent=5),
    "a good error": packed(messages.SYNCED, error=1),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_ends_the_connection_and_nothing_else(
    what: str, met: Connection, daemon: FakeDaemon, client: Child
) -> None:
    number, _ = advised(met, client, 8)
    met.raw(NONSENSE[what])
    assert met.gone()
    again = daemon.accept()
    again.welcome()
    assert again.hear(messages.ADVISE)["region"] == number


def unsealed(seals: int) -> int:
    return extent(contents(4), seals)


EXTENTS = {
    "unsealed": (lambda: unsealed(0), 4),
    "may shrink": (lambda: unsealed(SEALS & ~2), 4),
    "may be written": (lambda: unsealed(SEALS & ~0x10), 4),
    "smaller than it says": (lambda: unsealed(SEALS), 5),
    "no slots": (lambda: unsealed(SEALS), 0),
    "absurd": (lambda: unsealed(SEALS), 2**32 - 1),
    "a file": (lambda: os.open(__file__, os.O_RDONLY), 1),
    "a folder": (lambda: os.open("/", os.O_RDONLY), 1),
    "a device": (lambda: os.open("/dev/zero", os.O_RDWR), 1),
    "a pipe": (lambda: os.pipe()[0], 1),
}


@pytest.mark.parametrize("what", EXTENTS)
def test_an_extent_must_be_what_it_should(what: str, met: Connection, daemon: FakeDaemon, client: Child) -> None:
    advised(met, client, 8)
    make, slots = EXTENTS[what]
    met.say(messages.EXTENT, (make(),), extent=1, slots=slots)
    assert met.gone()
    assert client.do(files_of_agent) == []
    daemon.accept()


@pytest.mark.parametrize(
    "fields", [{"extent": 0, "slots": 4}, {"extent": 1, "slots": 4}, {"extent": 9, "slots": 4, "zero": 1}]
)
def test_an_extent_has_a_number_of_its_own(
    fields: dict[str, int], met: Connection, daemon: FakeDaemon, client: Child
) -> None:
    met.give(1, contents(4))
    met.say(messages.EXTENT, (unsealed(SEALS),), **fields)
    assert met.gone()
    daemon.accept()


def test_descriptors_nobody_asked_for_are_closed(daemon: FakeDaemon, client: Child) -> None:
    before = None
    for kind, fields, count in (
        (messages.WELCOME, {"has_device": 0}, 1),
        (messages.WELCOME, {"has_device": 1}, 1),  # it did not want one
        (messages.WELCOME, {"has_device": 1}, 0),
        (messages.WELCOME, {"has_device": 2}, 1),
        (messages.SYNCED, {}, 1),
        (messages.EXTENT, {"extent": 1, "slots": 4}, 2),
        (messages.EXTENT, {"extent": 1, "slots": 4}, 8),
        (messages.EXTENT, {"extent": 1, "slots": 4}, 100),
        (messages.WINDOWS, {"count": 1, "runs": runs((1, PAGE, 1, 0, 0, 0))}, 1),
    ):
        connection = daemon.accept()
        if client.do(state)["windows_safe"] == 0 and fields == {"has_device": 1}:
            continue
        if kind != messages.WELCOME:
            connection.welcome()
        connection.say(kind, tuple(unsealed(SEALS) for _ in range(count)), **fields)
        assert connection.gone()
        wait_until(lambda: client.do(files_of_agent) == [], "descriptors to be closed")
        assert before is None or before
    assert client.do(state)["started"]


def test_nothing_counts_before_the_welcome(daemon: FakeDaemon, client: Child) -> None:
    for kind, fields in (
        (messages.WINDOWS, {"count": 1, "runs": runs((1, PAGE, 1, 0, 0, 0))}),
        (messages.RELEASE, {"extent": 1}),
        (messages.SYNCED, {}),
    ):
        connection = daemon.accept()
        connection.say(kind, **fields)
        assert connection.gone()


@pytest.mark.parametrize("seed", range(4))
def test_random_packets(seed: int, daemon: FakeDaemon, client: Child) -> None:
    """Packets of the right shape with random fields, cut, stretched and flipped; the client stays whole."""
    chance = np.random.default_rng(seed)
    number, at = client.do(advise, 32)
    connection = None
    kinds = [messages.WELCOME, messages.EXTENT, messages.WINDOWS, messages.WINDOWS, messages.RELEASE, messages.SYNCED]
    connections = 0
    while connections < 30:
        if connection is None:
            connection = daemon.accept()
            connection.welcome()
            connection.give(1, contents(32))
            connections += 1
        kind = int(chance.choice(kinds))
        packet = bytearray(packed(kind))
        if kind == messages.WINDOWS:
            count = int(chance.integers(1, 5))
            some = [
                (
                    int(chance.choice([number, number, 0, 2**62])),
                    int(chance.choice([at, at + 3 * PAGE, at + 1, 0, 2**64 - PAGE])),
                    int(chance.integers(1, 40)),
                    int(chance.choice([0, 1, 2, messages.PRIVATE])),
                    int(chance.choice([0, 3, 31, 2**32 - 1])),
                    0,
                )
                for _ in range(count)
            ]
            packet = bytearray(packed(kind, batch=1, count=count, plain=int(chance.integers(2)), runs=runs(*some)))
        for _ in range(int(chance.choice([0, 0, 1, 3]))):
            packet[int(chance.integers(16, len(packet)))] = int(chance.integers(256))
        if not chance.integers(20):
            packet = packet[: int(chance.integers(1, len(packet)))]
        fds = (unsealed(SEALS),) if kind == messages.EXTENT and chance.integers(4) else ()
        try:
            connection.raw(bytes(packet), fds)
            connection.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while connection.socket.recv(messages.MOST_BYTES):
                    pass
                connection = None
        except (BrokenPipeError, ConnectionResetError):
            connection = None
        except BlockingIOError:
            pass
    assert client.do(intact)
    assert client.do(state)["started"]


# --- a daemon that is slow ------------------------------------------------------------------------------------------------------------


def many_regions(count: int) -> int:
    pages = Pages(contents(count))
    for page in range(0, count, 2):
        kept["agent"].advise(pages.start + page * PAGE, PAGE)
    kept["regions"] = {0: pages}
    return count // 2


def test_a_daemon_that_does_not_read_holds_nobody_up(met: Connection, client: Child) -> None:
    count = client.do(many_regions, 1000)  # more than the socket takes
    heard = {int(met.hear(messages.ADVISE)["region"]) for _ in range(count)}
    assert len(heard) == count


def stop_and_count() -> int:
    kept["agent"].stop()
    wait_until(lambda: not threads(), "the threads to end")
    return len(threads())


def test_stopping_does_not_wait_for_a_daemon_that_does_not_read(met: Connection, client: Child) -> None:
    client.do(many_regions, 1000)
    assert client.do(stop_and_count) == 0
    assert met.gone()


def idle_switches() -> dict[str, int]:
    found = {}
    for name, number in threads().items():
        text = Path(f"/proc/self/task/{number}/status").read_text()
        found[name] = sum(int(count) for count in re.findall(r"ctxt_switches:\s+(\d+)", text))
    return found


def test_a_connected_client_does_nothing_while_nothing_happens(met: Connection, client: Child) -> None:
    advised(met, client, 4)
    before: dict[str, int] = {}
    while before != (now := client.do(idle_switches)):
        before = now
        time.sleep(0.2)
    assert set(before) == {"pagefold", "pagefold-link"}
    time.sleep(1)
    assert client.do(idle_switches) == before, "it polls"
