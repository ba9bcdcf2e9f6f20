"""What ends a local Ray whose driver was killed.

Its workers end with their parents, and Ray's own servers with the driver; but two of Ray's agents look for their
cluster for a minute before they give up. The guardian is a small process beside the driver: it waits on a pipe that
closes when the driver is gone, however that came, and then kills what is left. It knows a process of the cluster by a
mark in the environment that everything started after it inherits. This file is also its program, so it imports the
standard library alone.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MARK = "MEGATRON_RL_CLUSTER"
_GRACE_S = 0.5
_PERSISTENCE_S = 10.0


class Guardian:
    """Watches over this process from now on; make it before Ray is started."""

    def __init__(self) -> None:
        mark = secrets.token_hex(8)
        os.environ[_MARK] = mark
        # else a process that gives itself a title, as Ray's do, overwrites its environment
        os.environ["SPT_NOENV"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, mark, str(os.getpid())],
            stdin=subprocess.PIPE,
            env={},  # without the mark
            start_new_session=True,  # a terminal's Ctrl-C is for the driver
        )

    def dismiss(self) -> None:
        """Everything has ended: let the guardian end too. Safe to call again."""
        os.environ.pop(_MARK, None)
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.write(b"all is over")
                self._process.stdin.close()
        self._process.wait()


def _marked(mark: bytes) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        with suppress(OSError):  # gone, or another user's
            if folder.name.isdigit() and mark in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def _guard(mark: str, driver: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read(1):
        return
    time.sleep(_GRACE_S)  # for those that end by themselves
    end, killed = time.monotonic() + _PERSISTENCE_S, set[int]()
    while (left := list(_marked(f"{_MARK}={mark}".encode()))) and time.monotonic() < end:
        killed.update(left)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    if select.select([], [2], [], 1.0)[1]:  # nobody may be reading any more
        with suppress(OSError):
            os.write(
                2,
                f"megatron-rl: the driver (pid {driver} on {socket.gethostname()}) is gone and has not ended its run: "
                f"it was killed, or Ray ended it; {len(killed)} processes that were left are killed\n".encode(),
            )


if __name__ == "__main__":
    _guard(*sys.argv[1:])
