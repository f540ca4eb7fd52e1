"""Judge the questions to a daemon: any length, any failure a clear line, and nobody else answers."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pagefold.errors import KnobBusy, KnobInvalid, NotHere
from pagefold.live import control, messages
from pagefold.live.control import HEADER, MOST_BYTES, NoAnswer, Refused, ask, failure, pack, parse_request, served_by

Answer = Callable[[socket.socket, bytes], None]


class Server:
    """A daemon that says what a test wants."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.path, self.answer = path, answer
        self.requests: list[bytes] = []
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listening.bind(str(path))
        self.listening.listen(8)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            with connection:
                if packet := connection.recv(MOST_BYTES):
                    self.requests.append(packet)
                    self.answer(connection, packet)

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listening.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Answer], Server]]:
    made: list[Server] = []

    def begin(answer: Answer) -> Server:
        made.append(Server(tmp_path / f"{len(made)}.sock", answer))
        return made[-1]

    yield begin
    for server in made:
        server.close()


def says(value: dict[str, object]) -> Answer:
    def answer(connection: socket.socket, packet: bytes) -> None:
        for piece in pack(value):
            connection.send(piece)

    return answer


def test_the_header_is_that_of_the_messages() -> None:
    assert (HEADER.size, control.MAGIC, control.VERSION) == (messages.header.itemsize, messages.MAGIC, messages.VERSION)
    assert (control.CONTROL, control.MOST_BYTES) == (messages.CONTROL, messages.MOST_BYTES)
    kind, body = messages.unpack(pack({"verb": "stat"})[0])
    assert kind == messages.CONTROL
    assert parse_request(body) == {"verb": "stat"}


@pytest.mark.parametrize("letters", [0, 1, 65500, 65520, 65536, 200_000])
def test_answers_of_any_length(serve: Callable[[Answer], Server], letters: int) -> None:
    server = serve(says({"ok": True, "text": "x" * letters}))
    assert ask(server.path, {"verb": "stat"}) == {"ok": True, "text": "x" * letters}


def test_answers_that_fill_their_packets_exactly() -> None:
    """Else the reader would wait for one more."""
    empty = len(json.dumps({"text": ""}, separators=(",", ":")))
    for more in (-1, 0, 1):
        packets = pack({"text": "x" * (2 * (MOST_BYTES - HEADER.size) - empty + more)})
        assert [len(packet) == MOST_BYTES for packet in packets] == [True] * (len(packets) - 1) + [False]


def test_the_request_arrives_as_it_was(serve: Callable[[Answer], Server]) -> None:
    server = serve(says({"ok": True}))
    ask(server.path, {"verb": "set", "knobs": {"run": "ö"}})
    assert parse_request(messages.unpack(server.requests[0])[1]) == {"verb": "set", "knobs": {"run": "ö"}}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b'{"verb": "explode"}', b"{}", b"\xff", b"[" * 60000])
def test_requests_that_are_none(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        parse_request(body)
    assert failure(caught.value)["errno"] == errno.EINVAL
    assert "update the older side" in str(caught.value) or "use stat, set" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (KnobInvalid("run", "7 is out of range; use 0 to 2"), errno.EINVAL, 2),
        (KnobBusy("merge_across_nodes", "merged pages exist"), errno.EBUSY, 1),
        (NotHere("no such thing"), 0, 77),
    ],
)
def test_errors_arrive_with_their_codes(
    serve: Callable[[Answer], Server], error: Refused, code: int, exit_code: int
) -> None:
    server = serve(says(failure(error)))
    with pytest.raises(Refused) as caught:
        ask(server.path, {"verb": "set"})
    assert (str(caught.value), caught.value.errno, caught.value.exit_code) == (str(error), code, exit_code)


