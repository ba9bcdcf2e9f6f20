"""The real parts on a tiny task, driven as a user drives them: by the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.end_to_end.leftovers import mark_this_run, our_processes, shared_memory

ROOT = Path(__file__).parents[2]
PPO = ROOT / "examples" / "arithmetic_cpu" / "ppo.toml"
_GRACE_S = 15
RULE = '''
from megatron_rl.dataflow import Score


def even(text, answer, finish):
    """An untrained model is never right; whether its text has an even length depends on every character."""
    return Score(value=float(len(text)), parts={"correct": float(len(text) % 2 == 0), "boxed": float("e" in text)})
'''

mark_this_run()


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arithmetic task with its random, untrained model."""
    folder = tmp_path_factory.mktemp("arithmetic") / "task"
    program = ROOT / "examples" / "arithmetic_cpu" / "task.py"
    subprocess.run([sys.executable, str(program), str(folder)], check=True, timeout=120)
    return folder


def command_of(task: Path, run: Path, *settings: str) -> list[str]:
    """The ``train`` command of a small run."""
    return [
        *[sys.executable, "-m", "megatron_rl", "train", str(PPO)],
        f"run_dir={run}",
        f"model.path={task / 'model'}",
        f"data.train={task / 'train.jsonl'}",
        f"data.heldout={task / 'heldout.jsonl'}",
        "prompts_per_step=16",
        "ppo.minibatch_samples=32",
        "evaluation.prompts=16",
        "parity.enabled=false",
        *settings,
    ]


@pytest.fixture
def train_command(task: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The ``train`` command of a small run in ``tmp_path/run``; more settings as arguments."""
    return partial(command_of, task, tmp_path / "run")


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """A run of one step whose user names no place for anything but the run.

    Attributes:
        folder: of the run.
        rule: that it scored with.
        home: of its user.
        temporary: where Python puts temporary files if nobody says where.
        new_in_tmp: what a library made that does not ask Python.
    """

    folder: Path
    rule: str
    home: Path
    temporary: Path
    new_in_tmp: set[Path]


@pytest.fixture(scope="session")
def one_step(task: Path, tmp_path_factory: pytest.TempPathFactory) -> OneStep:
    """At one rank each; by tests that look at different sides of it."""
    folder = tmp_path_factory.mktemp("one_step")
    home, temporary, rule = (folder / name for name in ("home", "temporary", "rule.py"))
    home.mkdir()
    temporary.mkdir()
    rule.write_text(RULE)
    placed = ("TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
    environment = {name: value for name, value in os.environ.items() if name not in placed}
    command = command_of(
        *(task, folder / "run", "steps=1", "policy.layout.tensor=1", "critic.layout.pipeline=1"),
        *("ppo.critic_warmup_steps=0", "evaluation.prompts=64", f"reward.rule={rule}:even"),
    )
    before = _in_tmp()
    with leaving_nothing():
        done = subprocess.run(
            command,
            env=environment | {"HOME": str(home), "TEMP": str(temporary)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return OneStep(
        folder=folder / "run",
        rule=f"{rule}:even",
        home=home,
        temporary=temporary,
        new_in_tmp=_in_tmp() - before,
    )


def _in_tmp() -> set[Path]:
    """What may be a run's: others use the folder too, under names that nobody can foresee."""
    names = ("torch", "vllm", "triton", "megatron", "matplotlib", "huggingface", "tokenizers", "xdg", "pymp")
    return {path for path in Path("/tmp").iterdir() if path.name.lstrip(".").startswith(names)}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every test leaves the processes and the shared memory that it found."""
    with leaving_nothing():
        yield


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """The block leaves the processes and the shared memory that it found."""
    before = our_processes() | shared_memory()
    yield
    end = time.monotonic() + _GRACE_S
    while left := (our_processes() | shared_memory()) - before:
        assert time.monotonic() < end, f"left behind: {sorted(map(str, left))}"
        time.sleep(0.2)
