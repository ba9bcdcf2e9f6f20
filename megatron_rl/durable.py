"""Files that a crash cannot spoil: on the disk before anything relies on them, summed so that damage shows, and in
folders that one process at a time writes to.
"""

from __future__ import annotations

import fcntl
import io
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

_CHUNK_BYTES = 16 << 20
_READ_BYTES = 1 << 20
"""Small enough that what was read is summed from the processor's cache."""
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must be: its size, and xxh3-128 over its content."""

    size_bytes: int
    xxh3: str


def write_file(path: Path, content: bytes | memoryview) -> FileRecord:
    """Write a new file; when this returns, the disk has its content (its name only after :func:`flush`).

    Raises:
        OSError: the disk does not take it; half a file may be left.
    """
    with path.open("xb", buffering=0) as file:
        write_at(file.fileno(), content, 0)
        os.fsync(file.fileno())
    return _record([content])


def write_at(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of ``content`` (bytes, or a view of them) into an open file from byte ``offset`` on.

    Raises:
        OSError: the disk does not take it; a part may be written.
    """
    left = memoryview(content)
    while left:
        written = os.pwrite(descriptor, left[:_CHUNK_BYTES], offset)
        left, offset = left[written:], offset + written


def replace_text(path: Path, text: str) -> None:
    """Give ``path`` this content in one move: a reader sees the old content or the new one, also after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_file(partial, text.encode())
    partial.replace(path)
    flush(path.parent)


def read_record(path: Path) -> FileRecord:
    """What a file is."""
    with path.open("rb") as file:
        return _record(iter(lambda: file.read(_CHUNK_BYTES), b""))


def read_back(path: Path) -> FileRecord:
    """What the disk gives back of a flushed file: what the system keeps of it in memory is dropped before."""
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _record(buffer[:count] for count in iter(lambda: file.readinto(buffer), 0))


class SummedFile(io.BufferedWriter):
    """A new file that is written from its first byte to its last, and summed on the way."""

    def __init__(self, path: Path) -> None:
        """Make it.

        Raises:
            OSError: it is there, or cannot be made.
        """
        super().__init__(io.FileIO(path, "xb"))
        self._digest = xxhash.xxh3_128()

    def write(self, content: Any, /) -> int:
        """Add bytes, or a view of them.

        Raises:
            OSError: the disk does not take them.
        """
        self._digest.update(content)
        return super().write(content)

    def record(self) -> FileRecord:
        """What the file must be if nothing more is written."""
        return FileRecord(size_bytes=self.tell(), xxh3=self._digest.hexdigest())


def flush(path: Path) -> None:
    """Make the disk have a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(file: Path, *, writing: Path, wait_s: float) -> Iterator[None]:
    """Be the only process that writes to a folder; the kernel frees the lock when this process, and whatever it forked,
    is gone, however it ended.

    Args:
        file: of the lock, made where it is missing; holds the pid and host of who had it last. Only who has it may
            remove it.
        writing: what is written, for the message.
        wait_s: how long a holder may take to go, seconds.

    Raises:
        BlockingIOError: another process holds it; the message names its pid.
        OSError: the file cannot be made.
    """
    descriptor = _take(file, writing, time.monotonic() + wait_s)
    try:
        os.ftruncate(descriptor, 0)
        write_at(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take(file: Path, writing: Path, deadline: float) -> int:
    """A descriptor that has the lock of what ``file`` is, also where a holder removes it when it is done."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait_for(descriptor, writing, deadline)
            if _is_at(descriptor, file):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _wait_for(descriptor: int, writing: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = os.pread(descriptor, 1024, 0).decode() or "pid not known yet"
                raise BlockingIOError(
                    f"another process is writing {writing} ({holder}, or one that it started): wait for it, end it, or "
                    "name another folder"
                ) from None
            time.sleep(_POLL_S)
        else:
            return


def _record(chunks: Iterable[bytes | memoryview]) -> FileRecord:
    digest, size = xxhash.xxh3_128(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return FileRecord(size_bytes=size, xxh3=digest.hexdigest())
