"""Kill -9 and full disks: an export goes on to the same files, and nothing half-valid is left."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from torch import Tensor

from megatron_rl import durable
from megatron_rl.convert.processes import ProcessDied, for_each_file
from megatron_rl.convert.sources import MegatronSource
from megatron_rl.convert.target import Target
from megatron_rl.weights import safetensors_io
from megatron_rl.weights.manifest import ShardRecord, read_back
from megatron_rl.weights.weight_map import WeightEntry
from tests.unit.convert.folders import export_plan, exported, folder_sums, ignore, imported, wide_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    return imported(wide_model(folder / "hf"), folder / "megatron")


def forked(work: Callable[[], object]) -> int:
    """Start ``work`` in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def wait_until(happened: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline, "must have happened by now"
        time.sleep(0.002)


def killed_after(seconds: float, work: Callable[[], object], once: Callable[[], bool] = lambda: True) -> bool:
    """Whether ``work`` was still at it when it was killed, so many seconds after its start and ``once`` that is so."""
    pid = forked(work)
    time.sleep(seconds)
    wait_until(once)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def kill_and_resume(checkpoint: Path, tmp_path: Path, moments: int) -> None:
    began = time.monotonic()
    expected = folder_sums(exported(checkpoint, tmp_path / "unbroken"))
    whole_s = time.monotonic() - began
    draw = random.Random(0)
    struck, kept_some = 0, 0
    for moment in range(moments):
        out = tmp_path / f"out{moment}"
        struck += killed_after(draw.uniform(0.0, whole_s), lambda out=out: exported(checkpoint, out))
        kept = list(Target(out).work.glob("records/*.json"))
        kept_some += bool(kept)
        assert not out.exists() or folder_sums(out) == expected
        assert folder_sums(exported(checkpoint, out, resume=True)) == expected
        assert not Target(out).work.exists()
    assert struck >= moments // 2, "kills must have struck exports that were under way"
    assert kept_some


def test_an_export_that_is_killed_once_a_file_is_complete_goes_on_to_the_same_files(
    checkpoint: Path, tmp_path: Path
) -> None:
    expected = folder_sums(exported(checkpoint, tmp_path / "unbroken"))
    out = tmp_path / "out"

    def records() -> list[Path]:
        return list(Target(out).work.glob("records/*.json"))

    assert killed_after(0, lambda: exported(checkpoint, out), once=lambda: bool(records()))
    kept = {(file := Target(out).model / record.stem).name: file.stat().st_ino for record in records()}
    assert kept
    assert folder_sums(exported(checkpoint, out, resume=True)) == expected
    assert kept.items() <= {path.name: path.stat().st_ino for path in out.iterdir()}.items()
    assert not Target(out).work.exists()


@pytest.mark.slow
def test_an_export_that_is_killed_at_any_moment_goes_on_to_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    kill_and_resume(checkpoint, tmp_path, 20)


def test_a_resumed_export_keeps_what_is_complete_and_writes_again_what_is_damaged(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = folder_sums(exported(checkpoint, tmp_path / "unbroken"))
    out = tmp_path / "out"
    model = killed_at_its_last_act(checkpoint, out, monkeypatch)
    first, second = sorted(model.glob("*.safetensors"))[:2]
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    before = (first.stat().st_ino, second.stat().st_ino)
    exported(checkpoint, out, resume=True)
    assert folder_sums(out) == expected
    assert (out / first.name).stat().st_ino == before[0]
    assert (out / second.name).stat().st_ino != before[1]


def test_resuming_what_is_complete_changes_nothing_and_other_options_are_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    expected = folder_sums(exported(checkpoint, out))
    assert folder_sums(exported(checkpoint, out, resume=True)) == expected
    with pytest.raises(FileExistsError, match="exists and is never written over"):
        exported(checkpoint, out, resume=True, shard_bytes=1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(Target, "finish", lambda self: os._exit(9))
        os.waitpid(forked(lambda: exported(checkpoint, tmp_path / "other")), 0)
    with pytest.raises(ValueError, match=r"was interrupted .* had other options; give the same ones, or remove"):
        exported(checkpoint, tmp_path / "other", resume=True, shard_bytes=1 << 20)
    with pytest.raises(FileExistsError, match="was interrupted; go on with --resume, or remove it"):
        exported(checkpoint, tmp_path / "other")


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Writing through the descriptors of the project fails once so many bytes of a file are full."""
    write, room = durable.write_at, [5 << 19]

    def limited(descriptor: int, content: bytes | memoryview, offset: int) -> None:
        if offset + len(content) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, content, offset)

    monkeypatch.setattr(safetensors_io, "write_at", limited)
    return room


def test_a_full_disk_ends_an_export_which_goes_on_when_there_is_room(
    checkpoint: Path, tmp_path: Path, small_disk: list[int]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match=r"out/model-0.* could not be written \(No space left on device\).*--resume"):
        exported(checkpoint, out)
    assert not out.exists()
    left = {path.suffix for path in Target(out).model.iterdir()}
    assert left <= {".safetensors"}, "no configuration, index or manifest makes it look like a model"
    small_disk[0] = 1 << 40
    exported(checkpoint, out, resume=True)
    assert folder_sums(out) == folder_sums(exported(checkpoint, tmp_path / "unbroken"))


@pytest.mark.parametrize("at", ["header", "tensor"])
def test_an_export_notices_a_byte_that_the_disk_gives_back_otherwise(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def spoiled(path: Path, name: str, read: Callable[[int], None]) -> ShardRecord:
        content = bytearray(path.read_bytes())
        content[content.index(b'"pt"') + 1 if at == "header" else -1] ^= 1
        path.write_bytes(content)
        return read_back(path, name, read)

    monkeypatch.setattr("megatron_rl.convert.to_hf.read_back", spoiled)
    told = r"model-0\S+ could not be written \(.*: what the disk gives back is not what was written\)"
    with pytest.raises(OSError, match=told):
        exported(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def killed_at_its_last_act(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hidden model folder of an export of which all files are written, without its manifest."""
    with monkeypatch.context() as patch:
        patch.setattr(Target, "finish", lambda self: os._exit(9))
        assert os.waitpid(forked(lambda: exported(checkpoint, out)), 0)[1] != 0
    model = Target(out).model
    (model / "manifest.json").unlink()
    return model


def test_a_source_that_cannot_be_read_is_told_as_such_and_complete_files_stay(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = killed_at_its_last_act(checkpoint, tmp_path / "out", monkeypatch)
    first, second = sorted(model.glob("*.safetensors"))[:2]
    second.unlink()

    def unreadable(self: MegatronSource, entry: WeightEntry) -> list[tuple[str, Tensor]]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(checkpoint / "__0_0.distcp"))

    with monkeypatch.context() as patch:
        patch.setattr(MegatronSource, "hf_tensors", unreadable)
        with pytest.raises(OSError, match=r"megatron/__0_0.distcp could not be read \(Input/output error\).*--resume"):
            exported(checkpoint, tmp_path / "out", resume=True)
    assert first.is_file()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"tensors": {"x": {}}}', "\xff"])
def test_a_file_whose_record_cannot_be_read_is_written_anew_and_no_other_one_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    model = killed_at_its_last_act(checkpoint, tmp_path / "out", monkeypatch)
    first, second = sorted(model.glob("*.safetensors"))[:2]
    (Target(tmp_path / "out").work / "records" / f"{second.name}.json").write_bytes(content.encode("latin-1"))
    before = (first.stat().st_ino, second.stat().st_ino)
    out = exported(checkpoint, tmp_path / "out", resume=True)
    assert folder_sums(out) == folder_sums(exported(checkpoint, tmp_path / "unbroken"))
    assert (out / first.name).stat().st_ino == before[0]
    assert (out / second.name).stat().st_ino != before[1]


def test_a_full_disk_ends_an_import_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    source = exported(checkpoint, tmp_path / "source")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))  # what a full disk is to a writer
    try:
        with pytest.raises(OSError, match="could not be written"):
            imported(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_killed_process_is_told_and_its_like_end_too(tmp_path: Path) -> None:
    def kill_me(number: int, moved: Callable[[int], None]) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    before = psutil.Process().children()
    with pytest.raises(ProcessDied, match="was killed; look for the kernel's out-of-memory killer"):
        for_each_file(4, kill_me, processes=2, progress=ignore)
    assert psutil.Process().children() == before


def test_ctrl_c_ends_a_conversion_at_once_and_its_processes_with_it(tmp_path: Path) -> None:
    def slow(number: int, moved: Callable[[int], None]) -> None:
        (tmp_path / f"{number}").touch()
        time.sleep(1.0)

    def work() -> None:
        try:
            for_each_file(40, slow, processes=2, progress=lambda _: (tmp_path / "told").touch())
        except KeyboardInterrupt:
            os._exit(7 if not psutil.Process().children() else 8)

    leader = forked(work)
    wait_until((tmp_path / "told").exists)
    os.kill(leader, signal.SIGINT)
    began = time.monotonic()
    status = os.waitpid(leader, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 7
    assert time.monotonic() - began < 10
    assert len(list(tmp_path.iterdir())) <= 5, "files that were not begun are left"


def test_two_exports_never_write_to_one_target(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rl.convert.target._LOCK_WAIT_S", 0.2)
    other = Target(tmp_path / "out")
    with other.open(), pytest.raises(BlockingIOError, match="another process is writing"):
        exported(checkpoint, tmp_path / "out", resume=True)


def test_who_waits_for_a_conversion_that_gives_up_starts_anew_and_after_one_that_ends_is_refused(
    tmp_path: Path,
) -> None:
    def wait_and_write(name: str) -> None:
        with Target(tmp_path / "out").open():
            (Target(tmp_path / "out").model / name).touch()
            Target(tmp_path / "out").finish()

    with ThreadPoolExecutor(1) as pool:
        with Target(tmp_path / "out").open():
            second = pool.submit(wait_and_write, "second")
            time.sleep(0.3)
            Target(tmp_path / "out").discard()
        second.result(30)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]
        (tmp_path / "out").rename(tmp_path / "away")
        with Target(tmp_path / "out").open():
            third = pool.submit(wait_and_write, "third")
            time.sleep(0.3)
            Target(tmp_path / "out").finish()
        with pytest.raises(FileExistsError, match="exists and is never written over"):
            third.result(30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "out"]


def sampled_peaks(work: Callable[[], object]) -> list[int]:
    """Largest anonymous and shared memory of each process that ``work`` starts, beyond what this process has, bytes."""

    def held(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem")))

    before = held(os.getpid())
    leader = forked(work)
    peaks: dict[int, int] = {}
    while os.waitpid(leader, os.WNOHANG) == (0, 0):
        for process in [psutil.Process(leader), *psutil.Process(leader).children()]:
            try:
                peaks[process.pid] = max(peaks.get(process.pid, 0), held(process.pid) - before)
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue
        time.sleep(0.001)
    return list(peaks.values())


def test_memory_does_not_grow_with_the_model(checkpoint: Path, tmp_path: Path) -> None:
    largest = export_plan(checkpoint).summary().largest_bytes
    total = export_plan(checkpoint).summary().written_bytes
    slack = 24 << 20  # of the GiB that is promised
    assert total > 2 * (2 * largest + slack), "a copy of one process's half of the model must show"
    for work in (
        lambda: exported(checkpoint, tmp_path / "out", shard_bytes=60 << 20),
        lambda: imported(tmp_path / "out", tmp_path / "again"),
    ):
        peaks = sampled_peaks(work)
        assert len(peaks) == 3
        assert max(peaks) <= 2 * largest + slack
    assert (tmp_path / "again").is_dir()
