"""The real parts on a tiny task, driven as a user drives them: by the command line."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.leftovers import mark_this_run, our_processes, shared_memory

ROOT = Path(__file__).parents[2]
PPO = ROOT / "examples" / "arithmetic_cpu" / "ppo.toml"
_GRACE_S = 15

mark_this_run()


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arithmetic task with its random, untrained model."""
    folder = tmp_path_factory.mktemp("arithmetic") / "task"
    program = ROOT / "examples" / "arithmetic_cpu" / "task.py"
    subprocess.run([sys.executable, str(program), str(folder)], check=True, timeout=120)
    return folder


@pytest.fixture
def train_command(task: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The ``train`` command of a small run in ``tmp_path/run``; more settings as arguments."""

    def command(*settings: str) -> list[str]:
        return [
            *[sys.executable, "-m", "megatron_rl", "train", str(PPO)],
            f"run_dir={tmp_path / 'run'}",
            f"model.path={task / 'model'}",
            f"data.train={task / 'train.jsonl'}",
            f"data.heldout={task / 'heldout.jsonl'}",
            "prompts_per_step=16",
            "ppo.minibatch_samples=32",
            "evaluation.prompts=16",
            "parity.enabled=false",
            *settings,
        ]

    return command


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test leaves the processes and the shared memory that it found."""
    before = our_processes() | shared_memory()
    yield
    end = time.monotonic() + _GRACE_S
    while left := (our_processes() | shared_memory()) - before:
        assert time.monotonic() < end, f"left behind: {sorted(map(str, left))}"
        time.sleep(0.2)
