"""Kill -9 at any moment of a save leaves a whole checkpoint, of the save in progress or the one before."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.checkpoints import check_whole, find_checkpoint

ROOT = Path(__file__).parents[2]
KILLS = 10


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_checkpoint_to_go_on_from(models: dict[str, Path], tmp_path: Path) -> None:
    draw = random.Random(0)
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-m", "tests.distributed.saving", str(folder), str(models["qwen2"])]
    grad_norms: dict[int, str] = {}
    left_behind, completed, resumed_from = 0, 0, 0
    save_s: float | None = None
    for _ in range(KILLS):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            lines = [run.stdout.readline()]

            def hear(word: str, run: subprocess.Popen[str] = run, lines: list[str] = lines) -> None:
                assert run.stdout is not None
                while not lines[-1].startswith(word):
                    assert lines[-1], "the run must not end by itself"
                    lines.append(run.stdout.readline())

            hear("save ")
            ranks = psutil.Process(run.pid).children()
            if save_s is None:  # what a run's first save takes here
                began = time.monotonic()
                hear("saved ")
                save_s = time.monotonic() - began
            else:
                time.sleep(draw.uniform(0.0, 1.5 * save_s))
            run.kill()
            lines += run.stdout.read().splitlines(keepends=True)
        assert psutil.wait_procs(ranks, timeout=10)[1] == []
        assert lines[0].split() == ["start", str(resumed_from)]
        words = [line.split() for line in lines if line.endswith("\n")]
        for _, step, norm in (line for line in words if line[0] == "update"):
            assert grad_norms.setdefault(int(step), norm) == norm, "a step that is done again gives the same"
        last = max(int(line[1]) for line in words if line[0] == "save")
        left_behind += any(folder.glob(".partial_*"))
        saved = find_checkpoint(folder)
        if saved is not None:
            check_whole(saved)
        completed += resumed_from < (saved.step if saved else 0)
        resumed_from = saved.step if saved else 0
        assert last - 1 <= resumed_from <= last
    assert left_behind >= KILLS // 3, "kills must have struck during saves"
    assert completed >= KILLS // 4, "and after them"
    assert len(grad_norms) > completed
