"""Own the questions to a daemon that are not an agent's: JSON objects over its socket, an answer for each, errors with their exit codes.

A packet is the header of `messages.py` and a piece of the JSON text. A packet of MOST_BYTES is followed by another, so an
answer may be of any length. Standard library only: workers load this. Must not know: what the verbs mean.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from pagefold.errors import KnobError, NotHere, NotPermitted, PagefoldError

HEADER = struct.Struct("<IHHII")  # magic, version, type, length, zero; a test compares it with messages.header
MAGIC, VERSION, CONTROL = 0x4C4F4650, 1, 32
MOST_BYTES = 65536  # of a packet
VERBS = ("stat", "set", "stop", "settled", "clients", "history", "validate")
_MOST_ANSWER = 1 << 28  # bytes; more is no answer
_PEER = struct.Struct("3i")


class Refused(PagefoldError):  # noqa: N818
    """The daemon's own words; `exit_code` and `errno` are what it says."""

    def __init__(self, message: str, exit_code: int = 1, code: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.errno = code


class NoAnswer(PagefoldError):  # noqa: N818
    """A daemon is there, but did not answer in time, or not in our language."""


def pack(value: dict[str, Any]) -> list[bytes]:
    """Return the packets of a request or an answer, to be sent one after the other."""
    text = json.dumps(value, separators=(",", ":")).encode()
    most = MOST_BYTES - HEADER.size
    pieces = [text[at : at + most] for at in range(0, len(text) + 1, most)]
    return [HEADER.pack(MAGIC, VERSION, CONTROL, HEADER.size + len(piece), 0) + piece for piece in pieces]


def parse_request(body: bytes) -> dict[str, Any]:
    """Return a request from the JSON of its (only) packet; Refused if it is none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the request is not JSON; update the older side", 2, errno.EINVAL) from None
    if not isinstance(value, dict) or value.get("verb") not in VERBS:
        raise Refused(f"the request has no verb that is known; use {', '.join(VERBS)}", 2, errno.EINVAL)
    return value


def failure(error: PagefoldError) -> dict[str, Any]:
    """Return the answer that says an error."""
    code = error.errno if isinstance(error, KnobError | Refused) else 0
    return {"ok": False, "error": str(error), "errno": code or 0, "exit_code": error.exit_code}


def ask(path: Path, request: dict[str, Any], timeout: float | None = 10.0) -> dict[str, Any]:
    """Send a request and return the answer. NotHere: no daemon; NoAnswer: not in time; Refused: it says no. timeout None waits for ever."""
    until = None if timeout is None else time.monotonic() + timeout
    with _connect(path, until) as connection:
        try:
            for packet in pack(request):
                connection.send(packet)
            answer = _receive(connection, path, until)
        except TimeoutError:
            raise NoAnswer(
                f"{path}: the daemon did not answer within {timeout:g} seconds; it may be busy or stopped: try again"
            ) from None
        except OSError as error:
            raise NotHere(f"{path}: the daemon went away ({error.strerror}); start it again") from None
    if answer.get("ok") is not True:
        numbers = [answer.get(name) for name in ("exit_code", "errno")]
        exit_code, code = (number if isinstance(number, int) else 0 for number in numbers)
        raise Refused(str(answer.get("error", "the daemon says no, and not why")), exit_code or 1, code)
    return answer


def served_by(path: Path) -> int:
    """Return the PID of whoever listens there, 0 if nobody does. (Of a socket that was passed to a daemon: who made it.)"""
    try:
        with _connect(path, time.monotonic() + 1.0) as connection:
            return _peer(connection)[0]
    except PagefoldError:
        return 0


def _connect(path: Path, until: float | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        _limit(connection, until)
        connection.connect(str(path))
        uid = _peer(connection)[1]
        if uid not in (os.geteuid(), 0) and os.geteuid() != 0:
            raise NotPermitted(
                f"{path}: who listens there is another user (uid {uid}); remove it, or name another socket in PAGEFOLD_SOCKET"
            )
    except PermissionError:
        connection.close()
        raise NotPermitted(f"{path}: this daemon belongs to another user; ask as that user, or as root") from None
    except (TimeoutError, BlockingIOError):
        connection.close()
        raise NoAnswer(
            f"{path}: the daemon does not accept connections; it may be busy or stopped: try again"
        ) from None
    except OSError as error:
        connection.close()
        raise NotHere(
            f"{path}: no daemon there ({error.strerror}); start one with `pagefold serve`, or a command with `pagefold run`"
        ) from None
    except BaseException:
        connection.close()
        raise
    return connection


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    """Return the other side's (pid, uid, gid), as they were when it listened."""
    pid, uid, gid = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid, gid


def _receive(connection: socket.socket, path: Path, until: float | None) -> dict[str, Any]:
    text = b""
    while True:
        _limit(connection, until)
        packet = connection.recv(MOST_BYTES + 1)
        if not packet:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
        good = len(packet) >= HEADER.size and HEADER.unpack_from(packet) == (MAGIC, VERSION, CONTROL, len(packet), 0)
        text += packet[HEADER.size :]
        if not good or len(text) > _MOST_ANSWER:
            raise NoAnswer(f"{path}: the daemon does not speak protocol version {VERSION}; update the older side")
        if len(packet) < MOST_BYTES:
            break
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise NoAnswer(f"{path}: the daemon's answer is not a JSON object; update the older side")
    return value


def _limit(connection: socket.socket, until: float | None) -> None:
    connection.settimeout(None if until is None else max(until - time.monotonic(), 0.001))
