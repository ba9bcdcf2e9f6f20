"""Checkpoints of a run: what is on the disk at each moment, what is trusted, and what is said of the rest."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rl import checkpoints as module
from megatron_rl.checkpoints import (
    CheckpointProblem,
    RunCheckpoints,
    RunIdentity,
    check_same_run,
    check_whole,
    find_checkpoint,
)
from megatron_rl.durable import FileRecord, read_record
from tests.fakes import FileModel

IDENTITY = RunIdentity(
    model={"layers": 2, "eos_ids": (3,)},
    prompts="abc",
    settings={"seed": 0, "policy.optimizer.lr": 1e-3, "policy.layout.tensor": 2, "ppo.clip_low": 0.2, "steps": 6},
)


class Cursor:
    """A part of the driver."""

    taken = 0

    def state(self) -> dict[str, int]:
        return {"taken": self.taken}

    def restore(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class ResponseLengths:
    """A part that runs did not save in the beginning."""

    means: Any = None

    def state(self) -> Any:
        return self.means

    def restore(self, state: Any) -> None:
        self.means = state


class Saver:
    """A run's checkpoints with what they save."""

    def __init__(
        self,
        folder: Path,
        *,
        asynchronous: bool = True,
        keep: int = 2,
        keep_weights: int = 0,
        has_critic: bool = True,
        identity: RunIdentity = IDENTITY,
    ) -> None:
        self.policy, self.critic, self.cursor = FileModel(), FileModel(), Cursor()
        self.checkpoints = RunCheckpoints(
            folder,
            keep=keep,
            keep_weights=keep_weights,
            asynchronous=asynchronous,
            models={"policy": self.policy} | ({"critic": self.critic} if has_critic else {}),
            parts={"prompts": self.cursor},
            like=folder,
            identity=identity,
        )

    def save(self, step: int, accuracy: float | None = None, *, wait: bool = True) -> dict[str, float]:
        self.policy.value, self.critic.value, self.cursor.taken = step, 10 * step, 100 * step
        return self.checkpoints.save(step, accuracy, wait=wait)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def saver(folder: Path) -> Iterator[Saver]:
    made = Saver(folder)
    made.checkpoints.start(find_checkpoint(folder))
    yield made
    made.policy.gate.set()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


WHOLE = ["critic/weights.txt", "hf/model.safetensors", "manifest.json", "policy/weights.txt", "state.json"]
WEIGHTS = ["hf/model.safetensors", "manifest.json", "state.json"]


def weights_keeper(folder: Path, identity: RunIdentity = IDENTITY) -> Saver:
    saver = Saver(folder, keep=2, keep_weights=2, identity=identity)
    saver.checkpoints.start(find_checkpoint(folder))
    return saver


def test_of_older_checkpoints_the_weights_are_kept(folder: Path) -> None:
    saver = weights_keeper(folder)
    for step in range(1, 7):
        saver.save(step)
    assert names(folder) == ["latest", "step_000003", "step_000004", "step_000005", "step_000006"]
    assert [files(folder / f"step_00000{step}") for step in (3, 4, 5, 6)] == [WEIGHTS, WEIGHTS, WHOLE, WHOLE]
    assert (folder / "step_000003/hf/model.safetensors").read_text() == "3"
    (name,) = module.sums_of(folder / "step_000003/hf")
    assert name == "model.safetensors"
    assert module.kept_weights(folder / "step_000003/policy") == folder / "step_000003/hf"
    for there in ("step_000003/hf", "step_000006/policy", "step_000009/policy"):
        assert module.kept_weights(folder / there) is None
    for foreign in ("null", "1", '["state.json"]', '{"state.json": {}, "policy/weights.txt": {}}'):
        (folder / "manifest.json").write_text(foreign)
        assert module.kept_weights(folder / "policy") is None
    (folder / "manifest.json").unlink()
    saved = find_checkpoint(folder)
    assert saved is not None
    check_whole(saved)
    assert Saver(folder).checkpoints.start(saved) == 6


def kept(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(folder.glob("step_*"))]


