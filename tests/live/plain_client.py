"""Own a client without any agent: it joins the daemon of $PAGEFOLD_SOCKET, advises a few pages, can swap none, and stays until told to go.

plain_client.py [FILE]    writes its PID to FILE when the daemon has welcomed it; ends when its stdin does, or when FILE is gone
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import sys
import time
from pathlib import Path

from pagefold.live import messages

PAGES = 16


def main() -> None:
    memory = mmap.mmap(-1, PAGES * messages.PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"\x55" * len(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(os.environ["PAGEFOLD_SOCKET"])
        connection.send(messages.pack(messages.HELLO, windows_safe=0, why_errno=-1, why=b"this is only a test"))
        kind, _ = messages.unpack(connection.recv(messages.MOST_BYTES))
        assert kind == messages.WELCOME
        connection.send(messages.pack(messages.ADVISE, region=1, start=start, pages=PAGES))
        if len(sys.argv) > 1:
            file = Path(sys.argv[1])
            file.with_suffix(".new").write_text(str(os.getpid()))
            file.with_suffix(".new").rename(file)
            while file.exists():
                time.sleep(0.01)
        else:
            print("joined", flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()
