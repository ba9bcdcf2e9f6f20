"""``megatron-rl`` with a fault in one worker: ``python -m tests.end_to_end.faulty WHOSE VERB DEED train ...``.

The first time that WHOSE (``policy rank 1``, ``reference rank 1``, ``engine``) is asked for VERB, it does DEED:
``raise``, or ``kill OTHER`` with the name of another worker, so that the other dies while this one is at work.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

STRUCK = "struck"
"""A file beside the logs, made when another worker is killed."""


def with_fault(fault: tuple[str, str, str], command: Sequence[str]) -> list[str]:
    """The same ``train`` command with a fault: WHOSE, VERB, DEED."""
    return [sys.executable, "-m", __name__, *fault, *command[command.index("train") :]]


def do(deed: str) -> None:
    if deed == "raise":
        raise RuntimeError("a fault was planted here")
    other = deed.removeprefix("kill ")
    processes = Path("/proc/self/fd/1").readlink().with_name("processes.json")  # beside the log of this worker
    processes.with_name(STRUCK).touch()
    (pid,) = (entry["pid"] for entry in json.loads(processes.read_text()) if entry["worker"] == other)
    os.kill(pid, signal.SIGKILL)


def start_with_fault(start: Callable[..., Any], whose: str, verb: str, deed: str, *args: Any) -> Any:
    """Start a worker as ``start`` does; it may get the fault."""
    worker = start(*args)
    role, _, rank = whose.partition(" rank ")
    asked, spent = getattr(worker, verb, None), []

    def struck(*args: Any, **kwargs: Any) -> Any:
        by_reference = verb == "logprobs" and args[2]
        if by_reference == (role == "reference") and not spent:
            spent.append(True)
            do(deed)
        return asked(*args, **kwargs)

    plays = getattr(args[0], "role", "engine"), str(args[1]) if len(args) > 1 else ""
    if plays == ("policy" if role == "reference" else role, rank):
        setattr(worker, verb, struck)
    return worker


if __name__ == "__main__":
    from megatron_rl.__main__ import main
    from megatron_rl.assemble import roles

    for name in ("start_worker", "start_engine"):
        setattr(roles, name, partial(start_with_fault, getattr(roles, name), *sys.argv[1:4]))
    sys.exit(main(sys.argv[4:]))