def test_the_weights_that_are_kept_are_the_best_and_the_newest_also_after_a_resume(folder: Path) -> None:
    saver = weights_keeper(folder)
    for step, accuracy in enumerate((0.2, 0.6, 0.4, None, 0.5, 0.3), start=1):
        saver.save(step, accuracy)
    assert kept(folder) == [2, 4, 5, 6]
    assert [files(folder / f"step_00000{step}") for step in (2, 4, 5, 6)] == [WEIGHTS, WEIGHTS, WHOLE, WHOLE]
    saver = weights_keeper(folder)
    saver.save(7, 0.6)
    assert kept(folder) == [2, 5, 6, 7]
    for step in (8, 9):
        saver.save(step)
    assert kept(folder) == [6, 7, 8, 9], "of equals the newest is the best"


@pytest.mark.parametrize(
    "changed", [{"heldout": "other"}, {"settings": {**IDENTITY.settings, "evaluation.temperature": 0.6}}]
)
def test_an_accuracy_of_something_else_keeps_no_weights(changed: Any, folder: Path) -> None:
    saver = weights_keeper(folder)
    for step, accuracy in enumerate((0.9, 0.1, 0.1, 0.1), start=1):
        saver.save(step, accuracy)
    assert kept(folder) == [1, 2, 3, 4]
    saver = weights_keeper(folder, dataclasses.replace(IDENTITY, **changed))
    saver.save(5, 0.2)
    assert kept(folder) == [2, 3, 4, 5]
    for step in (6, 7, 8):
        saver.save(step, 0.1)
    assert kept(folder) == [5, 6, 7, 8]


