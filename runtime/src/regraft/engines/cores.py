"""The processor, and how many cores this process may use: in a container fewer than it has."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores within this process's affinity and its container's quota; at least 1.

    Two threads of one core share its arithmetic units, so matrix products gain nothing from the
    second one.
    """
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    physical = len({_siblings(cpu) for cpu in allowed})
    quota = _quota()
    return max(1, physical if quota is None else min(physical, math.ceil(quota)))


def _siblings(cpu: int) -> str:
    # The same text for all hardware threads of one core.
    try:
        return (_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> float | None:
    """Cores that cgroups grant (version 2, then 1); None without a limit."""
    try:
        limit, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (_CGROUP / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (_CGROUP / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    try:
        granted = int(limit) / int(period)
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return granted if granted > 0 else None


def processor() -> str:
    """The processor's name, as the system says it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
