"""Processes that end with the one that started them, or with one that they started."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import connection

_PR_SET_PDEATHSIG = 1
_LAST_SECONDS = 2.0
"""What a process may take to end after its pipe has closed."""
_INTERRUPTED_SECONDS = 60.0
"""What a command may take to end after an interrupt."""


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent goes (Linux), and leave at once if it is gone already.

    The kernel takes the thread that started this process for the parent: that thread must live as long as it.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def run_command(command: Sequence[str]) -> int:
    """Run a command until it ends, and give its status. It is killed where this process is; it gets a SIGTERM that this
    process gets, and has time to end after an interrupt, which a terminal gives to both. For the main thread.

    Raises:
        KeyboardInterrupt: as interrupted; the command has ended.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if child is None:  # it is being started
            early.append(number)
        else:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        child = subprocess.Popen(command, preexec_fn=partial(die_with_parent, os.getpid()))
        for number in early:
            child.send_signal(number)
        return child.wait()
    except KeyboardInterrupt:
        if child is not None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_INTERRUPTED_SECONDS)
        raise
    finally:
        if child is not None:
            child.kill()
            child.wait()
        signal.signal(signal.SIGTERM, before)


def die_with_child(pids: Sequence[int], name: str, *, unless: Callable[[], bool]) -> None:
    """From now on, leave at once when one of these processes ends, having said on standard error which and how. The
    others are killed first: what they print when they miss it would bury that.

    Args:
        pids: of processes that ``multiprocessing`` started here and nobody waited for.
        name: of them; the place in ``pids`` is added as a rank.
        unless: asked at the first end: whether it was meant to be, in which case nothing happens.

    Raises:
        KeyError: a pid is of no such process.
    """
    children = {child.pid: child for child in multiprocessing.active_children()}
    watched = [children[pid] for pid in pids]

    def watch() -> None:
        gone = connection.wait([child.sentinel for child in watched])
        if unless():
            return
        rank, child = next((rank, child) for rank, child in enumerate(watched) if child.sentinel in gone)
        for other in watched:
            if other.sentinel not in gone:
                other.kill()
        end = time.monotonic() + _LAST_SECONDS
        while any(each.exitcode is None for each in watched) and time.monotonic() < end:
            time.sleep(0.01)
        # On a line of its own: one that was killed as it wrote may have left half a line.
        sys.stderr.write(f"\n{name} rank {rank} (pid {child.pid}) {ended(child.exitcode)}\n")
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=watch, name=f"watch {name}", daemon=True).start()


def ended(exit_code: int | None) -> str:
    """How a process ended; None: it has only closed its pipe."""
    if exit_code is None:
        return "has closed its pipe and goes on"
    if exit_code < 0:
        return f"was killed by signal {-exit_code} ({signal.Signals(-exit_code).name})"
    return f"exited with code {exit_code}"
