"""Own the guest's world: the daemon, those whose pages it merges, and what must be true of what the kernel says of every page."""

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict

from inhabitant import Neighbour

DOMAIN = "guest"
PATIENCE = 300.0  # seconds for anything that the daemon is to do
DAEMON = """
import sys
from pagefold.live.daemon import Daemon
Daemon(sys.argv[1], knobs={"merge_across_nodes": 0, "use_zero_pages": 0, "max_cpu_percent": 100}).serve()
"""


class World:
    """The daemon and those who are merged."""

    def __init__(self):
        from pagefold.live import domain

        self.path = domain.socket_path(DOMAIN)
        os.environ["PAGEFOLD_SOCKET"] = str(self.path)
        # Worlds are small here, and to compile the engine in a guest takes minutes.
        environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
        self.daemon = subprocess.Popen([sys.executable, "-c", DAEMON, DOMAIN], env=environment)
        self.neighbours = []
        self.wait(self.answers, "no daemon")

    def answers(self):
        """Tell whether the daemon answers; AssertionError if it ended."""
        from pagefold.errors import PagefoldError

        assert self.daemon.poll() is None, f"the daemon ended with {self.daemon.returncode}"
        with contextlib.suppress(PagefoldError):
            return bool(self.ask("stat"))
        return False

    def wait(self, condition, otherwise):
        """Wait until something is so."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, otherwise
            time.sleep(0.02)

    def ask(self, verb, **fields):
        """Ask the daemon."""
        from pagefold.live import control

        return control.ask(self.path, {"verb": verb, **fields}, PATIENCE)

    def set(self, **knobs):
        """Set knobs."""
        self.ask("set", knobs=knobs)

    def refused(self, **knobs):
        """Return the errno with which knobs are refused; AssertionError if they are not."""
        from pagefold.live.control import Refused

        try:
            self.set(**knobs)
        except Refused as error:
            return error.errno
        raise AssertionError(f"{knobs} was not refused")

    def all_are_known(self):
        """Tell whether the daemon has heard of everything that was advised: agents say so by themselves."""
        known = {row["pid"]: row["regions"] for row in self.ask("clients")["clients"]}
        return all(known.get(one.pid, 0) == one.regions for one in self.neighbours)

    def settle(self):
        """Wait until nothing more can merge."""
        self.wait(self.all_are_known, "the daemon does not hear of what is advised")
        answer = self.ask("settled", timeout=PATIENCE)
        assert answer["settled"], f"not settled in {PATIENCE:g} s: {self.ask('stat')}"

    def nothing_is_under_way(self):
        """Tell whether all that the engine merged is merged: no window is asked for and not answered."""
        counters = self.counters()
        return counters["pages_shared"] + counters["pages_sharing"] == sum(map(len, merged(self.look()).values()))

    def counters(self):
        """Return the merger's counters."""
        return self.ask("stat")["counters"]

    def spawn(self, node, contents):
        """Start a process with pages of these contents, all on one node, and advised."""
        one = Neighbour(node, contents)
        self.neighbours.append(one)
        one.advise()
        return one

    def afresh(self, **knobs):
        """End everybody, and begin again with these knobs."""
        for one in self.neighbours:
            one.close()
        self.neighbours = []
        self.wait(lambda: not self.ask("clients")["clients"], "clients that are gone stay")
        self.set(run=2)
        self.set(**knobs, run=1)

    def look(self):
        """Return by (process, page) what the kernel says of each page: frame, node, and whether it is the store's. Checks every byte."""
        return {(one, index): tuple(row) for one in self.neighbours for index, row in enumerate(one.ask("look"))}

    def verify(self):
        """Check every byte of everybody, and let the daemon judge what it keeps."""
        for one in self.neighbours:
            one.ask("verify")
        self.ask("validate")


def merged(view):
    """Return the pages of a view that map the store, by frame."""
    groups = defaultdict(list)
    for page, (frame, _, is_store) in view.items():
        if is_store:
            groups[frame].append(page)
    return dict(groups)


def check_no_page_joined_another_node(before, after):
    """Whatever merged between two looks, did so on the node where it was; and equal pages alone."""
    for page, (frame, node, is_store) in after.items():
        one, index = page
        if page in before and is_store and frame != before[page][0]:
            was = before[page][1]
            assert node == was, (
                f"page {index} ({one.held[index]}) of {one.pid} was on node {was} and merged onto node {node}"
            )
    for frame, pages in merged(after).items():
        contents = {one.held[index] for one, index in pages}
        assert len(contents) == 1, f"frame {frame:#x} is shared by pages of {contents}"


def check_all_merged_that_can(view):
    """On each node the equal pages that were never merged elsewhere share one frame, and lonely ones none."""
    sharers = defaultdict(list)
    for (one, index), (frame, node, is_store) in view.items():
        sharers[one.held[index], node].append((frame, is_store))
    for (content, node), rows in sharers.items():
        frames = {frame for frame, _ in rows}
        assert len(frames) == 1, f"content {content} has {len(frames)} frames on node {node}: {rows}"
        assert all(is_store == (len(rows) > 1) for _, is_store in rows), f"content {content} on node {node}: {rows}"


def check_what_is_told(world, view):
    """What the daemon says of nodes and of who shares what is what the kernel says."""
    told = world.ask("stat")
    present, shared = defaultdict(Counter), Counter()
    for (one, _), (_, node, _) in view.items():
        present[one.pid][str(node)] += 1
    for pages in merged(view).values():
        shared[view[pages[0]][1], tuple(sorted({one.pid for one, _ in pages}))] += 1
    by_client = {row["pid"]: row["node_pages"] for row in told["clients"]}
    assert by_client == present, f"pages of clients by node: told are {by_client}, there are {dict(present)}"
    groups = {(row["node"], tuple(sorted(row["pids"]))): row["pages"] for row in told["groups"]}
    assert groups == shared, f"groups of sharers: told are {groups}, there are {dict(shared)}"
