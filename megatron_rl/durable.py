"""Files that a crash cannot spoil: on the disk before anything relies on them, summed so that damage shows, and in
folders that one process at a time writes to.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

CHUNK_BYTES = 1 << 20
"""Read or written at a time: what is summed is then still in the processor's cache, and the system has memory for it at
once, where it may have to make room for a larger piece."""
_SPAN_BYTES = 64 << 20
"""Read back at a time: each costs the disk a flush."""
_POLL_S = 0.1


class NoLocks(OSError):
    """A file system on which no file can be locked."""


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
        written = os.pwrite(descriptor, left[:CHUNK_BYTES], offset)
        left, offset = left[written:], offset + written


def replace_text(path: Path, text: str) -> None:
    """Give ``path`` this content in one move: a reader sees the old content or the new one, also after a crash."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """As :func:`replace_text`."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    write_file(partial, content)
    partial.replace(path)
    flush(path.parent)


def read_record(path: Path, read: Callable[[int], None] = lambda _: None) -> FileRecord:
    """What a file is; ``read`` is told the bytes read, chunk by chunk."""
    with path.open("rb", buffering=0) as file:
        return _record(_told(chunks(file, 0, path.stat().st_size), read))


def _told(parts: Iterable[memoryview], read: Callable[[int], None]) -> Iterator[memoryview]:
    for part in parts:
        yield part
        read(len(part))


def read_back(path: Path) -> FileRecord:
    """What the disk gives back of a flushed file."""
    with path.open("rb", buffering=0) as file:
        forget(file, 0, 0)
        return _record(chunks(file, 0, path.stat().st_size))


def forget(file: io.FileIO, begin: int, end: int) -> None:
    """Drop what the system keeps in memory of bytes ``begin`` to ``end`` (0: the file's), which are flushed, so that
    the disk is read; pages that belong to them in part alone stay.
    """
    os.posix_fadvise(file.fileno(), begin, max(0, end - begin), os.POSIX_FADV_DONTNEED)


def chunks(file: io.FileIO, begin: int, end: int) -> Iterator[memoryview]:
    """Bytes ``begin`` to ``end`` of a file, fewer where it ends before; each chunk goes when the next one is taken."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, end - begin)))
    file.seek(begin)
    while begin < end and (count := file.readinto(buffer[: end - begin])):
        yield buffer[:count]
        begin += count


class CheckedFile(io.BufferedWriter):
    """A new file that is written from its first byte to its last; what the disk has of it is read back and summed while
    more is written, as a disk reads and writes at the same time.
    """

    def __init__(self, path: Path) -> None:
        """Make it.

        Raises:
            OSError: it is there, or cannot be made.
        """
        super().__init__(io.FileIO(path, "xb"))
        self._back = path.open("rb", buffering=0)
        self._given, self._found = xxhash.xxh3_128(), xxhash.xxh3_128()
        self._reader = ThreadPoolExecutor(1, "read-back")
        self._reads: list[Future[None]] = []
        self._asked = 0

    def write(self, content: Any, /) -> int:
        """Add bytes, or a view of them.

        Raises:
            OSError: the disk does not take them.
        """
        left = memoryview(content)
        size = left.nbytes
        while left:
            self._given.update(left[:CHUNK_BYTES])
            super().write(left[:CHUNK_BYTES])
            left = left[CHUNK_BYTES:]
        written = self.raw.tell()
        if written - self._asked >= _SPAN_BYTES:
            self._read_to(written - written % CHUNK_BYTES)
        return size

    def checked(self) -> FileRecord:
        """What the file is, once all of it is on the disk and has been read back.

        Raises:
            OSError: the disk has not taken it, or gives back something else.
        """
        self.flush()
        os.fsync(self.fileno())
        self._read_to(self.tell())
        for read in self._reads:
            read.result()
        if self._found.digest() != self._given.digest():
            raise OSError(errno.EIO, "what the disk gives back is not what was written")
        return FileRecord(size_bytes=self._asked, xxh3=self._given.hexdigest())

    def close(self) -> None:
        """Close it; what is not read back yet is left."""
        self._reader.shutdown(cancel_futures=True)
        self._back.close()
        super().close()

    def _read_to(self, end: int) -> None:
        self._reads.append(self._reader.submit(self._read, self._asked, end))
        self._asked = end

    def _read(self, begin: int, end: int) -> None:
        os.fdatasync(self.fileno())
        forget(self._back, begin, end)
        for chunk in chunks(self._back, begin, end):
            self._found.update(chunk)


def comes_into_sight(path: Path, within_s: float) -> bool:
    """Whether what another host has just made is, or comes to be, seen here: network file systems may take a moment."""
    deadline = time.monotonic() + within_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def flush(path: Path) -> None:
    """Make the disk have a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_in(folder: Path) -> dict[str, Path]:
    """All files of a folder and of those in it, by their names from there, in order."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def flush_all(folder: Path) -> None:
    """:func:`flush` a folder and all that it holds."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


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
        OSError: the file cannot be made, or its file system has no locks.
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
            _wait_for(descriptor, file, writing, deadline)
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


def _wait_for(descriptor: int, file: Path, writing: Path, deadline: float) -> None:
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
        except OSError as error:
            raise NoLocks(
                error.errno,
                f"{file} must be locked against other processes that write {writing}, and cannot be: {error.strerror}; "
                "mount a file system that has flock there, or name a folder elsewhere",
            ) from None
        else:
            return
        time.sleep(_POLL_S)


def _record(parts: Iterable[bytes | memoryview]) -> FileRecord:
    digest, size = xxhash.xxh3_128(), 0
    for chunk in parts:
        digest.update(chunk)
        size += len(chunk)
    return FileRecord(size_bytes=size, xxh3=digest.hexdigest())
