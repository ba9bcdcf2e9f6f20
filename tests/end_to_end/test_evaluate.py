"""A run's own held-out evaluation and ``eval/run.py`` on its checkpoint are the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.end_to_end.conftest import PPO, ROOT, OneStep


@pytest.mark.timeout(900)
def test_a_checkpoint_is_evaluated_to_the_numbers_of_its_run(one_step: OneStep, task: Path, tmp_path: Path) -> None:
    run, rule = one_step.folder, one_step.rule
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(records) if "heldout/accuracy" in record)
    (tmp_path / "template.txt").write_text(tomllib.loads(PPO.read_text())["data"]["template"])
    command = [
        *(sys.executable, str(ROOT / "eval" / "run.py"), "--run", str(run), "--tasks", str(task / "heldout.jsonl")),
        *("--template", str(tmp_path / "template.txt"), "--max-tokens", "48", "--stop=", "--limit", "64"),
        *("--rule", rule, "--kv-cache-mib", "64"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "eval" / "step_000001" / "results.json").read_text())["results"]["heldout"]
    assert 0 < found["pass@1,none"] < 1
    for ours, of_run in (
        ("pass@1", "accuracy"),
        ("boxed", "format_rate"),
        ("score", "score"),
        ("length", "length_mean"),
        ("length_max", "length_max"),
        ("truncated", "truncation_rate"),
    ):
        assert found[f"{ours},none"] == last[f"heldout/{of_run}"], ours
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    assert "step_000001: complete, no engine started" in again.stderr
