"""What decides the samples and verdicts in a folder: its identity.json, and whether two folders compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

IDENTITY_FILE = "identity.json"
_OF_THE_MODEL = {"model", "source"}

Identity = Mapping[str, Any]
"""``settings`` by name, and under ``tasks`` the SHA-256 of each task's data."""


def read_identity(folder: Path) -> Identity | None:
    """What the evaluation in ``folder`` left, None where there is nothing."""
    file = folder / IDENTITY_FILE
    found: Identity | None = json.loads(file.read_text()) if file.is_file() else None
    return found


def protocol_differences(one: Identity, other: Identity, tasks: Iterable[str]) -> list[str]:
    """In what two evaluations differ besides their models; where in nothing, their numbers compare.

    Args:
        one: an evaluation.
        other: the other one.
        tasks: those that are compared.
    """
    before, after = one["settings"], other["settings"]
    names = [name for name in dict.fromkeys([*before, *after]) if name not in _OF_THE_MODEL]
    differing = [name for name in names if before.get(name) != after.get(name)]
    return differing + [f"data of {task}" for task in tasks if one["tasks"].get(task) != other["tasks"].get(task)]
