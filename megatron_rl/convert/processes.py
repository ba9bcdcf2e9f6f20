"""Files are written and read by several processes, each file by one of them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from megatron_rl.lifetime import die_with_parent

_POLL_S = 0.2
_Result = TypeVar("_Result")


class ProcessDied(RuntimeError):
    """A process was killed; the system's memory may have run out."""


def for_each_file(
    count: int,
    job: Callable[[int, Callable[[int], None]], _Result],
    *,
    processes: int,
    progress: Callable[[int], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> list[_Result]:
    """Do ``job`` for file 0 to ``count - 1``.

    The processes are forked, so that they start at once and share what is planned. They share nothing else: no
    collectives, so nobody can wait for one that died. They die with this process.

    Args:
        count: files.
        job: what to do with each; its result must be picklable.
        processes: at most so many at a time.
        progress: told the bytes done so far, a few times a second.
        meanwhile: what this process does once the others have begun.

    Returns:
        the results, in the order of the files.

    Raises:
        Exception: of the first file that failed; files that were not begun are left.
        ProcessDied: a process was killed.
        KeyboardInterrupt: Ctrl-C; the processes are killed at once.
    """
    context = multiprocessing.get_context("fork")
    done = context.Value(ctypes.c_int64)
    workers = min(processes, max(count, 1))
    before = set(multiprocessing.active_children())
    try:
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job, done, os.getpid())) as pool:
            try:
                futures = [pool.submit(_run, number) for number in range(count)]
                meanwhile()
                waiting = set(futures)
                while waiting:
                    finished, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
                    progress(done.value)
                    if any(future.exception() for future in finished):
                        pool.shutdown(cancel_futures=True)
                        break
            except BaseException:
                # leaving the pool waits for what it has begun, and what it has begun ignores Ctrl-C
                for process in set(multiprocessing.active_children()) - before:
                    process.kill()
                pool.shutdown(cancel_futures=True)
                raise
            # those that were cancelled come after the one that failed
            return [future.result() for future in futures if not future.cancelled()]
    except BrokenProcessPool as error:
        raise ProcessDied(
            "a process of the conversion was killed; look for the kernel's out-of-memory killer (dmesg), and use fewer "
            "processes if it was that"
        ) from error


_job: Callable[[int, Callable[[int], None]], Any]
_done: Any


def _start(job: Callable[[int, Callable[[int], None]], Any], done: Any, parent: int) -> None:
    global _job, _done
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    _job, _done = job, done


def _run(number: int) -> Any:
    def moved(size_bytes: int) -> None:
        with _done.get_lock():
            _done.value += size_bytes

    return _job(number, moved)
