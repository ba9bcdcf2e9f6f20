"""How long something may take, for waits that say so when it is over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """How many seconds something may take, and the setting that says so."""

    seconds: float
    setting: str

    def __str__(self) -> str:
        """For messages that say what to change."""
        return f"{self.seconds:g} s ({self.setting}, to be raised if it may take longer)"
