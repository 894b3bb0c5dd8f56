"""How many worker processes, and how many children at a time, suit this machine."""

from __future__ import annotations

import math
import os
from pathlib import Path

_JAX_SHARE = 0.15  # of the cores is left to JAX's host threads, at least _JAX_CORES
_JAX_CORES = 2
_MEMORY_SHARE = 0.5  # of the machine's memory that all children together could take


def usable_cores() -> int:
    """Cores this process may use: CPU affinity, capped by the cgroup's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return affinity if quota is None else max(1, min(affinity, math.floor(quota)))


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of CPU time that the cgroups of this process allow (v2 `cpu.max`, v1 `cpu.cfs_quota_us`)."""
    quotas = []
    for line in _read(process).splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        base = cgroups if number == "0" else cgroups / "cpu"
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            limit, _, period = _read(group / "cpu.max").partition(" ")
            if not limit:
                limit, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
            if limit.isdecimal() and period.isdecimal():  # no limit is "max" in v2 and -1 in v1
                quotas.append(int(limit) / int(period))
            if group == base:
                break
    return min(quotas, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def default_workers(beside_jax: bool = True) -> int:
    """Workers for `executor.workers: 0`: the usable cores less those JAX needs, at least one."""
    cores = usable_cores()
    return max(1, cores - max(_JAX_CORES, math.ceil(_JAX_SHARE * cores))) if beside_jax else cores


def max_children(workers: int, memory_mb: int) -> int:
    """Children alive at once, slow ones included, so that their limits together stay within a share of memory."""
    try:
        total_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (ValueError, OSError):
        total_mb = 8192.0
    return max(2 * workers, min(8 * workers + 24, int(_MEMORY_SHARE * total_mb / memory_mb)))
