"""A folder that is there when it is complete, and not before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_rl.durable import flush, flush_all, locked

_MODEL, _LOCK = "model", "lock"
_LOCK_WAIT_S = 10.0
"""Processes of a conversion that was killed hold the lock until they are gone too."""


class Target:
    """Where a conversion writes.

    Everything is written into a hidden folder beside the target; the last act gives it its name. The hidden folder is
    locked while a process of the conversion lives, so two never write into it.

    Attributes:
        path: the target.
        work: the hidden folder.
        model: in it, what becomes the target.
    """

    def __init__(self, path: Path) -> None:
        """Of the folder ``path``; ValueError if that has no name, as ``.`` has none."""
        if not path.name:
            raise ValueError(f"a target must have a name of its own, got {str(path)!r}")
        self.path = path
        self.work = path.with_name(f".{path.name}.partial")
        self.model = self.work / _MODEL

    def refuse_existing(self) -> None:
        """Raise FileExistsError if the target is there, were it a link to nowhere."""
        if os.path.lexists(self.path):
            raise FileExistsError(f"{self.path} exists and is never written over; remove it or name another folder")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the hidden folder, or take up the one that is there, and hold its lock.

        Raises:
            FileNotFoundError: the folder that the target goes into is not there.
            FileExistsError: the target is there, from whoever had the lock before.
            OSError: it cannot be written to, or another conversion writes to the same target.
        """
        with ExitStack() as held:
            while True:
                self._make()
                try:
                    held.enter_context(locked(self.work / _LOCK, writing=self.path, wait_s=_LOCK_WAIT_S))
                    self.model.mkdir(exist_ok=True)
                except FileNotFoundError:
                    continue  # whoever had the lock was done and removed the folder
                break
            if os.path.lexists(self.path):
                self.discard()
            self.refuse_existing()
            yield

    def _make(self) -> None:
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path} must go into a folder that exists, {self.path.parent} does not")
        try:
            self.work.mkdir(exist_ok=True)
            (self.work / _LOCK).touch()
        except FileNotFoundError:
            return  # as above: it is made again
        except OSError as error:
            reason = error.strerror
            raise type(error)(f"{self.path.parent} must be a folder that can be written to: {reason}") from error

    def discard_work(self) -> None:
        """Start over: remove what an earlier conversion left in the hidden folder, which is locked."""
        shutil.rmtree(self.model)
        self.model.mkdir()

    def finish(self) -> None:
        """Flush everything and give it its name."""
        flush_all(self.model)
        self.model.rename(self.path)
        flush(self.path.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the hidden folder and all that was written; the lock last, which lets the next one in."""
        for path in self.work.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