def test_no_daemon(tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    with pytest.raises(NotHere, match=r"no daemon there .*start one with `pagefold serve`"):
        ask(path, {"verb": "stat"})
    assert not served_by(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    with pytest.raises(NotHere, match="Connection refused"):
        ask(path, {"verb": "stat"})
    assert not served_by(path)


def test_a_daemon_that_does_not_answer(serve: Callable[[Answer], Server]) -> None:
    until = threading.Event()
    server = serve(lambda connection, packet: until.wait() and None)
    try:
        with pytest.raises(NoAnswer, match=r"did not answer within 0.05 seconds"):
            ask(server.path, {"verb": "stat"}, 0.05)
        assert served_by(server.path) == os.getpid()
    finally:
        until.set()


def test_a_daemon_that_does_not_accept(tmp_path: Path) -> None:
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as busy:
        busy.bind(str(path))
        busy.listen(0)
        waiting = []
        for _ in range(16):
            one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            one.setblocking(False)
            waiting.append(one)
            try:
                one.connect(str(path))
            except BlockingIOError:
                break
        with pytest.raises(NoAnswer, match="does not accept connections"):
            ask(path, {"verb": "stat"}, 0.05)
        for one in waiting:
            one.close()


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"hello",
        HEADER.pack(control.MAGIC, 2, control.CONTROL, HEADER.size + 2, 0) + b"{}",
        HEADER.pack(control.MAGIC, 1, messages.WELCOME, HEADER.size + 2, 0) + b"{}",
        HEADER.pack(control.MAGIC, 1, control.CONTROL, HEADER.size + 3, 0) + b"{}",
        HEADER.pack(control.MAGIC, 1, control.CONTROL, HEADER.size + 2, 0) + b"[]",
        HEADER.pack(control.MAGIC, 1, control.CONTROL, HEADER.size + 1, 0) + b"{",
    ],
)
def test_answers_that_are_none(serve: Callable[[Answer], Server], packet: bytes) -> None:
    server = serve(lambda connection, _: connection.send(packet) and None)
    with pytest.raises((NoAnswer, NotHere), match=r"update the older side|went away"):
        ask(server.path, {"verb": "stat"})


def test_a_daemon_that_dies_while_it_is_asked(serve: Callable[[Answer], Server]) -> None:
    server = serve(lambda connection, packet: connection.close())
    with pytest.raises(NotHere, match="went away"):
        ask(server.path, {"verb": "stat"})


def test_a_refusal_without_words(serve: Callable[[Answer], Server]) -> None:
    for answer in ({}, {"ok": False}, {"ok": "yes"}, {"ok": False, "exit_code": "x", "errno": None}):
        with pytest.raises(Refused) as caught:
            ask(serve(says(answer)).path, {"verb": "stat"})
        assert caught.value.exit_code == 1


AS_NOBODY = """
import os, sys
from pathlib import Path
from pagefold.live.control import ask
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
try:
    ask(Path(sys.argv[1]), {"verb": "stat"}, 5)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_another_users_socket(serve: Callable[[Answer], Server], tmp_path: Path) -> None:
    """A client would else let a stranger be its daemon."""
    server = serve(says({"ok": True}))
    server.path.chmod(0o600)
    for folder in [tmp_path, *tmp_path.parents][:3]:
        folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(server.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("NotPermitted ") and "belongs to another user" in done.stdout
    assert not server.requests


STRANGER = """
import os, socket, sys
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65533, 65533, 65533)
listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listening.bind("\\0" + sys.argv[1])
listening.listen(4)
print("listening", flush=True)
sys.stdin.read()
"""
ASK_STRANGER = AS_NOBODY.replace("Path(sys.argv[1])", '"\\0" + sys.argv[1]')


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_a_stranger_that_listens_where_ours_should() -> None:
    name = f"pagefold-test-{os.getpid()}"
    stranger = subprocess.Popen(
        [sys.executable, "-c", STRANGER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert stranger.stdout and stranger.stdout.readline() == "listening\n"
    done = subprocess.run([sys.executable, "-c", ASK_STRANGER, name], capture_output=True, text=True, check=True)
    stranger.communicate()
    assert done.stdout.startswith("NotPermitted ") and "another user (uid 65533)" in done.stdout


def test_no_numpy_is_needed() -> None:
    script = "import sys; import pagefold.live.control, pagefold.live.domain; print('numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "False\n"
