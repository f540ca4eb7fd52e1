"""Own the judgement of a machine's KSM: what keeps pages from merging, makes it slow, or costs, with a remedy each.

Must not know: where the state was read, how findings are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from pagefold.plan.machine_state import KSM, MachineState

FOLDER = f"/sys/{KSM}"
WISHED_PASS = 60.0  # seconds that one pass over the advised pages may take before it is called slow
MERGING_PASSES = 2  # a page needs two: one to learn its checksum, one to find its equal
# Opts a program in from outside: the flag survives exec (Linux 6.9), and everything the program forks has it too. Needs CAP_SYS_RESOURCE.
OPT_IN = (
    "python3 -c \"import ctypes, os, sys; ctypes.CDLL(None).prctl(67, 1, 0, 0, 0) and sys.exit('refused: run as root');"
    ' os.execvp(sys.argv[1], sys.argv[1:])" COMMAND'
)


class Severity(IntEnum):
    """How much a finding matters; the worst first."""

    STOPS = 0  # nothing merges at all
    LOSES = 1  # some pages never merge
    SLOWS = 2  # merging takes (much) longer than it could
    COSTS = 3  # merging has a price that another setting would not have
    NOTE = 4  # good to know


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about this machine: what it is, why it matters (in numbers), and a command that changes it."""

    name: str  # stable, for programs
    severity: Severity
    words: str
    why: str
    remedy: str = ""  # a command; '' where there is nothing to do


def diagnose(state: MachineState, pages: int | None = None) -> tuple[Finding, ...]:
    """Return what there is to say, the gravest first.

    `pages` is how many pages a pass is to be reckoned for; by default those that `state` counts as advised.
    """
    if not state.built:
        return (
            Finding(
                "not_built",
                Severity.STOPS,
                "this kernel has no KSM",
                f"{FOLDER} is missing: the kernel was built without CONFIG_KSM, and merges nothing",
                "pagefold run -- COMMAND",
            ),
        )
    if pages is None and state.advised is not None:
        pages = state.advised.pages
    found = [*_run(state), *_pace(state, pages), *_losses(state), *_prices(state), *_notes(state)]
    return tuple(sorted(found, key=lambda finding: finding.severity))


def write(knob: str, value: object) -> str:
    """Return the command that writes a knob."""
    return f"echo {value} > {FOLDER}/{knob}"


def rewrite(knob: str, value: object) -> str:
    """Return the command for a knob that can only change while nothing is merged."""
    return f"{write('run', 2)} && {write(knob, value)} && {write('run', 1)}"


def _run(state: MachineState) -> Iterator[Finding]:
    run, kept = state.get("run"), state.get("pages_sharing")
    if run & 4:
        yield Finding(
            "offlining", Severity.STOPS, "memory is going offline", f"run is {run}: ksmd rests until that is done"
        )
    elif run == 2:
        why = "everything that was merged was taken apart, and ksmd sleeps"
        yield Finding("run_2", Severity.STOPS, "KSM was told to unmerge (run is 2)", why, write("run", 1))
    elif run == 0:
        why = f"ksmd looks at no page; {kept:,} pages that merged earlier stay merged"
        yield Finding("run_0", Severity.STOPS, "KSM does not run (run is 0)", why, write("run", 1))
    elif not state.get("full_scans"):
        why = f"a page merges in the second pass at the earliest; {state.get('pages_scanned'):,} looks so far: the counters say little"
        yield Finding("no_full_scan", Severity.NOTE, "ksmd has not finished its first pass", why)
    advised = state.advised
    if advised is not None and not advised.processes:
        why = f"of {advised.looked_at:,} processes that can be read, none has memory that is advised MERGEABLE: ksmd has nothing to look at"
        yield Finding("nothing_advised", Severity.STOPS, "no process asks for merging", why, OPT_IN)


