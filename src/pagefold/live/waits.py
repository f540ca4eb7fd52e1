"""Own who waits for the daemon: agents for a region to be merged (SYNC), others for the end of all merging ("settled").

Must not know: when the daemon works, and what it does then.
"""

from __future__ import annotations

import errno
import math
import time
from typing import Any

import numpy as np

from pagefold.errors import EngineStopped
from pagefold.live import control, messages, report
from pagefold.live.merging import Merging
from pagefold.live.messages import BadMessage
from pagefold.live.peer import Peer
from pagefold.live.region import Region

_MOST = 64  # of one connection at a time, for merging or for its end
_LONGEST = 1e6  # seconds that anybody waits for the end of merging
_SYNC_PASSES = 3  # one to learn a page, one to enter a tree, one to meet an equal there


class Waits:
    """All who wait in one domain: call `answer` whenever something may have changed."""

    def __init__(self, merging: Merging) -> None:
        self._merging = merging
        self._settled: list[tuple[Peer, float, int]] = []  # until when, looks before
        self._syncs: list[tuple[Peer, int, Region, int]] = []  # peer, token, region, passes when it may be answered

    @property
    def merging_wanted(self) -> bool:
        """Tell whether an agent waits for a region."""
        return bool(self._syncs)

    def leave(self, peer: Peer) -> None:
        """Forget a connection."""
        self._settled = [one for one in self._settled if one[0] is not peer]
        self._syncs = [one for one in self._syncs if one[0] is not peer]

    def sync(self, peer: Peer, said: np.void) -> bool:
        """Let an agent wait for a region; False if it was answered at once. Raises BadMessage."""
        region = peer.regions.get(int(said["region"]))
        token = int(said["token"])
        if int(said["region"]) in peer.ignored:
            peer.send(messages.pack(messages.SYNCED, token=token, error=-errno.ENOMEM))
            return False
        if region is None or sum(one[0] is peer for one in self._syncs) >= _MOST:
            raise BadMessage(f"client {peer.pid} wants region {int(said['region'])} merged, which it did not advise")
        if self._run != 1:
            peer.send(messages.pack(messages.SYNCED, token=token, error=-errno.EAGAIN))
            return False
        self._merging.sync(peer, region)
        if not region.quiet:  # what was merged in the background before is not of this call
            region.told = report.merged_and_saved(self._merging, peer, region)
        self._syncs.append((peer, token, region, self._merging.passes + _SYNC_PASSES + 1))
        return True

    def settled(self, peer: Peer, request: dict[str, Any]) -> bool:
        """Let somebody wait for the end of merging; False if he was answered at once. Raises EngineStopped, Refused."""
        if self._run != 1:
            raise EngineStopped(f"run is {self._run}: nothing is merged; use `pagefold set run=1`")
        seconds = request.get("timeout")
        if not isinstance(seconds, int | float) or not 0 <= seconds < _LONGEST:  # NaN is not either
            seconds = _LONGEST
        if sum(one[0] is peer for one in self._settled) >= _MOST:
            raise control.Refused(f"one connection waits {_MOST} times already; wait for an answer first", 2)
        if not seconds:  # nobody waits for another look
            peer.say({"ok": True, "settled": self._merging.settled})
            return False
        self._settled.append((peer, time.monotonic() + seconds, self._merging.looking.looks))
        return True

    def answer(self) -> float:
        """Answer those whose wait is over; return when the next one's patience ends."""
        self._answer_syncs()
        return self._answer_settled() if self._settled else math.inf

    def _answer_syncs(self) -> None:
        merging = self._merging
        stopped = self._run != 1
        for entry in list(self._syncs):
            peer, token, region, passes = entry
            busy = peer.pending or merging.reading
            if not stopped and (busy or (merging.passes < passes and not merging.idle)):
                continue
            self._syncs.remove(entry)
            if not any(other[2] is region for other in self._syncs):
                merging.syncing.discard(region)
            if peer.regions.get(region.number) is not region:
                answer = {"error": -errno.ENOENT}  # it was let go in the meantime
            else:
                answer = {"error": -errno.EAGAIN} if stopped else report.region_report(merging, peer, region)
            peer.send(messages.pack(messages.SYNCED, token=token, **answer))

    def _answer_settled(self) -> float:
        now, earliest = time.monotonic(), math.inf
        stopped = self._run != 1
        for wait in list(self._settled):
            peer, until, looks = wait
            settled = self._merging.settled_since(looks) and not stopped
            if settled or now >= until or stopped:
                self._settled.remove(wait)
                peer.say({"ok": True, "settled": settled})
            else:
                earliest = min(earliest, until)
        return earliest

    @property
    def _run(self) -> int | str:
        return self._merging.mirror.engine.get("run")
