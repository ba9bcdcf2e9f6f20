"""The checks that need no GPU run here in their small form, each as the process that it is on one."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import Check, run_check
from benchmarks.gpu_checks import steps
from benchmarks.gpu_checks.case import Case
from benchmarks.gpu_checks.plan import Result, Row
from benchmarks.gpu_checks.steps import ppo_rows

ROOT = Path(__file__).parents[3]


def run(tmp_path: Path, *arguments: str, timeout: float = 240) -> tuple[int, dict[str, Any]]:
    """Exit status, and the results by check."""
    file = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=timeout, check=False)
    return done.returncode, {result["check"]: result for result in json.loads(file.read_text())}


def test_one_rank_checks_run(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    names = ("ceilings", "logprobs", "attention", "training", "training_fp8")
    status, found = run(tmp_path, "--only", *names, "--table", str(table))
    assert {name: result["status"] for name, result in found.items()} == dict.fromkeys(names, "passed"), found
    assert status == 0
    rows = {row["what"]: row for name in names for row in found[name]["rows"]}
    assert rows["tiny: loss fell"]["value"] == 1
    assert 0 < rows["tiny torch: mean distance from float64"]["value"] < 0.03
    assert 0 < rows["tiny ragged: dk, relative error"]["value"] < 0.01
    assert rows["tiny blockwise: largest relative loss difference"]["value"] > 0
    assert "## training" in table.read_text()


def test_layouts_of_two_ranks_agree_with_one(tmp_path: Path) -> None:
    status, found = run(tmp_path, "--gpus", "2", "--only", "layouts")
    assert (status, found["layouts"]["status"]) == (0, "passed"), found
    rows = [row["what"] for row in found["layouts"]["rows"]]
    assert rows.pop(0).startswith("TP2xPP2 is left out: it needs --gpus 4")
    assert len(rows) == 8  # two heads, TP2 and PP2, losses and norms


def test_what_needs_a_gpu_is_named_and_left_out(tmp_path: Path) -> None:
    status, found = run(tmp_path, "--only", "ppo_fp8", "layouts_fp8")
    assert {name: (result["status"], result["reason"]) for name, result in found.items()} == {
        "ppo_fp8": ("skipped", "needs a GPU"),
        "layouts_fp8": ("skipped", "needs a GPU"),
    }
    assert status == 0


STUCK = """
import sys, time
from benchmarks import gpu
from benchmarks.gpu_checks.plan import Row

def stuck(case):
    yield Row(what="first", value=1.0, unit="")
    yield Row(what="second", value=2.0, unit="s", goal="at most 1", met=False)
    yield Row(what="first", value=3.0, unit="")
    time.sleep(600)

