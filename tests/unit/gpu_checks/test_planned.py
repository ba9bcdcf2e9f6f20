"""The planner held against GPUs: which settings, what is compared, what has a goal. What ranks take is made up here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import planner
from benchmarks.gpu_checks import planned
from benchmarks.gpu_checks.case import Case
from benchmarks.gpu_checks.planned import planner_device
from benchmarks.gpu_checks.trainings import Job, Trained
from benchmarks.planner import GPU_SETTINGS, SETTINGS, Amounts, Setting, compared, predicted, settings_for
from megatron_rl.planner.devices import DEVICES
from tests.unit.gpu_checks.test_trainings import sizes_alone

ROOT = Path(__file__).parents[3]
BASE_BYTES, FACTOR = 3 * 2**30, 1.7
"""What these ranks hold beyond the plan, and how much slower than it they are."""


class Ranks:
    """Take what the plan says and the same on top of it in every setting, but for one that is spoilt."""

    def __init__(self) -> None:
        self.processes: list[int] = []
        self.spoilt = ""

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Trained]:
        worlds = {job.trainer.layout.world_size for job in jobs}
        self.processes += worlds
        assert len(worlds) == 1
        for job in jobs:
            asked = (planner.job(one, one.write_model(job.model.parent), 5) for one in GPU_SETTINGS)
            setting = GPU_SETTINGS[list(asked).index(job)]
            said = predicted(setting, job.model, "h100")
            slower, more = (1.3, 2 * 2**30) if setting.name == self.spoilt else (1.0, 0)
            seconds = [99.0, 99.0, *[said.seconds * FACTOR * slower] * (job.updates - 2)]
            yield Trained(losses=[1.0], norms=[1.0], seconds=seconds, peak_bytes=round(said.held) + BASE_BYTES + more)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    found = Ranks()
    monkeypatch.setattr(planner, "train", found)
    monkeypatch.setattr("examples.arithmetic_cpu.task.write_model", sizes_alone)
    return found


def test_a_gpu_has_six_settings_beside_the_one_that_calibrates_and_more_where_there_are_more() -> None:
    alone, two = settings_for("h100", 1), settings_for("h100", 2)
    assert len(alone) >= 7
    assert {setting.ranks for setting in alone} == {1}
    assert [setting.name for setting in two[len(alone) :]] == ["TP2 SP", "PP2", "DP2"]
    assert {setting.dtype for setting in two} == {"bfloat16"}
    assert settings_for("cpu", 0) == SETTINGS


def test_settings_fit_the_smallest_gpu_and_hold_gigabytes(ranks: Ranks, tmp_path: Path) -> None:
    for setting in GPU_SETTINGS:
        held = predicted(setting, setting.write_model(tmp_path), "h100").held
        assert 2e9 < held < 0.5 * DEVICES["a100-80g"].memory, setting.name


def test_the_first_setting_calibrates_the_others(ranks: Ranks, tmp_path: Path) -> None:
    ranks.spoilt = "8 layers"
    found = {one.setting.name: one for one in compared("h100", settings_for("h100", 2), tmp_path, 5)}
    assert ranks.processes == [1, 2], "each number of ranks starts once"
    assert len(found) == len(GPU_SETTINGS)
    first = found["calibration"]
    assert first.said.held - first.plan.held == pytest.approx(BASE_BYTES, abs=1)
    assert first.said.seconds / first.plan.seconds == pytest.approx(FACTOR)
    spoilt = found.pop("8 layers")
    for one in found.values():
        assert one.time_error == pytest.approx(0, abs=1e-6)
        assert one.memory_error == pytest.approx(0, abs=1e-6)
        assert one.within("h100")
    assert spoilt.time_error == pytest.approx(1 / 1.3 - 1)
    assert spoilt.memory_error == pytest.approx(-2 * 2**30 / spoilt.found.held)
    assert not spoilt.within("h100")


def test_seconds_of_a_gpu_may_be_a_fifth_off_and_those_of_a_cpu_a_quarter() -> None:
    found = Amounts(seconds=1.0, held=1.0)
    one = planner.Comparison(setting=Setting(name="x"), plan=found, said=Amounts(seconds=1.22, held=1.09), found=found)
    assert (one.within("cpu"), one.within("h100")) == (True, False)
    assert not replace(one, said=Amounts(seconds=1.0, held=0.89)).within("cpu")


def test_what_is_said_of_a_gpu_are_wall_seconds_with_the_bubble(ranks: Ranks, tmp_path: Path) -> None:
    by_name = {setting.name: setting for setting in GPU_SETTINGS}
    model = by_name["calibration"].write_model(tmp_path)
    said = {name: predicted(by_name[name], model, "h100").seconds for name in ("calibration", "PP2", "DP2")}
    assert said["calibration"] / 2 < said["PP2"] < said["calibration"]
    assert said["calibration"] / 2 < said["DP2"] < said["calibration"]
    # products alone: 3 x 2 FLOPs a weight and token; 989 TFLOP/s of which 70 % are reached
    weights = 4 * (4 * 2048**2 + 3 * 2048 * 6144) + 2048 * 16384
    assert said["calibration"] > 6 * weights * 32768 / (0.7 * 989e12)


def test_a_gpu_is_known_by_its_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100-80g",
        "NVIDIA A100-SXM4-40GB": None,
        "NVIDIA GH200 480GB": None,
    }
    assert {name: planner_device(name) for name in names} == names


def test_the_check_has_goals_for_all_but_the_setting_that_calibrates(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    ranks.spoilt = "32 rows"
    rows = {row.what: row for row in planned.plans(Case(gpus=1, asked_gpus=1, scratch=tmp_path))}
    assert len(rows) == 6 * len(settings_for("h100", 1))
    errors = {what: row for what, row in rows.items() if what.endswith("relative error")}
    assert {row.met for what, row in errors.items() if what.startswith("calibration")} == {None}
    assert {what for what, row in errors.items() if row.met is False} == {
        "32 rows: seconds, relative error",
        "32 rows: GiB of a rank, relative error",
    }
    assert errors["8 layers: seconds, relative error"].goal == "at most 0.2"
    assert errors["8 layers: GiB of a rank, relative error"].goal == "at most 0.1"


def test_a_gpu_that_the_planner_does_not_know_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA L40S")
    (row,) = planned.plans(Case(gpus=1, asked_gpus=1, scratch=tmp_path))
    assert row.what.startswith("left out: the planner has no NVIDIA L40S")


def test_a_gpu_that_is_not_there_is_not_measured() -> None:
    command = [sys.executable, "benchmarks/planner.py", "--device", "h100"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--device h100 is measured on a GPU, and torch sees none here" in done.stderr
