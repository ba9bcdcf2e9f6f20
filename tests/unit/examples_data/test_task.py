"""The embedded task takes the place of an earlier one, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.arithmetic_cpu.task import Sizes, prepare


def test_a_folder_that_holds_more_than_a_task_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("train.jsonl", "checkpoints", "curve.png"):
        (tmp_path / name).touch()
    with pytest.raises(FileExistsError, match=r"or hold an earlier task alone; found checkpoints, curve\.png$"):
        prepare(tmp_path, Sizes(), seed=0)
    assert len(list(tmp_path.iterdir())) == 3
