"""What every check is given, and how it says what a figure should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Case:
    """``gpus`` on this machine (0: the small form on a CPU), ``asked_gpus`` to use, and a folder for files that all
    checks of a command share.
    """

    gpus: int
    asked_gpus: int
    scratch: Path

    @property
    def small(self) -> bool:
        return not self.gpus


def at_most(bound: float, value: float) -> dict[str, Any]:
    """Goal of a row."""
    return {"goal": f"at most {bound:.3g}", "met": value <= bound}


def at_least(bound: float, value: float) -> dict[str, Any]:
    """Goal of a row."""
    return {"goal": f"at least {bound:.3g}", "met": value >= bound}


def between(low: float, high: float, value: float) -> dict[str, Any]:
    """Goal of a row."""
    return {"goal": f"{low:.3g} to {high:.3g}", "met": low <= value <= high}
