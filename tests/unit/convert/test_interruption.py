"""Kill -9 and full disks: a conversion goes on to the same files, and nothing half-valid is left."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from megatron_rl import durable
from megatron_rl.convert import to_megatron
from megatron_rl.convert.processes import ProcessDied, Report, for_each_file
from megatron_rl.convert.sources import HfSource, MegatronSource, SourceDamaged
from megatron_rl.convert.target import Target
from megatron_rl.convert.to_hf import plan_export, run_export
from megatron_rl.weights import safetensors_io
from megatron_rl.weights.manifest import ShardRecord, read_back
from megatron_rl.weights.weight_map import WeightEntry
from tests.unit.convert.folders import export_plan, exported, folder_sums, ignore, imported, wide_model, write_model


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


Convert = Callable[..., Path]
"""Into a folder; resume=True goes on with one that was interrupted."""
Sums = dict[str, str]
"""Of each file of a folder."""


@pytest.fixture(params=["export", "import"])
def kind(request: pytest.FixtureRequest) -> str:
    """Of conversion."""
    return str(request.param)


@pytest.fixture
def convert(kind: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Of the wide model, into a dozen files."""
    if kind == "export":
        return partial(exported, checkpoint)
    monkeypatch.setattr(to_megatron, "_FILE_BYTES", 9 << 20)
    return partial(imported, checkpoint.parent / "hf")


@pytest.fixture(scope="module")
def sums_by_kind() -> dict[str, Sums]:
    return {}


@pytest.fixture
def expected(kind: str, convert: Convert, sums_by_kind: dict[str, Sums], tmp_path: Path) -> Sums:
    """What a conversion that nothing interrupts writes."""
    if kind not in sums_by_kind:
        sums_by_kind[kind] = folder_sums(convert(tmp_path / "unbroken"))
    return sums_by_kind[kind]


def kept_files(out: Path) -> list[Path]:
    """Those of the hidden folder that are complete."""
    work = Target(out).work
    return sorted(work / "model" / record.stem for record in work.glob("records/*.json"))


def stamp(file: Path) -> tuple[int, int]:
    """Which file it is, also where a new one gets the inode of one that is gone."""
    return file.stat().st_ino, file.stat().st_mtime_ns


def kill_and_resume(convert: Convert, tmp_path: Path, moments: int) -> None:
    began = time.monotonic()
    expected = folder_sums(convert(tmp_path / "unbroken"))
    whole_s = time.monotonic() - began
    draw = random.Random(0)
    struck, kept_some = 0, 0
    for moment in range(moments):
        out = tmp_path / f"out{moment}"
        struck += killed_after(draw.uniform(0.0, whole_s), lambda out=out: convert(out))
        kept_some += bool(kept_files(out))
        assert not out.exists() or folder_sums(out) == expected
        assert folder_sums(convert(out, resume=True)) == expected
        assert not Target(out).work.exists()
    assert struck >= moments // 2, "kills must have struck conversions that were under way"
    assert kept_some


