"""What a test leaves on the machine: processes and shared memory of this test run, and of nothing else that runs there.

Every process that descends from this one has a mark in its environment, whoever its parent is by then.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import psutil

_MARK = "MEGATRON_RL_TEST_RUN"
_SHARED = Path("/dev/shm")
_SERVANTS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""What multiprocessing starts once for a process, and keeps."""


def mark_this_run() -> None:
    """Let every process started from now on be known as one of ours."""
    os.environ[_MARK] = secrets.token_hex(8)
    os.environ["SPT_NOENV"] = "1"  # else a process that gives itself a title (Ray's and vLLM's do) overwrites the mark


def our_processes() -> set[int]:
    """Those that live."""
    return {process.pid for process in _others() if _is_ours(process) and not _is_servant(process)}


def shared_memory() -> set[Path]:
    """Of this user, what is not in the hands of a process that is not of this run."""
    found = {path for path in _SHARED.rglob("*") if _is_owned(path)}
    for process in psutil.process_iter():
        if found and process.pid != os.getpid() and not _is_ours(process):
            found -= _held(process)
    return found


def _others() -> Iterator[psutil.Process]:
    """All processes but this one and those that have ended."""
    for process in psutil.process_iter(["status"]):
        if process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE:
            yield process


def _is_ours(process: psutil.Process) -> bool:
    try:
        return bool(process.environ().get(_MARK) == os.environ[_MARK])
    except psutil.Error:  # gone, or another user's
        return False


def _is_servant(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
        return process.ppid() == os.getpid() and any(servant in line for servant in _SERVANTS)
    except psutil.Error:
        return True


def _is_owned(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid() and not path.is_dir()
    except FileNotFoundError:
        return False


def _held(process: psutil.Process) -> set[Path]:
    """Shared memory that it has open or mapped."""
    folder = Path(f"/proc/{process.pid}")
    try:
        lines = (folder / "maps").read_text().splitlines()
        mapped = {Path(line.split(maxsplit=5)[-1]) for line in lines if "/dev/shm" in line}
        return mapped | {link.readlink() for link in (folder / "fd").iterdir()}
    except OSError:  # gone, or another user's
        return set()
