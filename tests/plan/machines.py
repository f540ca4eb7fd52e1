"""Own the making of false machines: a sysfs folder with the KSM files wanted."""

from __future__ import annotations

from pathlib import Path

DEFAULTS = {
    "run": 1,
    "pages_to_scan": 100,
    "sleep_millisecs": 20,
    "merge_across_nodes": 1,
    "max_page_sharing": 256,
    "use_zero_pages": 1,
    "smart_scan": 0,
    "advisor_mode": "[none] scan-time",
    "advisor_target_scan_time": 200,
    "advisor_max_cpu": 70,
    "advisor_max_pages_to_scan": 30000,
    "full_scans": 9,
    "pages_scanned": 900,
    "pages_skipped": 0,
    "pages_shared": 0,
    "pages_sharing": 0,
    "general_profit": 0,
    "stable_node_chains": 0,
    "stable_node_dups": 0,
}


def machine(folder: Path, nodes: str = "0", huge: str = "always [madvise] never", **knobs: int | str | None) -> Path:
    """Make /sys of a machine where KSM runs well, but for the files given; None: this kernel has no such file."""
    ksm, node, thp = folder / "kernel/mm/ksm", folder / "devices/system/node", folder / "kernel/mm/transparent_hugepage"
    for path in (ksm, node, thp):
        path.mkdir(parents=True)
    for name, value in {**DEFAULTS, **knobs}.items():
        if value is not None:
            (ksm / name).write_text(f"{value}\n")
    (node / "online").write_text(f"{nodes}\n")
    (thp / "enabled").write_text(f"{huge}\n")
    return folder