def test_a_conversion_that_is_killed_once_a_file_is_complete_goes_on_to_the_same_files(
    convert: Convert, expected: Sums, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def work() -> None:
        Target.finish = lambda self: time.sleep(60)  # in this process alone: it is struck before its end
        convert(out)

    assert killed_after(0, work, once=lambda: bool(kept_files(out)))
    kept = {file.name: stamp(file) for file in kept_files(out)}
    assert kept
    assert folder_sums(convert(out, resume=True)) == expected
    assert kept.items() <= {path.name: stamp(path) for path in out.iterdir()}.items()
    assert not Target(out).work.exists()


@pytest.mark.slow
def test_a_conversion_that_is_killed_at_any_moment_goes_on_to_the_same_files(convert: Convert, tmp_path: Path) -> None:
    kill_and_resume(convert, tmp_path, 20)


def test_a_resumed_conversion_keeps_what_is_complete_and_writes_again_what_is_damaged(
    convert: Convert, expected: Sums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    killed_at_its_last_act(convert, out, monkeypatch)
    first, second, third = kept_files(out)[:3]
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    third.unlink()
    before = (stamp(first), stamp(second))
    convert(out, resume=True)
    assert folder_sums(out) == expected
    assert stamp(out / first.name) == before[0]
    assert stamp(out / second.name) != before[1]


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
    with pytest.raises(
        ValueError, match=r"was interrupted .* had another .*--shard-size; give the same ones, or remove"
    ):
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


@pytest.mark.parametrize("kind", ["export"], indirect=True)
def test_a_full_disk_ends_an_export_which_goes_on_when_there_is_room(
    checkpoint: Path, expected: Sums, tmp_path: Path, small_disk: list[int]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(OSError, match=r"out/model-0.* could not be written \(No space left on device\).*--resume"):
        exported(checkpoint, out)
    assert not out.exists()
    left = {path.suffix for path in Target(out).model.iterdir()}
    assert left <= {".safetensors"}, "no configuration, index or manifest makes it look like a model"
    small_disk[0] = 1 << 40
    exported(checkpoint, out, resume=True)
    assert folder_sums(out) == expected


def test_a_disk_that_is_full_for_what_is_no_weights_leaves_complete_files_alone(
    convert: Convert, expected: Sums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> list[str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        for module in ("to_hf", "to_megatron"):
            patch.setattr(f"megatron_rl.convert.{module}.copy_tokenizer", full)
        with pytest.raises(
            OSError, match=r"out could not be written \(No space left on device\); .* go on with --resume"
        ):
            convert(out)
    assert not out.exists()
    kept = {file.name: stamp(file) for file in Target(out).model.iterdir()}
    assert sorted(kept) == [file.name for file in kept_files(out)]
    assert kept, "files that are complete"
    convert(out, resume=True)
    assert kept.items() <= {path.name: stamp(path) for path in out.iterdir()}.items()
    assert folder_sums(out) == expected


def test_a_tokenizer_that_cannot_be_read_is_not_told_as_a_full_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "hf")
    read_bytes = Path.read_bytes

    def unreadable(path: Path) -> bytes:
        if path == source / "tokenizer.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read_bytes(path)

    megatron = imported(source, tmp_path / "megatron")
    for work in (
        lambda: imported(source, tmp_path / "out"),
        lambda: run_export(
            plan_export(megatron, like=source, shard_bytes=9 << 20),
            Target(tmp_path / "out"),
            resume=False,
            processes=2,
            progress=ignore,
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", unreadable)
            with pytest.raises(OSError, match=r"hf/tokenizer.json could not be read \(Input/output error\)"):
                work()
        assert not (tmp_path / "out").exists()
        shutil.rmtree(Target(tmp_path / "out").work)


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


def killed_at_its_last_act(convert: Convert, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hidden model folder of a conversion of which all files are written, without its manifest."""
    with monkeypatch.context() as patch:
        patch.setattr(Target, "finish", lambda self: os._exit(9))
        assert os.waitpid(forked(lambda: convert(out)), 0)[1] != 0
    model = Target(out).model
    (model / "manifest.json").unlink()
    return model


def test_a_source_that_cannot_be_read_is_told_as_such_and_complete_files_stay(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at_its_last_act(partial(exported, checkpoint), tmp_path / "out", monkeypatch)
    first, second = kept_files(tmp_path / "out")[:2]
    second.unlink()

    def unreadable(self: MegatronSource, entry: WeightEntry) -> list[tuple[str, Tensor]]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(checkpoint / "__0_0.distcp"))

    with monkeypatch.context() as patch:
        patch.setattr(MegatronSource, "hf_tensors", unreadable)
        with pytest.raises(OSError, match=r"megatron/__0_0.distcp could not be read \(Input/output error\).*--resume"):
            exported(checkpoint, tmp_path / "out", resume=True)
    assert first.is_file()


UNREADABLE = ["", "{}", "[]", '{"tensors": {"x": {}}}', '{"record": {}, "places": [[1, 2]]}', "\xff"]


@pytest.mark.parametrize(
    ("kind", "content"),
    [*(("import", content) for content in UNREADABLE), ("export", '{"tensors": {"x": {}}}')],
    indirect=["kind"],
)
def test_a_file_whose_record_cannot_be_read_is_written_anew_and_no_other_one_is(
    convert: Convert, expected: Sums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    out = tmp_path / "out"
    killed_at_its_last_act(convert, out, monkeypatch)
    first, second = kept_files(out)[:2]
    (Target(out).work / "records" / f"{second.name}.json").write_bytes(content.encode("latin-1"))
    before = (stamp(first), stamp(second))
    convert(out, resume=True)
    assert folder_sums(out) == expected
    assert stamp(out / first.name) == before[0]
    assert stamp(out / second.name) != before[1]


def test_a_full_disk_ends_an_import_which_goes_on_when_there_is_room(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_megatron, "_FILE_BYTES", 5 << 20)  # the first one is larger, by an embedding
    source, out = checkpoint.parent / "hf", tmp_path / "out"
    read = HfSource.tensor

    def late(self: HfSource, entry: WeightEntry) -> Tensor:
        if entry == self.weights.entries[0]:
            wait_until(lambda: bool(kept_files(out)))
        return read(self, entry)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7 << 20, before[1]))  # what a full disk is to a writer
    monkeypatch.setattr(HfSource, "tensor", late)
    try:
        with pytest.raises(OSError, match=r"out/__0_0.distcp could not be written \(File too large\).*--resume"):
            imported(source, out)
    finally:
        monkeypatch.setattr(HfSource, "tensor", read)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not out.exists()
    kept = {file.name: stamp(file) for file in Target(out).model.iterdir()}
    assert kept, "files that are complete"
    assert sorted(kept) == [file.name for file in kept_files(out)]
    imported(source, out, resume=True)
    assert kept.items() <= {path.name: stamp(path) for path in out.iterdir()}.items()
    assert folder_sums(out) == folder_sums(imported(source, tmp_path / "unbroken"))


def test_an_interrupted_import_of_what_has_changed_since_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(checkpoint.parent / "hf", source)
    killed_at_its_last_act(partial(imported, source), out, monkeypatch)
    with pytest.raises(FileExistsError, match="was interrupted; go on with --resume, or remove it"):
        imported(source, out)
    refused = pytest.raises(ValueError, match=r"import that was interrupted in .* had another model, --dtype or --proc")
    with refused:
        imported(source, out, processes=3, resume=True)
    with refused:
        imported(source, out, dtype=torch.float32, resume=True)
    os.utime(source / "model.safetensors")  # as whoever writes other weights of the same sizes
    with refused:
        imported(source, out, resume=True)
    shutil.rmtree(Target(out).work)
    assert (imported(source, out) / "manifest.json").is_file()


def test_an_import_is_the_same_each_time_and_an_export_tells_it_from_that_of_a_changed_model(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf")
    first, again = imported(source, tmp_path / "first"), imported(source, tmp_path / "again")
    assert folder_sums(first) == folder_sums(again)
    assert export_plan(first).digest == export_plan(again).digest
    os.utime(source / "model.safetensors", ns=(0, 0))  # as whoever writes other weights of the same sizes
    assert export_plan(imported(source, tmp_path / "other")).digest != export_plan(first).digest


def test_a_source_that_an_import_cannot_read_is_told_as_such_and_a_damaged_one_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint.parent / "hf", tmp_path / "out"

    def failing(error: Exception) -> Callable[..., Tensor]:
        def tensor(self: HfSource, entry: WeightEntry) -> Tensor:
            raise error

        return tensor

    monkeypatch.setattr(HfSource, "tensor", failing(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(OSError, match=r"wide\d/hf could not be read \(Input/output error\).*--resume"):
        imported(source, out)
    assert not out.exists()
    monkeypatch.setattr(HfSource, "tensor", failing(ValueError("model.safetensors must hold x")))
    with pytest.raises(SourceDamaged, match=r"model.safetensors must hold x"):
        imported(source, out, resume=True)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def _commands_handler() -> Iterator[None]:
    """A process is begun with its parent's handlers: the commands have one for SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_commands_handler")
def test_a_killed_process_is_told_and_its_like_end_too(tmp_path: Path) -> None:
    """At once, whatever the others are at; with the process, the signal and the tensor."""

    def die(number: int, report: Report) -> None:
        report.at(f"tensor {number}")
        if number < 2:
            time.sleep(60)
        os.kill(os.getpid(), dying)

    before = psutil.Process().children()
    for dying, told in (
        (signal.SIGKILL, r"\(SIGKILL\), at tensor 2; look for the kernel's out-of-memory killer \(dmesg\)"),
        (signal.SIGTERM, r"\(SIGTERM\), at tensor 2$"),
    ):
        began = time.monotonic()
        with pytest.raises(ProcessDied, match=rf"^process \d of 3 \(pid \d+\) was killed by signal {dying} {told}"):
            for_each_file(9, die, processes=3, progress=ignore)
        assert time.monotonic() - began < 20
        assert psutil.Process().children() == before


def test_a_process_that_fails_is_told_and_its_like_end_at_once(tmp_path: Path) -> None:
    def fail(number: int, report: Report) -> None:
        report.at(f"tensor {number}")
        if number != 1:
            time.sleep(60)
        raise MemoryError("no more")

    before, began = psutil.Process().children(), time.monotonic()
    with pytest.raises(MemoryError, match="no more") as raised:
        for_each_file(9, fail, processes=2, progress=ignore)
    assert time.monotonic() - began < 20
    assert re.fullmatch("process [01] of 2, at tensor 1", raised.value.__notes__[0])
    assert "in fail" in str(raised.value.__cause__)
    assert psutil.Process().children() == before


class _Deadly(int):
    """A number at which its process dies when it is added to another one."""

    def __radd__(self, other: int) -> int:
        time.sleep(1.0)  # the parent asks for the count meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
        return other


@pytest.mark.timeout(60)
def test_a_process_that_is_killed_while_it_counts_keeps_nobody_waiting() -> None:
    with pytest.raises(ProcessDied, match=r"\(SIGKILL\), at its start; "):
        for_each_file(4, lambda number, report: report.moved(_Deadly(1)), processes=2, progress=ignore)


def test_a_process_that_leaves_in_the_midst_of_a_message_is_told() -> None:
    def half(number: int, report: Report) -> None:
        os.write(report._pipe.fileno(), (100).to_bytes(4, "big") + b"half")
        os._exit(3)

    with pytest.raises(ProcessDied, match=r"exited with code 3, at its start$"):
        for_each_file(2, half, processes=1, progress=ignore)


def test_every_file_is_given_out_once_and_all_bytes_are_told() -> None:
    told: list[int] = []

    def work(number: int, report: Report) -> int:
        report.moved(number)
        return number

    assert for_each_file(500, work, processes=4, progress=told.append) == [*range(500)]
    assert told[-1] == sum(range(500))


def test_a_process_that_leaves_without_a_word_is_told() -> None:
    with pytest.raises(ProcessDied, match=r"exited with code 0, at its start$"):
        for_each_file(2, lambda number, report: os._exit(0), processes=1, progress=ignore)


@pytest.mark.parametrize("kind", ["export"], indirect=True)
def test_an_export_of_which_a_process_is_killed_names_its_tensor_ends_at_once_and_goes_on(
    checkpoint: Path, expected: Sums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = MegatronSource.hf_tensors

    def strike(self: MegatronSource, entry: WeightEntry) -> list[tuple[str, Tensor]]:
        if entry.hf == ("model.layers.5.self_attn.o_proj.weight",):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, entry)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(MegatronSource, "hf_tensors", strike)
        with pytest.raises(ProcessDied, match=r"\(SIGKILL\), at model.layers.5.self_attn.o_proj.weight; "):
            exported(checkpoint, out)
    assert not out.exists()
    assert kept_files(out)
    assert folder_sums(exported(checkpoint, out, resume=True)) == expected


def test_ctrl_c_ends_a_conversion_at_once_and_its_processes_with_it(tmp_path: Path) -> None:
    def slow(number: int, report: Report) -> None:
        (tmp_path / f"{number}").touch()
        time.sleep(1.0)

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
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


def sampled_peaks(work: Callable[[], object], log: Path) -> list[int]:
    """Largest anonymous and shared memory of each process that ``work`` starts, beyond what this process has, bytes.

    They are looked at from here, and each leaves in ``log`` what it has whenever it reports: this process may get its
    turn too late.
    """

    def held(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem")))

    def telling(report: Callable[..., None]) -> Callable[..., None]:
        def told(self: Report, *args: Any) -> None:
            with log.open("a") as file:
                file.write(f"{os.getpid()} {held(os.getpid())}\n")
            report(self, *args)

        return told

    def telling_work() -> None:
        Report.at, Report.moved = telling(Report.at), telling(Report.moved)  # in this process and its own alone
        work()

    before = held(os.getpid())
    leader = forked(telling_work)
    peaks: dict[int, int] = {}
    while os.waitpid(leader, os.WNOHANG) == (0, 0):
        for process in [psutil.Process(leader), *psutil.Process(leader).children()]:
            try:
                peaks[process.pid] = max(peaks.get(process.pid, 0), held(process.pid) - before)
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue
        time.sleep(0.001)
    for pid, size in (map(int, line.split()) for line in log.read_text().splitlines()):
        peaks[pid] = max(peaks.get(pid, 0), size - before)
    return list(peaks.values())


def test_memory_does_not_grow_with_the_model(checkpoint: Path, tmp_path: Path) -> None:
    largest = export_plan(checkpoint).summary().largest_bytes
    total = export_plan(checkpoint).summary().written_bytes
    slack = 24 << 20  # of the GiB that is promised
    assert total > 2 * (largest + slack), "a copy of one process's half of the model must show"
    embedding = 8192 * 512 * 2
    assert largest == 2 * embedding
    widened = export_plan(checkpoint, dtype=torch.float32).summary()
    assert widened.largest_bytes == 3 * embedding  # float32 beside what was read
    assert "the largest tensor, as it is read and as it is written, 24.0 MiB" in str(widened)
    for work, processes in (
        (lambda: exported(checkpoint, tmp_path / "out", shard_bytes=60 << 20), 5),  # two of them compare sums first
        (lambda: imported(tmp_path / "out", tmp_path / "again"), 3),
    ):
        peaks = sampled_peaks(work, tmp_path / f"log{processes}")
        assert len(peaks) == processes
        assert max(peaks) <= largest + slack
    assert (tmp_path / "again").is_dir()