gpu.measures = lambda: {"stuck": stuck}
gpu.main(sys.argv[1:])
"""


def test_a_check_that_takes_too_long_is_ended_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = tmp_path / "stuck.py"
    program.write_text(STUCK)
    told: list[Result] = []
    check = Check(name="stuck", about="", planned_s=1)
    found = run_check(check, 0, 1, limit_s=6.0, scratch=tmp_path, tell=told.append, program=program)
    assert found.status == "overrun"
    assert found.reason.startswith("not done within 6 s, 2 figures until then")
    assert [(row.what, row.value) for row in found.rows] == [("first", 3.0), ("second", 2.0)]
    assert [result.status for result in told] == ["running"] * len(told) != []
    assert told[-1].rows == found.rows


def test_a_check_that_raises_is_told(tmp_path: Path) -> None:
    check = Check(name="no_such_check", about="", planned_s=1)
    found = run_check(check, gpus=0, asked_gpus=1, limit_s=30.0, scratch=tmp_path)
    assert found.status == "failed"
    assert "no_such_check" in found.reason


STEP = {
    "kind": "step",
    "push/bytes": 1e9,
    "push/transfer_s": 1.0,
    "push/probe_mean_abs": 0.001,
    "experience/engine_gap_mean": 0.002,
    "experience/engine_gap_max": 0.1,
}


def test_a_run_is_read_for_its_push_gap_and_phases() -> None:
    records = [
        {"kind": "evaluation", "parity/trainer-engine/mean": 0.003},
        STEP | {"push/probe_mean_abs": 1.0, "experience/engine_gap_mean": 1.0},
        STEP
        | {
            "push/bytes": 3e9,
            "push/transfer_s": 2.0,
            "push/probe_mean_abs": 0.004,
            "experience/engine_gap_mean": 0.03,
            "experience/engine_gap_max": 0.7,
            "seconds/push": 2.5,
            "memory/push/gib": 7.0,
        },
    ]
    rows = {row.what: row for row in ppo_rows(records, copy_gbps=3000.0, gap_bound=0.02, on_gpu=True)}
    assert rows["steps done"].value == 2
    assert rows["push: transfer"].value == pytest.approx(1.5)
    assert (rows["push: transfer"].goal, rows["push: transfer"].met) == ("at least 750", False)
    gap = rows["gap of trainer and engine on the probe, mean"]
    assert (gap.value, gap.met) == (0.004, True)
    drawn = rows["gap of trainer and engine on sampled tokens, mean"]
    assert (drawn.value, drawn.goal, drawn.met) == (0.03, "at most 0.02", False)
    most = rows["gap of trainer and engine on sampled tokens, max"]
    assert (most.value, most.goal) == (0.7, "")
    assert rows["seconds: push"].value == 2.5
    assert rows["parity/trainer-engine/mean"].value == 0.003
    assert rows["memory/push/gib"].value == 7.0


def left_after_sleep(gib: float | None, *, on_gpu: bool) -> Row | None:
    """The row of a run whose device has so much in use when everybody is away."""
    step = STEP | ({} if gib is None else {"memory/train/engine/measured": gib, "memory/train/policy/measured": 40.0})
    rows = {row.what: row for row in ppo_rows([step], copy_gbps=None, gap_bound=1.0, on_gpu=on_gpu)}
    return rows.get("left after sleep")


def test_what_sleep_leaves_on_a_gpu_is_held_against_a_bound() -> None:
    good, bad = left_after_sleep(1.5, on_gpu=True), left_after_sleep(4.7, on_gpu=True)
    assert good is not None
    assert bad is not None
    assert (good.value, good.unit) == (pytest.approx(1.5 * 1.073741824), "GB")
    assert (good.goal, good.met) == ("at most 5, good below 2", True)
    assert bad.met is False  # 4.7 GiB are 5.05 GB
    small = left_after_sleep(9.0, on_gpu=False)
    assert small is not None
    assert (small.goal, small.met) == ("", None)
    assert left_after_sleep(None, on_gpu=True) is None  # nobody shares


def test_seconds_of_taking_turns_are_told() -> None:
    spent = {"engine/sleep": 0.2, "engine/wake": 0.3, "policy/offload": 0.4, "critic/onload": 0.5, "policy/update": 9.0}
    step = STEP | {f"busy_s/{name}": seconds for name, seconds in spent.items()}
    found = ppo_rows([step], copy_gbps=None, gap_bound=1.0, on_gpu=True)
    told = {row.what: row.value for row in found if row.what.startswith("busy_s")}
    assert told == {f"busy_s: {name}": seconds for name, seconds in spent.items() if name != "policy/update"}


TRAINS = (
    f"STEP = {STEP}"
    + """
import json, sys, time
from pathlib import Path

asked = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
folder = Path(asked["run_dir"])
folder.mkdir()
with (folder / "metrics.jsonl").open("w") as file:
    for number in (1, 2):
        file.write(json.dumps(STEP | {"seconds/update": number}) + "\\n")
        file.flush()
        while not (folder / f"go {number}").exists():
            time.sleep(0.05)
    file.write(json.dumps({"kind": "step", "aborted": True}) + "\\n")
print("said last")
sys.exit(3)
"""
)


def test_each_step_of_a_run_is_told_while_it_goes_on_and_its_end_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "TRAIN", (sys.executable, "-c", TRAINS))
    found = steps.ppo(Case(gpus=0, asked_gpus=1, scratch=tmp_path))
    for number in (1, 2):
        rows = {row.what: row.value for row in itertools.islice(found, 6)}
        assert (rows["steps done"], rows["seconds: update"]) == (number, number)
        (tmp_path / "ppo" / f"go {number}").touch()
    left: list[Row] = []
    with pytest.raises(RuntimeError, match="ended with 3; its last lines are above"):
        left.extend(found)
    assert all(row.value == 2 for row in left if row.what == "steps done")  # the last one was cut off
    assert capfd.readouterr().out == "said last\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "plans"])
def test_what_takes_longer_runs(tmp_path: Path, name: str) -> None:
    """Whole PPO steps; updates beside the plan."""
    status, found = run(tmp_path, "--only", name, timeout=200)
    assert (status, found[name]["status"]) == (0, "passed"), found
