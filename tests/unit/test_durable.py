"""Files that a crash cannot spoil."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from megatron_rl import durable
from megatron_rl.convert.resume import Conversion, convert
from megatron_rl.convert.target import Target
from megatron_rl.durable import (
    CheckedFile,
    FileRecord,
    NoLocks,
    comes_into_sight,
    locked,
    read_back,
    read_record,
    replace_text,
    write_file,
)


def test_what_was_written_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "CHUNK_BYTES", 7)
    content = bytes(range(256))
    written = write_file(tmp_path / "file", memoryview(content))
    assert (tmp_path / "file").read_bytes() == content
    assert written == read_record(tmp_path / "file")
    assert written == FileRecord(size_bytes=256, xxh3=xxhash.xxh3_128_hexdigest(content))


@pytest.fixture
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "CHUNK_BYTES", 7)
    monkeypatch.setattr(durable, "_SPAN_BYTES", 16)


@pytest.mark.usefixtures("small_spans")
def test_a_checked_file_is_what_the_disk_gives_back(tmp_path: Path) -> None:
    with CheckedFile(tmp_path / "file") as file:
        for part in (b"abc", memoryview(b"d" * 20_000), b"", b"e"):  # more than is kept back for a larger write
            assert file.write(part) == len(part)
        written = file.checked()
    content = b"abc" + b"d" * 20_000 + b"e"
    assert (tmp_path / "file").read_bytes() == content
    assert written == FileRecord(size_bytes=20_004, xxh3=xxhash.xxh3_128_hexdigest(content))
    assert read_back(tmp_path / "file") == written
    with pytest.raises(FileExistsError):
        CheckedFile(tmp_path / "file")


@pytest.mark.usefixtures("small_spans")
@pytest.mark.parametrize("place", [0, 10_000, 19_999])
def test_a_byte_that_the_disk_gives_back_otherwise_is_an_error(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushed = tmp_path / "file", os.fdatasync

    def spoiled(descriptor: int) -> None:
        flushed(descriptor)
        if path.stat().st_size > place:
            with path.open("r+b") as other:
                other.seek(place)
                other.write(b"?")

    monkeypatch.setattr("os.fdatasync", spoiled)
    with CheckedFile(path) as file:
        file.write(b"d" * 20_000)
        with pytest.raises(OSError, match="what the disk gives back is not what was written") as told:
            file.checked()
    assert told.value.errno == errno.EIO


@pytest.mark.usefixtures("small_spans")
def test_a_disk_that_does_not_take_a_file_is_told_when_it_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fdatasync", full)
    with CheckedFile(tmp_path / "file") as file:
        file.write(b"d" * 20_000)
        with pytest.raises(OSError, match="No space left"):
            file.checked()


def test_a_file_that_comes_late_is_waited_for_and_one_that_never_comes_is_not_for_long(tmp_path: Path) -> None:
    late = threading.Timer(0.3, (tmp_path / "late").touch)
    late.start()
    assert comes_into_sight(tmp_path / "late", 30)
    late.join(timeout=10)
    began = time.monotonic()
    assert not comes_into_sight(tmp_path / "never", 0.2)
    assert 0.2 <= time.monotonic() - began < 10


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"old")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_replacement_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "latest"
    replace_text(file, "one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            replace_text(file, "two")
    assert file.read_text() == "one"
    replace_text(file, "three")  # what the failed one left is no obstacle
    assert file.read_text() == "three"
    assert list(tmp_path.iterdir()) == [file]


HOLD = """
import sys, time
import os
import socket
import subprocess
import sys
from pathlib import Path
from megatron_rl.durable import locked
with locked(Path(sys.argv[1]) / "lock", writing=Path(sys.argv[1]), wait_s=0):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_the_process_that_holds_it_and_is_free_when_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            says = rf"another process is writing {tmp_path} \(pid {holder.pid} on "
            with pytest.raises(BlockingIOError, match=says), locked(tmp_path / "lock", writing=tmp_path, wait_s=0.2):
                pytest.fail("the lock was given twice")
        finally:
            holder.kill()
    with locked(tmp_path / "lock", writing=tmp_path, wait_s=0):
        assert (tmp_path / "lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}"
    with locked(tmp_path / "lock", writing=tmp_path, wait_s=0):
        pass


def test_a_file_system_without_locks_is_told_with_the_file_and_a_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    says = rf"{tmp_path}/lock must be locked .* write {tmp_path}, and cannot be: No locks available; mount "
    with pytest.raises(OSError, match=says) as told, locked(tmp_path / "lock", writing=tmp_path, wait_s=9):
        pytest.fail("there is no lock")
    assert told.value.errno == errno.ENOLCK
    target = Target(tmp_path / "out")
    with pytest.raises(NoLocks) as told:  # and not taken for a disk without room
        convert(Conversion(name="import", made_of="model", digest=""), target, lambda: None, resume=False)
    assert "--resume" not in str(told.value)


def test_an_interrupt_while_waiting_for_a_lock_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with locked(tmp_path / "lock", writing=tmp_path, wait_s=0):
        monkeypatch.setattr("megatron_rl.durable.time.sleep", interrupt)
        with pytest.raises(KeyboardInterrupt) as told, locked(tmp_path / "lock", writing=tmp_path, wait_s=9):
            pytest.fail("it is held")
    assert told.value.__context__ is None


def test_a_lock_whose_file_its_holder_removes_is_still_given_to_one_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    waiting, second_has_it, may_go = threading.Event(), threading.Event(), threading.Event()

    def wait_for_it() -> None:
        waiting.set()
        with locked(file, writing=tmp_path, wait_s=30):
            second_has_it.set()
            may_go.wait(30)

    with ThreadPoolExecutor(1) as pool:
        with locked(file, writing=tmp_path, wait_s=0):
            second = pool.submit(wait_for_it)
            assert waiting.wait(30)
            time.sleep(0.3)  # it has opened the file by now
            assert not second_has_it.is_set()
            file.unlink()
        try:
            assert second_has_it.wait(30)
            with pytest.raises(BlockingIOError), locked(file, writing=tmp_path, wait_s=0):
                pytest.fail("two have the lock")
        finally:
            may_go.set()
        second.result()
