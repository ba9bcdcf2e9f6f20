"""How many cores a process may compute on, which is not how many its node has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores that this process may run on, no more than the CPUs that a container's quota lets it use at once."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas()])))


def _quotas() -> Iterator[float]:
    """In CPUs: those of the control groups that this process is in, and of the groups around them.

    Source: the Linux kernel's admin-guide, cgroup-v2 (``cpu.max``) and cgroup-v1 (``cpu.cfs_quota_us``).
    """
    for line in _OWN_GROUPS.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = _GROUPS / "cpu" if controllers else _GROUPS
        own = top / name.lstrip("/")  # not there where a container sees its own group as the top
        for group in (own, *own.parents):
            with suppress(OSError):
                if controllers:
                    quota, period = ((group / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
                else:
                    quota, period = (group / "cpu.max").read_text().split()
                if quota.strip() not in ("max", "-1"):
                    yield int(quota) / int(period)
            if group == top:
                break