def test_a_checkpoint_that_is_older_than_accuracies_is_taken_up(folder: Path) -> None:
    weights_keeper(folder).save(1)
    state = json.loads((folder / "step_000001/state.json").read_text())
    assert state.pop("accuracies") == {}
    (folder / "step_000001/state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "step_000001/manifest.json").read_text())
    manifest["state.json"] = dataclasses.asdict(read_record(folder / "step_000001/state.json"))
    (folder / "step_000001/manifest.json").write_text(json.dumps(manifest))
    saver = weights_keeper(folder)
    for step in (2, 3, 4, 5):
        saver.save(step, 0.5)
    assert kept(folder) == [2, 3, 4, 5]


def test_weights_alone_are_kept_also_of_what_a_run_saved_when_it_had_a_critic(folder: Path) -> None:
    weights_keeper(folder).save(1)
    (folder / "step_000001/notes").mkdir()
    (folder / "step_000001/notes/mine.txt").touch()
    saver = Saver(folder, keep=2, keep_weights=2, has_critic=False)
    saver.checkpoints.start(find_checkpoint(folder))
    for step in (2, 3):
        saver.save(step)
    assert files(folder / "step_000001") == sorted([*WEIGHTS, "notes/mine.txt"])


def test_no_run_goes_on_from_weights_alone(folder: Path) -> None:
    saver = weights_keeper(folder)
    for step in range(1, 5):
        saver.save(step)
    (folder / "step_000003/critic/weights.txt").unlink()
    (folder / "step_000004/policy/weights.txt").unlink()
    saved = find_checkpoint(folder)
    assert saved is not None
    with pytest.raises(CheckpointProblem, match="no earlier checkpoint is whole"):
        check_whole(saved)
    saver.save(5)
    (folder / "latest").write_text("step_000002\n")
    told = r"no run can go on from \S+step_000002, .* weights alone \(hf/\); step_000005 is whole: .* write step_000005"
    with pytest.raises(CheckpointProblem, match=told):
        find_checkpoint(folder)


@pytest.mark.parametrize("failing", ["rename", "rmtree"])
def test_a_removal_that_stops_half_way_leaves_weights_and_is_finished_later(
    failing: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = weights_keeper(folder)
    for step in (1, 2):
        saver.save(step)

    def fail(path: Any, *rest: Any, **options: Any) -> Any:
        if "critic" in str(path):
            raise OSError(5, "Input/output error")
        return original(path, *rest, **options)

    owner: Any = Path if failing == "rename" else module.shutil
    original = getattr(owner, failing)
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, fail)
        saver.save(3)
    assert "step_000001 is not needed any more and cannot be removed" in caplog.text
    (folder / "latest").write_text("step_000001\n")
    with pytest.raises(CheckpointProblem, match="weights alone"):
        find_checkpoint(folder)
    (folder / "latest").write_text("step_000003\n")
    saver.save(4)
    assert names(folder) == ["latest", "step_000001", "step_000002", "step_000003", "step_000004"]
    assert files(folder / "step_000001") == files(folder / "step_000002") == WEIGHTS
    assert (folder / "step_000001/hf/model.safetensors").read_text() == "1"


def test_everything_is_taken_up_again(saver: Saver, folder: Path) -> None:
    saver.save(3)
    saved = find_checkpoint(folder)
    assert saved is not None
    assert (saved.step, saved.folder) == (3, folder / "step_000003")
    other = Saver(folder)
    assert other.checkpoints.start(saved) == 3
    assert (other.policy.value, other.critic.value, other.cursor.taken) == (3, 30, 300)
    assert (saved.folder / "hf/model.safetensors").read_text() == "3"


def test_the_manifest_sums_every_file_but_itself(saver: Saver, folder: Path) -> None:
    saver.save(3)
    manifest = json.loads((folder / "step_000003/manifest.json").read_text())
    files = {str(p.relative_to(folder / "step_000003")) for p in (folder / "step_000003").rglob("*") if p.is_file()}
    assert set(manifest) == files - {"manifest.json"}
    assert manifest["policy/weights.txt"]["size_bytes"] == 100
    for name, record in manifest.items():
        assert read_record(folder / "step_000003" / name) == FileRecord(**record)


def test_the_last_few_are_kept(saver: Saver, folder: Path) -> None:
    for step in (1, 2, 9, 10):
        saver.save(step)
    assert names(folder) == ["latest", "step_000009", "step_000010"]
    assert (folder / "latest").read_text() == "step_000010\n"


def test_training_goes_on_while_files_are_written_and_nobody_trusts_them_before_the_end(
    saver: Saver, folder: Path
) -> None:
    saver.save(1)
    saver.policy.gate.clear()
    assert "write_s" not in saver.save(2, wait=False)
    assert names(folder) == [".partial_000002", "latest", "step_000001"]
    saved = find_checkpoint(folder)
    assert saved is not None
    assert saved.step == 1
    saver.policy.value = 77  # training moves on; what was copied stays
    saver.policy.gate.set()
    end = time.monotonic() + 10
    while (folder / "latest").read_text() != "step_000002\n":
        assert time.monotonic() < end
        time.sleep(0.01)
    assert (folder / "step_000002/policy/weights.txt").read_text() == "2" * 100
    metrics = saver.save(3, wait=False)
    assert metrics["write_s"] > 0
    assert metrics["size_mib"] > 0


def test_the_next_save_waits_for_the_one_before(saver: Saver, folder: Path) -> None:
    saver.save(1, wait=False)
    saver.save(2)
    assert names(folder) == ["latest", "step_000001", "step_000002"]


def test_without_asynchronous_a_save_is_complete_when_it_returns(folder: Path) -> None:
    saver = Saver(folder, asynchronous=False)
    saver.checkpoints.start(None)
    assert saver.save(1, wait=False)["write_s"] > 0
    assert (folder / "latest").read_text() == "step_000001\n"


def test_what_a_killed_save_left_is_removed_and_never_taken_for_complete(saver: Saver, folder: Path) -> None:
    saver.save(4)
    (folder / ".partial_000005/policy").mkdir(parents=True)
    (folder / "step_000004").rename(folder / "step_000006")  # renamed, and killed before `latest` moved
    saver.checkpoints.start(None)
    assert names(folder) == ["latest"]
    assert find_checkpoint(folder) is None
    saver.save(1)
    (folder / "step_000001").rename(folder / "aside")
    saver.save(2)
    (folder / "latest").write_text("step_000001\n")
    (folder / "aside").rename(folder / "step_000001")
    assert saver.checkpoints.start(find_checkpoint(folder)) == 1
    assert names(folder) == ["latest", "step_000001"]


def test_a_folder_that_a_rank_does_not_share_is_refused_before_anything_is_changed(saver: Saver, folder: Path) -> None:
    saver.save(1)
    (folder / ".partial_000002").mkdir()
    before = names(folder)
    other = Saver(folder)
    other.policy.blind, other.critic.blind = ["policy rank 1 on b"], ["critic rank 0 on b", "critic rank 1 on c"]
    with pytest.raises(CheckpointProblem) as refused:
        other.checkpoints.start(find_checkpoint(folder))
    assert f"{folder} must be one folder" in str(refused.value)
    assert "policy rank 1 on b, critic rank 0 on b, critic rank 1 on c: name a run_dir" in str(refused.value)
    assert names(folder) == before


@pytest.mark.parametrize("keep", [1, 2])
def test_names_of_the_users_own_are_left_alone_and_steps_count_by_number(keep: int, folder: Path) -> None:
    own = {"step_000020_best", "step_best", "step_20", "step_0000020", ".partial_mine"}
    saver = Saver(folder, keep=keep)
    saver.checkpoints.start(None)
    for name in own:
        (folder / name).mkdir()
    saver.save(999_999)
    saver.save(1_000_000)
    kept = {"step_999999", "step_1000000"} if keep == 2 else {"step_1000000"}
    assert {*names(folder)} == {"latest", *kept, *own}
    assert Saver(folder).checkpoints.start(find_checkpoint(folder)) == 1_000_000
    assert {*names(folder)} == {"latest", *kept, *own}
    cut(folder / "step_1000000/policy/weights.txt")
    saved = find_checkpoint(folder)
    assert saved is not None
    with pytest.raises(CheckpointProblem, match="step_999999 is whole" if keep == 2 else "no earlier checkpoint"):
        check_whole(saved)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Folders whose names end so cannot be removed, as where NFS keeps an open file."""
    found: set[str] = set()
    remove = module.shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors and any(path.name.endswith(end) for end in found):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(module.shutil, "rmtree", rmtree)
    return found


def test_a_save_is_good_where_an_older_one_cannot_be_removed_which_is_told_once_and_tried_again(
    folder: Path, stuck: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    stuck.add("10")
    saver = Saver(folder, keep=1)
    saver.checkpoints.start(None)
    for step in (10, 20, 30):
        assert "write_s" in saver.save(step)
    assert names(folder) == [".partial_000010", "latest", "step_000030"]
    (told,) = caplog.messages
    assert "step_000010 is not needed any more and cannot be removed: [Errno 39] Directory not empty" in told
    again = Saver(folder, keep=1)
    assert again.checkpoints.start(find_checkpoint(folder)) == 30
    stuck.clear()
    again.save(40)
    assert names(folder) == ["latest", "step_000040"]


def test_what_cannot_be_removed_is_in_the_way_of_the_step_of_its_name_alone(folder: Path, stuck: set[str]) -> None:
    saver = Saver(folder, keep=1)
    saver.checkpoints.start(None)
    saver.save(10)
    for left in ("step_000012", ".partial_000013"):
        (folder / left).mkdir()
    stuck |= {"12", "13"}
    again = Saver(folder, keep=1)
    assert again.checkpoints.start(find_checkpoint(folder)) == 10
    again.save(11)
    assert names(folder) == [".partial_000012", ".partial_000013", "latest", "step_000011"]
    with pytest.raises(OSError, match="Directory not empty") as failure:
        again.save(13)
    assert "while the checkpoint step_000013 was saved" in failure.value.__notes__[0]
    stuck.clear()
    again.save(13)
    assert names(folder) == ["latest", "step_000013"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut, "weights.txt must have 200 bytes, has 199"),
        (flip, "weights.txt was changed: its xxh3 is not that of the manifest"),
        (Path.unlink, "weights.txt is missing"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_on(saver: Saver, folder: Path, spoil: Any, says: str) -> None:
    saver.checkpoints._keep = 3
    for step in (8, 9, 11):
        saver.save(step)
    spoil(folder / "step_000011/policy/weights.txt")
    cut(folder / "step_000009/critic/weights.txt")
    found = find_checkpoint(folder)
    assert found is not None
    with pytest.raises(CheckpointProblem) as problem:
        check_whole(found)
    remedy = f"step_000008 is whole: to go on from it, write step_000008 into {folder}/latest"
    assert f"step_000011 is damaged; {remedy}" in str(problem.value)
    assert says in str(problem.value)
    (folder / "latest").write_text("step_000008")
    saved = find_checkpoint(folder)
    assert saved is not None
    assert saved.step == 8


def test_without_an_earlier_one_the_way_on_is_to_start_anew(saver: Saver, folder: Path) -> None:
    saver.save(1)
    cut(folder / "step_000001/state.json")
    with pytest.raises(
        CheckpointProblem, match=r"no earlier checkpoint is whole: start anew(.|\n)*state\.json must have"
    ):
        find_checkpoint(folder)


def test_a_marker_that_is_gone_is_not_taken_for_a_fresh_start(saver: Saver, folder: Path) -> None:
    saver.save(1)
    (folder / "latest").unlink()
    with pytest.raises(CheckpointProblem, match=r"must have a file 'latest' .* found step_000001"):
        find_checkpoint(folder)


def test_a_failed_write_fails_the_next_save_with_its_cause_and_the_one_before_stays(saver: Saver, folder: Path) -> None:
    saver.save(1)
    saver.policy.error = OSError(errno.ENOSPC, "No space left on device")
    saver.save(2, wait=False)
    with pytest.raises(OSError, match="No space left on device") as failure:
        saver.save(3, wait=False)
    (note,) = failure.value.__notes__
    assert "while the checkpoint step_000002 was saved; the newest whole one" in note
    assert "step_000001; free on that disk at the time: " in note
    assert names(folder) == ["latest", "step_000001"], "the room that it took is given back"
    saved = find_checkpoint(folder)
    assert saved is not None
    assert saved.step == 1


def test_a_run_that_fails_still_completes_what_it_saved(saver: Saver, folder: Path) -> None:
    saver.policy.gate.clear()
    with pytest.raises(ValueError, match="of the loop"), saver.checkpoints:  # noqa: PT012
        saver.save(1, wait=False)
        saver.policy.gate.set()
        raise ValueError("of the loop")
    assert (folder / "latest").read_text() == "step_000001\n"


def test_an_interrupt_does_not_wait_for_the_disk(saver: Saver, folder: Path) -> None:
    saver.policy.gate.clear()
    with pytest.raises(KeyboardInterrupt) as interrupt, saver.checkpoints:  # noqa: PT012
        saver.save(1, wait=False)
        raise KeyboardInterrupt
    assert "a checkpoint was under way" in interrupt.value.__notes__[0]
    assert find_checkpoint(folder) is None


def test_a_failing_run_says_why_and_that_it_waits_and_an_interrupt_then_ends_the_save(
    saver: Saver, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver.policy.gate.clear()
    with pytest.raises(KeyboardInterrupt) as interrupt, saver.checkpoints:  # noqa: PT012
        saver.save(1, wait=False)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        raise ValueError("of the loop")
    assert caplog.messages == [
        "ValueError: of the loop\nwaiting until the checkpoint under way is on the disk; Ctrl-C leaves it"
    ]
    assert str(interrupt.value.__context__) == "of the loop"
    assert interrupt.value.__notes__ == [
        "a checkpoint was under way and could not be completed: the run was interrupted"
    ]
    for thread in [thread for thread in threading.enumerate() if thread.name == "checkpoint"]:
        thread.join(timeout=10)
        assert not thread.is_alive(), "it would ask for workers that are gone"
    assert names(folder) == ["latest"]


def changed(**settings: Any) -> RunIdentity:
    return dataclasses.replace(IDENTITY, settings={**IDENTITY.settings, **settings})


def test_a_checkpoint_older_than_a_part_gives_it_the_state_that_a_run_begins_with(saver: Saver, folder: Path) -> None:
    saver.save(3)
    saved = find_checkpoint(folder)
    assert saved is not None
    engines, cursor = ResponseLengths(), Cursor()
    checkpoints = RunCheckpoints(
        folder, keep=2, asynchronous=True, models={}, parts={"prompts": cursor, "engines": engines}, like=folder,
        identity=IDENTITY,
    )  # fmt: skip
    assert checkpoints.start(saved) == 3
    assert (cursor.taken, engines.means) == (300, [])
    newer = dataclasses.replace(saved, parts={**saved.parts, "engines": [["math", 3, 0.1]]})
    checkpoints.start(newer)
    assert engines.means == [["math", 3, 0.1]]
    with pytest.raises(KeyError, match="prompts"):
        checkpoints.start(dataclasses.replace(saved, parts={}))


def test_another_run_is_refused_with_all_reasons_at_once(saver: Saver, folder: Path) -> None:
    saver.save(1)
    saved = find_checkpoint(folder)
    assert saved is not None
    other = RunIdentity(
        model={"layers": 4, "eos_ids": (3,)},
        prompts="abd",
        settings={**IDENTITY.settings, "seed": 1, "policy.optimizer.lr": 2e-3},
    )
    with pytest.raises(CheckpointProblem) as problem:
        check_same_run(saved, other, {})
    assert [line.strip() for line in str(problem.value).splitlines()[1:]] == [
        "seed: was 0, is 1; the order of prompts and every sample are drawn from it",
        "model.path: another model, layers was 2, is 4",
        "data.train: other prompts (or another template or limit); the position in the data is lost",
    ]


def test_a_supervised_stage_is_told_of_other_rows_and_may_be_laid_out_otherwise(saver: Saver, folder: Path) -> None:
    settings = {"data": "a.jsonl", "output": "a", "samples_per_step": 4, "trainer.layout.tensor": 2}
    identity = RunIdentity(model={}, prompts="abc", settings=settings)
    saver.save(1)
    found = find_checkpoint(folder)
    assert found is not None
    saved = dataclasses.replace(found, identity=identity)
    moved = dataclasses.replace(identity, settings=settings | {"output": "b", "trainer.layout.tensor": 1})
    assert check_same_run(saved, moved, {}) == []
    other = RunIdentity(model={}, prompts="abd", settings=settings | {"samples_per_step": 8})
    with pytest.raises(CheckpointProblem) as problem:
        check_same_run(saved, other, {})
    assert [line.strip() for line in str(problem.value).splitlines()[1:]] == [
        "samples_per_step: was 4, is 8; the learning-rate schedule and the position in the data count by it",
        "data: other rows (or another template or limit); the position in the data is lost",
    ]


def test_the_layout_may_change_in_silence_and_the_algorithm_with_a_word(saver: Saver, folder: Path) -> None:
    saver.save(1)
    saved = find_checkpoint(folder)
    assert saved is not None
    assert check_same_run(saved, IDENTITY, {}) == []
    assert check_same_run(saved, changed(**{"policy.layout.tensor": 1}), {}) == []
    assert check_same_run(saved, changed(**{"policy.layout.expert": 2, "policy.optimizer_on_host": True}), {}) == []
    assert check_same_run(saved, changed(**{"ppo.clip_low": 0.3, "steps": 9}), {}) == [
        "ppo.clip_low was 0.2, is 0.3",
        "steps was 6, is 9",
    ]
    assert check_same_run(saved, changed(**{"policy.optimizer.lr": 2e-3, "steps": 9}), {}) == [
        "policy.optimizer.lr was 0.001, is 0.002",
        "steps was 6, is 9",
    ]


def test_a_setting_that_a_checkpoint_is_older_than_had_its_default(saver: Saver, folder: Path) -> None:
    saver.save(1)
    saved = find_checkpoint(folder)
    assert saved is not None
    later = {"prompts_per_step": 8, "policy.optimizer.eps": 1e-8, "policy.fp8.recipe": "blockwise"}
    assert check_same_run(saved, changed(**later), later) == ["policy.fp8.recipe was None, is 'blockwise'"]
    assert check_same_run(saved, changed(**{"policy.optimizer.eps": 1e-6}), later) == [
        "policy.optimizer.eps was 1e-08, is 1e-06"
    ]
    with pytest.raises(CheckpointProblem, match="prompts_per_step: was 8, is 16"):
        check_same_run(saved, changed(prompts_per_step=16), later)


def test_other_held_out_prompts_are_told_where_the_checkpoint_knows_its_own(saver: Saver, folder: Path) -> None:
    saver.save(1)
    found = find_checkpoint(folder)
    assert found is not None
    mine = dataclasses.replace(IDENTITY, heldout="abc")
    assert check_same_run(found, mine, {}) == [], "a checkpoint from before that"
    saved = dataclasses.replace(found, identity=mine)
    assert check_same_run(saved, mine, {}) == []
    (told,) = check_same_run(saved, dataclasses.replace(IDENTITY, heldout="abd"), {})
    assert told.startswith("other held-out prompts ")


def test_what_is_no_setting_any_more_is_no_reason_to_refuse(saver: Saver, folder: Path) -> None:
    saver.save(1)
    saved = find_checkpoint(folder)
    assert saved is not None
    settings = {name: value for name, value in IDENTITY.settings.items() if name != "seed"}
    assert check_same_run(saved, dataclasses.replace(IDENTITY, settings=settings), {}) == []


def test_every_setting_that_is_spoken_of_exists() -> None:
    from megatron_rl.config.load import _keys
    from megatron_rl.config.schema import RunConfig, SFTConfig

    known = {key for root in (RunConfig, SFTConfig) for key, _ in _keys(root)}
    assert {*module._FIXED, *module._MACHINE} <= known
