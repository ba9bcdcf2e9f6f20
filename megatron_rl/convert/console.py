"""What the conversion commands have in common: options, progress, and how an error is told."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from megatron_rl.convert.summary import Summary

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_LINE_EVERY_S = 5.0
_FAILURE, _INTERRUPTED = 1, 130


def add_processes(parser: argparse.ArgumentParser) -> None:
    """The option --processes."""
    parser.add_argument(
        "--processes", type=_positive, default=os.cpu_count() or 1, metavar="N", help="at a time; default: all cores"
    )


def add_dtype(parser: argparse.ArgumentParser, text: str) -> None:
    """The option --dtype."""
    parser.add_argument("--dtype", choices=sorted(DTYPES), help=text)


def add_drop_padding_rows(parser: argparse.ArgumentParser) -> None:
    """The option --drop-padding-rows."""
    parser.add_argument(
        "--drop-padding-rows",
        action="store_true",
        help="leave a Megatron checkpoint's rows behind the vocabulary even if they are not zero, as programs leave "
        "them that train their padding",
    )


def size_bytes(text: str) -> int:
    """Read a size such as 500MB or 4GiB.

    Raises:
        ArgumentTypeError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"a size must be like 500MB or 4GiB, got {text!r}")
    return size


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


@contextmanager
def progress_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows GB/s and the time left on standard error; a line now and then where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, total_bytes)
        return
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task(what, total=total_bytes)

        def show(done_bytes: int) -> None:
            progress.update(task, completed=done_bytes, refresh=True)

        yield show


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{(task.finished_speed or task.speed or 0.0) / 1e9:.2f} GB/s")


class _Lines:
    def __init__(self, what: str, total_bytes: int) -> None:
        self._what, self._total = what, total_bytes
        self._began = self._told = time.monotonic()

    def __call__(self, done_bytes: int) -> None:
        now = time.monotonic()
        if not done_bytes or now - self._told < _LINE_EVERY_S:
            return
        self._told = now
        rate = done_bytes / (now - self._began)
        left = max(0.0, (self._total - done_bytes) / rate)
        done = done_bytes / self._total
        sys.stderr.write(f"{self._what}: {done:.0%}, {rate / 1e9:.2f} GB/s, {left:.0f} s left\n")


def print_written(target: Path, summary: Summary, began_s: float, *, written: bool) -> None:
    """A conversion's last line: what it wrote, in what time since ``began_s`` of the monotonic clock, at what rate, and
    what it left out; or that nothing was left to do.
    """
    if not written:
        print(f"{target} is complete already")  # noqa: T201
        return
    took = time.monotonic() - began_s
    left = f"; left out: {summary.left_out}" if summary.left_out else ""
    print(f"wrote {target} in {took:.2f} s, {summary.written_bytes / took / 1e9:.2f} GB/s{left}")  # noqa: T201


def run(command: Callable[[], None]) -> int:
    """Do it; the exit status is 0, 1 (failed: one line says why) or 130 (interrupted)."""
    try:
        command()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except (OSError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"error: {_told(error)}\n")
        return _FAILURE
    return 0


def _told(error: Exception) -> str:
    """Without the number of an error of the system; its notes say where it was raised."""
    told = str(error)
    if isinstance(error, OSError) and error.strerror:
        told = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join((told, *(f"({note})" for note in getattr(error, "__notes__", ()))))
