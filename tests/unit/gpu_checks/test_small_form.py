"""The checks that need no GPU run here in their small form, each as the process that it is on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import Check, run_check
from benchmarks.gpu_checks.measure import ppo_rows

ROOT = Path(__file__).parents[3]


def run(tmp_path: Path, *arguments: str, timeout: float = 120) -> tuple[int, dict[str, Any]]:
    """Exit status, and the results by check."""
    file = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=timeout, check=False)
    return done.returncode, {result["check"]: result for result in json.loads(file.read_text())}


def test_one_rank_checks_run(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    names = ("ceilings", "logprobs", "attention", "training")
    status, found = run(tmp_path, "--only", *names, "--table", str(table))
    assert {name: result["status"] for name, result in found.items()} == dict.fromkeys(names, "passed"), found
    assert status == 0
    rows = {row["what"]: row for name in names for row in found[name]["rows"]}
    assert rows["tiny: loss fell"]["value"] == 1
    assert 0 < rows["tiny torch: mean distance from float64"]["value"] < 0.03
    assert 0 < rows["tiny ragged: dk, relative error"]["value"] < 0.01
    assert "## training" in table.read_text()


def test_layouts_of_two_ranks_agree_with_one(tmp_path: Path) -> None:
    status, found = run(tmp_path, "--gpus", "2", "--only", "layouts")
    assert (status, found["layouts"]["status"]) == (0, "passed"), found
    assert len(found["layouts"]["rows"]) == 8  # two heads, TP2 and PP2, losses and norms


def test_what_needs_a_gpu_is_named_and_left_out(tmp_path: Path) -> None:
    status, found = run(tmp_path, "--only", "training_fp8", "ppo_fp8")
    assert {name: (result["status"], result["reason"]) for name, result in found.items()} == {
        "training_fp8": ("skipped", "needs a GPU"),
        "ppo_fp8": ("skipped", "needs a GPU"),
    }
    assert status == 0


def test_a_check_that_takes_too_long_is_ended_and_told() -> None:
    found = run_check(Check(name="training", about="", deadline_s=0.1), gpus=0, asked_gpus=1)
    assert found.status == "failed"
    assert found.reason.startswith("not done within 0.1 s")


def test_a_check_that_raises_is_told() -> None:
    found = run_check(Check(name="no_such_check", about="", deadline_s=30), gpus=0, asked_gpus=1)
    assert found.status == "failed"
    assert "no_such_check" in found.reason


def test_a_run_is_read_for_its_push_gap_and_phases() -> None:
    records = [
        {"kind": "evaluation", "parity/trainer-engine/mean": 0.003},
        {"kind": "step", "push/bytes": 1.0, "push/transfer_s": 1.0, "push/probe_mean_abs": 1.0},
        {
            "kind": "step",
            "push/bytes": 3e9,
            "push/transfer_s": 2.0,
            "push/probe_mean_abs": 0.004,
            "seconds/push": 2.5,
            "memory/push/gib": 7.0,
        },
    ]
    rows = {row.what: row for row in ppo_rows(records, copy_gbps=3000.0, gap_bound=0.02)}
    assert rows["push: transfer"].value == pytest.approx(1.5)
    assert (rows["push: transfer"].goal, rows["push: transfer"].met) == ("at least 750", False)
    gap = rows["gap of trainer and engine on the probe, mean"]
    assert (gap.value, gap.met) == (0.004, True)
    assert rows["seconds: push"].value == 2.5
    assert rows["parity/trainer-engine/mean"].value == 0.003
    assert rows["memory/push/gib"].value == 7.0


@pytest.mark.slow
def test_whole_ppo_steps_run(tmp_path: Path) -> None:
    status, found = run(tmp_path, "--only", "ppo", timeout=200)
    assert (status, found["ppo"]["status"]) == (0, "passed"), found