def _pace(state: MachineState, pages: int | None) -> Iterator[Finding]:
    batch, rest = state.get("pages_to_scan", 100), state.get("sleep_millisecs", 20)
    tuned = state.advisor == "scan-time"
    if tuned:
        target = state.get("advisor_target_scan_time", 200)
        most = state.get("advisor_max_pages_to_scan", 30000)
        why = f"it aims at a pass of {target:,} s, with at most {most:,} pages a batch and {state.get('advisor_max_cpu', 70)} % of a CPU"
        remedy = write("advisor_target_scan_time", int(WISHED_PASS)) if target > WISHED_PASS else ""
        severity = Severity.SLOWS if remedy else Severity.NOTE
        yield Finding("advisor_on", severity, f"the advisor rules pages_to_scan ({batch:,} now)", why, remedy)
    elif not batch:
        yield Finding(
            "batch_0",
            Severity.STOPS,
            "pages_to_scan is 0",
            "ksmd wakes, and looks at nothing",
            write("pages_to_scan", 1000),
        )
        return
    if not rest:
        words = "ksmd never rests (sleep_millisecs is 0)"
        yield Finding(
            "no_rest",
            Severity.COSTS,
            words,
            "it takes a whole CPU for as long as it runs",
            write("sleep_millisecs", 20),
        )
    elif pages and (seconds := pass_seconds(state, pages)) > WISHED_PASS:
        enough = -(-pages * rest // int(WISHED_PASS * 1000))
        why = (
            f"{batch:,} pages, then a rest of {rest:,} ms: at most {batch * 1000 / rest:,.0f} pages/s, "
            f"and no page merges before its second pass: {_time(MERGING_PASSES * seconds)}"
        )
        remedy = "" if tuned else write("pages_to_scan", enough)
        yield Finding(
            "slow_scan", Severity.SLOWS, f"one pass over {pages:,} pages takes {_time(seconds)} or more", why, remedy
        )
        if state.advisor == "none":
            why = f"pages_to_scan stays at {batch:,} however much memory is advised"
            yield Finding("advisor_off", Severity.NOTE, "the advisor is off", why, write("advisor_mode", "scan-time"))
    if state.get("smart_scan"):
        looks, skipped = state.get("pages_scanned"), state.get("pages_skipped")
        share = f"; since boot {100 * skipped / (looks + skipped):.0f} % of all looks were skipped" if skipped else ""
        why = (
            "a page that found no equal in its first looks is passed over in 1, later 2, 4, 8 passes between two looks, "
            f"and merges that much later{share}"
        )
        yield Finding("smart_scan", Severity.SLOWS, "smart scan skips pages", why, write("smart_scan", 0))


def pass_seconds(state: MachineState, pages: int) -> float:
    """Return the least time of one pass over so many pages: ksmd's rests alone, not its work."""
    return pages / max(state.get("pages_to_scan", 100), 1) * state.get("sleep_millisecs", 20) / 1000


def _losses(state: MachineState) -> Iterator[Finding]:
    limit, chains, dups = (state.get(name) for name in ("max_page_sharing", "stable_node_chains", "stable_node_dups"))
    if chains:
        kept = (dups - chains) * state.page_size // 1024
        why = f"{chains:,} contents have {dups:,} copies: {kept:,} KiB more than one each"
        yield Finding(
            "chains",
            Severity.LOSES,
            f"one copy serves {limit:,} pages at most",
            why,
            rewrite("max_page_sharing", min(limit * 16, 2**31 - 1)),
        )
    elif limit:
        why = f"of {limit * 100:,} equal pages 100 copies stay; no content is held that often now"
        yield Finding("max_page_sharing", Severity.NOTE, f"one copy serves {limit:,} pages at most", why)
    if len(state.nodes) > 1 and state.get("merge_across_nodes", 1) == 0:
        why = f"each of the {len(state.nodes)} NUMA nodes keeps a copy of its own, and all reads are local"
        yield Finding(
            "nodes_apart",
            Severity.LOSES,
            "equal pages of different nodes stay apart",
            why,
            rewrite("merge_across_nodes", 1),
        )


def _prices(state: MachineState) -> Iterator[Finding]:
    if len(state.nodes) > 1 and state.get("merge_across_nodes", 1) == 1:
        why = f"{len(state.nodes)} NUMA nodes share one copy of each content: who is not on its node reads it from afar"
        yield Finding(
            "nodes_together",
            Severity.COSTS,
            "equal pages of different nodes merge",
            why,
            rewrite("merge_across_nodes", 0),
        )
    if (profit := state.get("general_profit")) < 0:
        why = f"the kernel keeps 64 bytes for each page it looks at: {-profit:,} bytes more than merging frees"
        yield Finding("no_profit", Severity.COSTS, "merging costs more than it saves now", why, write("run", 2))
    if state.huge == "always":
        why = "merging one page of a huge page splits all of it; the processes then miss the TLB more often"
        remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding("huge_pages", Severity.COSTS, "transparent huge pages are on everywhere", why, remedy)


def _notes(state: MachineState) -> Iterator[Finding]:
    if state.get("use_zero_pages", 1) == 0:
        why = f"pages of zeroes merge like others: a copy for {state.get('max_page_sharing', 256):,} of them, and 64 bytes each"
        yield Finding("zero_pages", Severity.NOTE, "use_zero_pages is 0", why, write("use_zero_pages", 1))
    if sharing := state.get("pages_sharing"):
        why = f"{sharing:,} mappings more than the {state.get('pages_shared'):,} copies need; profit {state.get('general_profit'):,} bytes"
        yield Finding("merged", Severity.NOTE, "pages are merged now", why)


def _time(seconds: float) -> str:
    """Return a time for people."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} s"
