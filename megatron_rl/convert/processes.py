"""Files are written and read by several processes, each file by one of them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from megatron_rl.lifetime import die_with_parent, ended

_POLL_S = 0.2
_END_S = 10.0
"""What a process may take to end once it is killed or done; one that the system holds longer is left to it."""
_Result = TypeVar("_Result")


class ProcessDied(RuntimeError):
    """A process ended in the midst of its work; the system's memory may have run out."""


@dataclass
class Report:
    """What a process tells of its work.

    Attributes:
        what: it is at.
    """

    _pipe: Connection
    _done: Any
    what: str = "its start"

    def at(self, what: str) -> None:
        """A tensor or a file is begun; it is named if the process fails, or dies, before the next one."""
        self.what = what
        self._pipe.send(_At(what))

    def moved(self, size_bytes: int) -> None:
        """So many more bytes are done."""
        self._done.value += size_bytes


def for_each_file(
    count: int,
    job: Callable[[int, Report], _Result],
    *,
    processes: int,
    progress: Callable[[int], None],
    meanwhile: Callable[[], None] = lambda: None,
) -> list[_Result]:
    """Do ``job`` for file 0 to ``count - 1``.

    The processes are forked, so that they start at once and share what is planned. They share nothing else: no
    collectives and no locks, so nobody can wait for one that died. They die with this process. When one fails or dies
    the others are killed, whatever they are at: an interruption as any other.

    Args:
        count: files.
        job: what to do with each; its result must be picklable.
        processes: at most so many at a time.
        progress: told the bytes done so far, a few times a second.
        meanwhile: what this process does once the others have begun.

    Returns:
        the results, in the order of the files.

    Raises:
        Exception: of the first process that failed; a note says which it is, and at which tensor it was.
        ProcessDied: a process was killed; the message says the same.
        KeyboardInterrupt: Ctrl-C.
    """
    context = multiprocessing.get_context("fork")
    of = min(processes, max(count, 1))
    done = [context.RawValue(ctypes.c_int64) for _ in range(of)]  # each is written by one process alone
    numbers = iter(range(count))
    workers: dict[Connection, _Worker] = {}
    results: dict[int, _Result] = {}
    try:
        for rank in range(of):
            pipe, end = context.Pipe()
            name = f"process {rank} of {of}"
            process = context.Process(target=_work, args=(name, job, end, done[rank], os.getpid()), daemon=True)
            process.start()
            end.close()  # before the next fork: a process alone holds its end, which closes with it
            workers[pipe] = _Worker(name, process)
            _give(pipe, numbers)
        meanwhile()
        while workers:
            ready = wait([*workers], timeout=_POLL_S)
            for pipe in [pipe for pipe in workers if pipe in ready]:
                _hear(pipe, workers, results, numbers)
            progress(sum(each.value for each in done))
    finally:
        for worker in workers.values():
            worker.process.kill()
        for worker in workers.values():
            worker.process.join(_END_S)
    return [results[number] for number in range(count)]


@dataclass
class _Worker:
    name: str
    process: BaseProcess
    what: str = "its start"


@dataclass(frozen=True)
class _At:
    what: str


@dataclass(frozen=True)
class _Did:
    number: int
    result: Any


@dataclass(frozen=True)
class _Failed:
    error: Exception
    trace: str


class _Ended:
    """A process has nothing left to do."""


class _There(Exception):
    """The traceback of another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _give(pipe: Connection, numbers: Iterator[int]) -> None:
    """The next file, or None: there is none left."""
    with suppress(BrokenPipeError, ConnectionResetError):  # it has ended, which is heard next
        pipe.send(next(numbers, None))


def _hear(
    pipe: Connection, workers: dict[Connection, _Worker], results: dict[int, Any], numbers: Iterator[int]
) -> None:
    worker = workers[pipe]
    try:
        message = pipe.recv()
    except (EOFError, OSError):  # of no message, or of half of one
        worker.process.join(_END_S)
        hint = ""
        if worker.process.exitcode == -signal.SIGKILL:
            hint = (
                "; look for the kernel's out-of-memory killer (dmesg), and use fewer processes (--processes) if it was "
                "that"
            )
        raise ProcessDied(
            f"{worker.name} (pid {worker.process.pid}) {ended(worker.process.exitcode)}, at {worker.what}{hint}"
        ) from None
    match message:
        case _At(what):
            worker.what = what
        case _Did(number, result):
            results[number] = result
            _give(pipe, numbers)
        case _Failed(error, trace):
            raise error from _There(trace)
        case _Ended():
            workers.pop(pipe).process.join(_END_S)


def _work(name: str, job: Callable[[int, Report], Any], pipe: Connection, done: Any, parent: int) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler, which would end this one without a word
    torch.set_num_threads(1)
    report = Report(pipe, done)
    try:
        while (number := pipe.recv()) is not None:
            pipe.send(_Did(number, job(number, report)))
    except Exception as error:
        error.add_note(f"{name}, at {report.what}")
        pipe.send(_Failed(error, traceback.format_exc()))
    else:
        pipe.send(_Ended())
