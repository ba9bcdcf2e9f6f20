"""What the planner says of an update beside what it takes: ``benchmarks/planner.py`` as a check."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_checks.case import Case, at_most
from benchmarks.gpu_checks.plan import Row
from benchmarks.planner import MEMORY_BOUND, compared, settings_for, time_bound

_NAMES = {"h100": r"\bH100\b", "h200": r"\bH200\b", "a100-80g": r"\bA100\b.*\b80GB\b"}
"""By key of the planner's table, in what CUDA calls a device."""


def planner_device(name: str) -> str | None:
    """Of the planner's table; None: it has no such device."""
    return next((key for key, pattern in _NAMES.items() if re.search(pattern, name)), None)


def plans(case: Case) -> Iterator[Row]:
    """Memory and seconds of updates, predicted and measured; the first setting calibrates."""
    device, settings, rounds = "cpu", settings_for("cpu", 0)[:2], 1
    if not case.small:
        name = torch.cuda.get_device_name(0)
        known = planner_device(name)
        if known is None:
            yield Row(what=f"left out: the planner has no {name}; GPUs that it knows", value=len(_NAMES), unit="")
            return
        device, settings, rounds = known, settings_for(known, case.asked_gpus), 5
    for one in compared(device, settings, case.scratch / "plans", rounds):
        label, goal = one.setting.name, not case.small and one.setting is not settings[0]
        amounts = (
            ("GiB of a rank", one.said.held / 2**30, one.found.held / 2**30, one.memory_error, MEMORY_BOUND),
            ("seconds", one.said.seconds, one.found.seconds, one.time_error, time_bound(device)),
        )
        for what, said, found, error, bound in amounts:
            goals: dict[str, Any] = at_most(bound, abs(error)) if goal else {}
            yield Row(what=f"{label}: {what}, predicted", value=said, unit="")
            yield Row(what=f"{label}: {what}, measured", value=found, unit="")
            yield Row(what=f"{label}: {what}, relative error", value=abs(error), unit="", **goals)
