"""A scaling study on the real stack: two models under two layouts, predicted and measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.planner.study import read_study, study_rows
from tests.end_to_end.conftest import PPO, ROOT


@pytest.fixture(scope="session")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model for the same task."""
    folder = tmp_path_factory.mktemp("wider") / "task"
    program = ROOT / "examples" / "arithmetic_cpu" / "task.py"
    subprocess.run(
        [sys.executable, str(program), str(folder), "--hidden", "128", "--heads", "4"], check=True, timeout=120
    )
    return folder / "model"


@pytest.mark.timeout(1000)  # four runs
def test_a_study_of_two_models_and_two_layouts_runs(
    train_command: Callable[..., list[str]], wider: Path, task: Path, tmp_path: Path
) -> None:
    small = ("steps=2", "ppo.critic_warmup_steps=0", "cluster.cpus_per_worker=0.3")
    shared = [word for word in train_command(*small) if "=" in word]
    shared = [word for word in shared if not word.startswith(("run_dir=", "model.path="))]
    models = {"narrow": task / "model", "wide": wider}
    layouts = {"one": ["policy.layout.tensor=1", "critic.layout.pipeline=1"], "tp2": ["critic.layout.pipeline=1"]}
    runs = "".join(
        f'[[runs]]\nname = "{model}_{layout}"\nsettings = {json.dumps([*shared, f"model.path={path}", *settings])}\n'
        for model, path in models.items()
        for layout, settings in layouts.items()
    )
    study = tmp_path / "study.toml"
    study.write_text(f'recipe = "{PPO}"\nfolder = "{tmp_path / "study"}"\n{runs}')

    command = [sys.executable, "-m", "megatron_rl", "scale", "run", str(study)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = study_rows(read_study(study))
    assert [row.name for row in rows] == ["narrow_one", "narrow_tp2", "wide_one", "wide_tp2"]
    assert [row.devices for row in rows] == [3, 4, 3, 4]
    for row in rows:
        assert row.measured_seconds is not None
        assert row.measured_seconds > 0
        assert row.measured_gib is not None
        assert row.predicted_gib == pytest.approx(row.measured_gib, rel=0.25)
        assert row.accuracy is not None
    assert rows[0].predicted_seconds == pytest.approx(rows[0].measured_seconds), "the first run calibrates"
    assert rows[0].predicted_gib == pytest.approx(rows[0].measured_gib)
    table = (tmp_path / "study" / "study.md").read_text()
    assert all(row.name in table for row in rows)
    assert table in done.stdout
    assert (tmp_path / "study" / "study.png").stat().st_size > 1000

    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert again.stdout == table, "runs that are done are not run again"
