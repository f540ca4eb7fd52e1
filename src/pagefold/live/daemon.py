"""Own the daemon of one domain: its socket, its clients' packets, the questions of the command line, and when to work and when to rest.

Why one client cannot harm another: what it sends is checked where it arrives (`peer.py`), and whoever sends nonsense is dropped; what it
may make us keep is bounded; nobody writes to the store but us, and nobody's pages are touched but by their own process.
Must not know: how pages are merged.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import socket as sockets
import threading
import time
from typing import Any

import numpy as np

from pagefold.errors import CorruptionError, PagefoldError
from pagefold.live import control, domain, judge, messages, report, sd_notify
from pagefold.live.knobs import MAX_CPU_PERCENT, check
from pagefold.live.merging import STEP_PAGES, Merging
from pagefold.live.messages import BadMessage
from pagefold.live.mirror import warm_up
from pagefold.live.peer import Peer
from pagefold.live.tidying import Tidying
from pagefold.live.waits import Waits
from pagefold.sources.nodes import online_nodes

DEFAULTS: dict[str, int | str] = {
    "run": 1,
    "pages_to_scan": 16384,
    "sleep_millisecs": 20,
    "smart_scan": 0,
    "use_zero_pages": 1,
    "max_cpu_percent": 50,
}
_PACKETS = 64  # most packets of one client before the next one's turn, and most clients let in at once
_LONGEST_SLEEP = 3600.0  # seconds; epoll knows no more than some weeks
_IDLE_SECONDS = (0.02, 1.0)  # rest while nothing changes: doubles from the first to the second
_SAMPLE_SECONDS = 0.5  # between two looks at what is saved, and at what can be freed
_MOST_PEERS = 16384


class Daemon:
    """Serve one domain until stopped. `socket` is a listening one if it was passed to us, `device` an open /dev/userfaultfd or -1."""

    def __init__(
        self, name: str, *, knobs: dict[str, int | str], device: int = -1, socket: sockets.socket | None = None
    ) -> None:
        self.name = name
        self.device = device
        self.began = time.monotonic()
        wanted = {**DEFAULTS, **knobs}
        for knob, value in wanted.items():  # refused before anything is made
            check(knob, value)
        self.max_cpu_percent = check(MAX_CPU_PERCENT, wanted.pop(MAX_CPU_PERCENT))
        self.merging = Merging(max(online_nodes()) + 1, wanted)
        self._tidying = Tidying(self.merging)
        self._waits = Waits(self.merging)
        self.notes: dict[str, str] = {}
        self.history: list[tuple[float, int]] = []
        self.settled_at: float | None = None
        self.peers: dict[int, Peer] = {}  # by descriptor of its connection
        self._rest = _IDLE_SECONDS[0]
        self._next_work = 0.0
        self._not_before = 0.0  # by max_cpu_percent
        self._pages_left = 0  # of this wake-up's pages_to_scan
        self._next_sample = 0.0
        self._stopping = False
        self._warm = self._ready = False  # compiled, and begun
        self._failed: BaseException | None = None
        self._early: list[tuple[Peer, bytes]] = []  # what agents said before we were ready
        self._listening = socket or domain.listen(domain.socket_path(name))
        self._selector = selectors.DefaultSelector()

    # --- the loop ----------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Serve until a signal or the verb "stop"; leaves nothing behind but what clients map."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        waker, wake = sockets.socketpair()
        wake.setblocking(False)
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._listening.setblocking(False)
        self._selector.register(self._listening, selectors.EVENT_READ, None)
        self._selector.register(waker, selectors.EVENT_READ, waker)
        warming = threading.Thread(target=self._warm_up, args=(wake,), name="warm-up")
        warming.start()
        try:
            while not self._stopping:
                self._turn()
        finally:
            warming.join()
            sd_notify.notify("STOPPING=1")
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            for peer in list(self.peers.values()):
                self._drop(peer)
            self._selector.close()
            self._listening.close()
            waker.close()
            wake.close()
            self.merging.store.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard), hard))

    def _warm_up(self, wake: sockets.socket) -> None:
        """Compile what is not compiled yet, beside the loop; then wake it."""
        try:
            warm_up()
        except BaseException as error:
            self._failed = error
        self._warm = True
        wake.send(b"w")

    def _begin(self) -> None:
        """Begin to merge: everything is compiled. Agents that spoke meanwhile are heard now."""
        if self._failed is not None:
            raise self._failed
        self._ready = True
        sd_notify.notify("READY=1")
        for peer, packet in self._early:
            if self.peers.get(peer.connection.fileno()) is peer:
                self._selector.register(peer.connection, selectors.EVENT_READ, peer)
                self._hear(peer, packet)
        self._early.clear()

    def _on_signal(self, number: int, frame: object) -> None:
        self._stopping = True

    def _turn(self) -> None:
        """Handle what has arrived, then work if it is time."""
        pause = min(max(self._next_work - time.monotonic(), 0.0), _LONGEST_SLEEP)
        if not self._ready and not self._warm:
            pause = _LONGEST_SLEEP  # the other thread needs the processor; it wakes us
        for key, events in self._selector.select(pause):
            if key.data is None:
                self._accept()
            elif isinstance(key.data, Peer):
                if events & selectors.EVENT_WRITE:
                    key.data.flush()
                    self._watch(key.data)
                if events & selectors.EVENT_READ:
                    self._read(key.data)
            else:
                key.data.recv(4096)
        if self._warm and not self._ready:
            self._begin()
        if self._ready and time.monotonic() >= self._next_work:
            self._work()
        self._next_work = min(self._next_work, self._waits.answer())
        for peer in list(self.peers.values()):
            if peer.wants_to_send:
                self._watch(peer)

    def _work(self) -> None:
        """Do a piece of merging, and decide when the next one is due."""
        began, cpu = time.monotonic(), time.process_time()
        engine = self.merging.mirror.engine
        worked = False
        if engine.get("run") == 1:
            engine.now_ms = int((began - self.began) * 1000)
            engine.cpu_ms = int(cpu * 1000)
            worked = self._step(int(engine.get("pages_to_scan")))
        else:
            self.merging.find_broken()
        now, used = time.monotonic(), time.process_time() - cpu
        if worked:
            self._rest = _IDLE_SECONDS[0]
            pause = max(used * 100 / self.max_cpu_percent - (now - began), 0.0)
            self._not_before = now + pause
            if not self._pages_left and not self._waits.merging_wanted:
                pause = max(pause, int(engine.get("sleep_millisecs")) / 1000)
        else:
            pause = max(self._rest, used * 100 / self.max_cpu_percent - (now - began))
            self._rest = min(self._rest * 2, _IDLE_SECONDS[1])
        self._next_work = now + pause
        self._sample(now)

    def _step(self, pages: int) -> bool:
        """Do a step of those that make up a wake-up, which scans `pages`; what is only read does not count."""
        scanning = not self.merging.reading
        left = self._pages_left or pages
        worked = self.merging.step(left)
        self._pages_left = max(left - STEP_PAGES, 0) if scanning and worked else left
        return worked

    def _hurry(self) -> None:
        """Work soon: something has changed."""
        self._rest = _IDLE_SECONDS[0]
        self._next_work = max(min(self._next_work, time.monotonic() + self._rest), self._not_before)

    def _sample(self, now: float) -> None:
        """Remember what is saved, now and then, and when it settled."""
        settled = self.merging.settled
        if settled != (self.settled_at is not None):
            self.settled_at = now - self.began if settled else None
            self._next_sample = now
        if now < self._next_sample:
            return
        self._next_sample = now + _SAMPLE_SECONDS
        for peer in list(self.merging.peers.values()):
            if peer.ended():
                self._drop(peer)
        self._tidying.tidy()
        saved = report.saved_bytes(self.merging)
        if not self.history or self.history[-1][1] != saved:
            self.history.append((round(now - self.began, 3), saved))
            if len(self.history) > 1000:
                self.history = self.history[::2]

    # --- connections ----------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(_PACKETS):
            try:
                connection, _ = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self.notes["accept"] = f"a client could not connect: {error.strerror}"
                time.sleep(0.01)
                return
            peer = Peer(connection)
            if peer.uid not in (os.getuid(), 0) or len(self.peers) >= _MOST_PEERS:
                peer.close()
                continue
            self.peers[connection.fileno()] = peer
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def _watch(self, peer: Peer) -> None:
        """Watch a connection for what it needs; one that only asks questions is not heard before it took the answers."""
        if peer.connection.fileno() >= 0:
            write = selectors.EVENT_WRITE if peer.wants_to_send else 0
            read = selectors.EVENT_READ if peer.agent or not write else 0
            self._selector.modify(peer.connection, read | write, peer)

    def _drop(self, peer: Peer) -> None:
        """End a connection; the client's memory is its own."""
        if self.peers.pop(peer.connection.fileno(), None) is None:
            return
        with contextlib.suppress(KeyError):  # it waits in _early
            self._selector.unregister(peer.connection)
        self.merging.leave(peer)
        self._waits.leave(peer)
        peer.close()
        self._hurry()

    def _read(self, peer: Peer) -> None:
        for _ in range(_PACKETS):
            if peer.wants_to_send and not peer.agent:
                return
            packet = peer.receive()
            if packet is None:
                return
            if not packet:
                self._drop(peer)
                return
            if not self._hear(peer, packet):
                return

    def _hear(self, peer: Peer, packet: bytes) -> bool:
        """Do what a packet says; False if nothing more shall be read of this client now."""
        try:
            kind, said = messages.unpack(packet)
            if kind != messages.CONTROL and not self._ready:
                self._selector.unregister(peer.connection)
                self._early.append((peer, packet))
                return False
            self._handle(peer, kind, said)
        except (BadMessage, OSError, PagefoldError) as error:
            if not isinstance(error, FileNotFoundError | ProcessLookupError):  # it ended while it said hello
                self._note(peer, f"client {peer.pid} was dropped: {error}")
            self._drop(peer)
            return False
        return True

    def _note(self, peer: Peer, text: str) -> None:
        """Keep one note for each of the last clients."""
        self.notes.pop(f"client {peer.pid}", None)
        self.notes[f"client {peer.pid}"] = text
        if len(self.notes) > 32:
            del self.notes[next(iter(self.notes))]

    def _handle(self, peer: Peer, kind: int, said: Any) -> None:
        """Do what a packet says."""
        if kind == messages.CONTROL:
            self._control(peer, said)
            return
        if peer.uid != os.getuid():
            raise BadMessage(f"client {peer.pid} belongs to another user")
        if kind == messages.HELLO and not peer.agent:
            self._hello(peer, said)
        elif not peer.agent:
            raise BadMessage(f"client {peer.pid} did not say hello")
        elif kind == messages.ADVISE:
            if not self.merging.advise(peer, said):
                pages = int(said["pages"])
                self._note(peer, f"client {peer.pid}: {pages} pages are too much to look after; they are not merged")
        elif kind == messages.UNADVISE:
            self.merging.unadvise(peer, int(said["region"]))
        elif kind == messages.OUTCOME:
            self.merging.outcome(peer, said)
        elif kind == messages.SYNC:
            if self._waits.sync(peer, said):
                self._next_work = 0.0
        else:
            raise BadMessage(f"client {peer.pid} sent a message of type {kind}")
        if kind != messages.OUTCOME:
            self._hurry()

    def _hello(self, peer: Peer, said: np.void) -> None:
        peer.open_files()
        peer.agent = True
        peer.windows_safe = bool(said["windows_safe"])
        peer.why = bytes(said["why"]).split(b"\0")[0].decode(errors="replace")
        peer.max_mappings = int(said["max_map_count"]) or peer.max_mappings
        send_device = bool(said["want_device"]) and self.device >= 0
        self.merging.join(peer)
        packet = messages.pack(messages.WELCOME, has_device=int(send_device))
        peer.send(packet, [os.dup(self.device)] if send_device else [])

    # --- the command line ---------------------------------------------------------------------------------------------------------

    def _control(self, peer: Peer, body: bytes) -> None:
        try:
            request = control.parse_request(body)
            if request["verb"] == "settled":
                if self._waits.settled(peer, request):
                    self._hurry()
                return
            peer.say({"ok": True, **self._answer(request)})
        except PagefoldError as error:
            peer.say(control.failure(error))

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        verb = request["verb"]
        if verb == "set":
            return self._set(request)
        if verb == "stop":
            self._stopping = True
            return {"pid": os.getpid()}
        if verb == "history":
            looks, cpu = self.merging.looking.looks, round(time.process_time(), 6)
            return {"history": self.history, "looks": looks, "cpu_seconds": cpu, "passes": self.merging.passes}
        if verb == "validate":
            return self._validate()
        if verb == "clients":
            return {"clients": report.clients(self.merging)}
        return self._stat()

    def _stat(self) -> dict[str, Any]:
        full = [f"merging pauses: {self.merging.full}"] if self.merging.full else []
        return {
            "domain": self.name,
            "pid": os.getpid(),
            "uid": os.getuid(),
            "uptime_seconds": round(time.monotonic() - self.began, 3),
            "cpu_seconds": round(time.process_time(), 3),
            "knobs": self._knobs(),
            **report.stat(self.merging),
            "settled_seconds": None if self.settled_at is None else round(self.settled_at, 3),
            "notes": [*full, *self.notes.values()],
            "history": self.history,
        }

    def _knobs(self) -> dict[str, int | str]:
        return {**report.knobs(self.merging), MAX_CPU_PERCENT: self.max_cpu_percent}

    def _set(self, request: dict[str, Any]) -> dict[str, Any]:
        """Set knobs, all or none of a wrong name or value; a busy one leaves those before it set, and says so."""
        wanted = request.get("knobs")
        if not isinstance(wanted, dict) or not wanted:
            raise control.Refused("name at least one knob, as in `pagefold set pages_to_scan=1000`", 2)
        for knob, value in wanted.items():
            check(knob, value)
        for knob, value in wanted.items():
            if knob == MAX_CPU_PERCENT:
                self.max_cpu_percent = check(knob, value)
            else:
                self.merging.mirror.set(knob, value)
                self.merging.carry_out()  # run = 2 gives pages back
        self.merging.stir()
        self._next_work, self._pages_left = 0.0, 0
        return {"knobs": self._knobs()}

    def _validate(self) -> dict[str, Any]:
        """Let everything we own be judged, however long it takes."""
        try:
            return judge.validate(self.merging)
        except CorruptionError as error:
            raise control.Refused(str(error)) from None
