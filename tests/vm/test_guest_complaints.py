"""Judge what counts as a kernel's complaint by specimens; a real panic and real healthy logs are judged where guests boot."""

from __future__ import annotations

import pytest

from kernelguest.complaints import complaints

# As the sources of Linux 6.12 print them.
SPECIMENS = [
    "BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "BUG: KASAN: slab-use-after-free in ksm_scan_thread+0x1a/0x40",
    "BUG: KFENCE: out-of-bounds read in test_out_of_bounds_read+0xa6/0x234",
    "BUG: sleeping function called from invalid context at kernel/locking/mutex.c:585",
    "BUG: Bad page state in process ksmd  pfn:0a2b3",
    "BUG: Bad rss-counter state mm:00000000 type:MM_ANONPAGES val:3",
    "kernel BUG at mm/ksm.c:1234!",
    "WARNING: CPU: 0 PID: 34 at mm/ksm.c:2345 stable_tree_append+0x1f/0x90",
    "WARNING: possible circular locking dependency detected",
    "Oops: general protection fault, probably for non-canonical address 0xdead000000000122: 0000 [#1] PREEMPT SMP NOPTI",
    "Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI",
    "general protection fault: 0000 [#1] SMP",
    "invalid opcode: 0000 [#1] SMP",
    "Kernel panic - not syncing: Fatal exception",
    "UBSAN: array-index-out-of-bounds in mm/ksm.c:100:12",
    "INFO: task ksmd:34 blocked for more than 120 seconds.",
    "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [ksmd:34]",
    "watchdog: Watchdog detected hard LOCKUP on cpu 0",
    "rcu: INFO: rcu_preempt self-detected stall on CPU",
    "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 0-... } 21 jiffies s: 17 root: 0x1/.",
    "INFO: rcu_tasks detected stalls on tasks:",
    "rcu: rcu_preempt kthread starved for 5250 jiffies! g17 f0x0 RCU_GP_WAIT_FQS(5) ->state=0x0 ->cpu=0",
    "Out of memory: Killed process 77 (python3.11) total-vm:31000kB, anon-rss:20000kB",
    "Memory cgroup out of memory: Killed process 77 (python3.11)",
    "list_add corruption. prev->next should be next (ffff), but was 0000. (prev=ffff).",
    "refcount_t: underflow; use-after-free.",
]
HARMLESS = [
    "[    1.039692] acpi PNP0A03:00: fail to add MMCONFIG information, can't access extended configuration space",
    "[    0.087000] clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable",
    "[    0.087000] rcu: Preemptible hierarchical RCU implementation.",
    "[    0.087000] NMI watchdog: Perf NMI watchdog permanently disabled",
    "[    3.221380] page dumped because: unmovable page",
    "[    3.100000] traps: python3.11[77] general protection fault ip:7f sp:7f error:0 in libc.so.6",
    "[    3.100000] python3.11[77]: segfault at 0 ip 7f sp 7f error 4 in libc.so.6",
    "WARNING: a program's own words on stderr",
    "BUG: likewise",
]


@pytest.mark.parametrize("text", SPECIMENS)
def test_a_complaint_is_found_with_and_without_its_caller_and_after_half_a_line(text: str) -> None:
    for before in (
        "[    3.123456] ",
        "[   12.000001][    T1] ",
        "[12345.678901][   C0] ",
        "half a line of stderr [    3.123456] ",
    ):
        assert complaints(f"all is well\r\n{before}{text}\r\nall is well\r\n") == [text]


@pytest.mark.parametrize("line", HARMLESS)
def test_other_lines_are_none(line: str) -> None:
    assert complaints(line) == []
