"""Whether Ray's sockets have a name short enough for the kernel. Loads no Ray: it is asked where none is installed."""

from __future__ import annotations

import os

_LONGEST = 107
_BELOW = "/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"
"""The longest that there is in a temporary folder, with the kernel's largest pid; tests hold both against Ray."""


def temporary_folder() -> str:
    """Where a Ray that starts here puts its files, as Ray chooses it."""
    return os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))


def long_folder(folder: str) -> tuple[str, str] | None:
    """What must hold and what is there, and what to change; None: Ray's sockets fit into ``folder``."""
    room, found = _LONGEST - len(_BELOW), len(os.fsencode(folder))
    if found <= room:
        return None
    return (
        f"Ray's sockets lie below RAY_TMPDIR, or else TMPDIR, which must have at most {room} bytes, found {folder} of "
        f"{found}",
        "export RAY_TMPDIR=/tmp, or another short folder with room for Ray's files",
    )
