"""The process that does the work of one rank or engine: builds an object from a factory and calls its methods.

It is a child of a :class:`~megatron_rl.ray_runtime.supervisor.Supervisor` and talks to it over a socket pair, so that
the supervisor learns from the kernel how it ended. This module imports neither ray nor torch: the factory that arrives
decides what is loaded.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from megatron_rl.lifetime import die_with_parent

_OPEN_FILES = 65536


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of one call.

    Attributes:
        value: the pickled result; empty where the call raised.
        error: type, message and traceback of what it raised; empty where it did not.
        place: pid and host of the process, for messages.
        busy_s: wall time in the method.
        peak_rss_bytes: largest resident set of the process so far.
    """

    value: bytes = b""
    error: str = ""
    place: str
    busy_s: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call as it travels: ``payload`` is a pickle of ``(method, args, kwargs)`` in which objects that the worker
    holds are named by key; ``hold`` are objects to keep first, ``drop`` keys to forget.
    """

    phase: str
    payload: bytes
    hold: tuple[tuple[int, bytes], ...] = ()
    drop: tuple[int, ...] = ()


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, held: dict[int, Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._held = held

    def persistent_load(self, pid: Any) -> Any:
        return self._held[pid]


class _Worker:
    """Holds the object and the values shared with it."""

    def __init__(self) -> None:
        self._target: Any = None
        self._held: dict[int, Any] = {}

    def run(self, call: Call) -> Any:
        for key in call.drop:
            self._held.pop(key, None)
        for key, data in call.hold:
            self._held[key] = _Unpickler(data, self._held).load()
        method, args, kwargs = _Unpickler(call.payload, self._held).load()
        if callable(method):
            build: Callable[..., Any] = method
            self._target = build(*args, **kwargs)
            return None
        return getattr(self._target, method)(*args, **kwargs)


def main() -> None:
    """Serve calls until the driver's side is closed: from the first descriptor given, one after the other in the main
    thread; from the second, beside them. The third argument is the parent's pid.
    """
    die_with_parent(parent=int(sys.argv[3]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    _allow_open_files()
    worker = _Worker()
    threading.Thread(target=_serve, args=(Connection(int(sys.argv[2])), worker), name="beside", daemon=True).start()
    _serve(Connection(int(sys.argv[1])), worker)


def _allow_open_files() -> None:
    """A rank is connected to many others, and 1,024 is a usual limit; Ray raises its own processes' alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _serve(pipe: Connection[Any, Any], worker: _Worker) -> None:
    while True:
        try:
            call: Call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        started = time.perf_counter()
        value, error = b"", ""
        try:
            value = pickle.dumps(worker.run(call), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as exception:
            error = "".join(traceback.format_exception(exception))
            print(error, file=sys.stderr, flush=True)  # noqa: T201 - the log of this process
        pipe.send_bytes(
            pickle.dumps(
                Reply(
                    value=value,
                    error=error,
                    place=f"pid {os.getpid()} on {socket.gethostname()}",
                    busy_s=time.perf_counter() - started,
                    peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                )
            )
        )
