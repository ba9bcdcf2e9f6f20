"""On a machine with a GPU: every check of ``benchmarks/gpu.py`` for one GPU meets its goals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_checks.plan import CHECKS
from megatron_rl.device import has_cuda

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_cuda(), reason="needs a GPU")]
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [check.name for check in CHECKS if check.gpus == 1])
def test_goals_are_met(tmp_path: Path, name: str) -> None:
    file, table = tmp_path / "results.json", tmp_path / "table.md"
    command = [sys.executable, "benchmarks/gpu.py", "--only", name, "--minutes", "4.5"]
    command += ["--json", str(file), "--table", str(table)]
    subprocess.run(command, cwd=ROOT, check=False)
    (result,) = json.loads(file.read_text())
    if result["status"] == "skipped":
        pytest.skip(result["reason"])
    assert result["status"] == "passed", result["reason"]
