"""CPU quota of the container: how many cores this process may use.

A container with ``--cpus 8`` on a machine with 64 cores still sees all 64. torch would start 64 threads, which the
kernel then throttles for most of every 100 ms period. Reads the files of Linux control groups (version 2: ``cpu.max``,
version 1: ``cpu.cfs_quota_us``; Documentation/admin-guide/cgroup-v2.rst and Documentation/scheduler/sched-bwc.rst of
the kernel). Of nested groups only the innermost visible one is read, which in a container is its own.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["available_cores"]


def available_cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of cores that affinity and quota allow this process to use, at least 1.

    Args:
        root: mount point of the control groups.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(root)
    return available if quota is None else max(1, min(available, math.ceil(quota)))


def _quota(root: Path) -> float | None:
    """Return the quota of the control group in cores; None without a quota, or if it cannot be read."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    try:
        return int(limit) / int(period) if int(limit) > 0 and int(period) > 0 else None
    except ValueError:  # "max"
        return None
