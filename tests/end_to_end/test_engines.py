"""Real engines that are killed in the middle of a rollout: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import PPO
from tests.end_to_end.test_train import process_of, records

GRPO = PPO.with_name("grpo.toml")
SAME = ("rollout/", "experience/", "policy/", "heldout/", "push/bytes", "push/probe")


def small(train_command: Callable[..., list[str]], run: Path, *settings: str) -> list[str]:
    """Two steps; responses are long, so that there is a middle of a rollout."""
    words = train_command("policy.layout.tensor=1", "steps=2", "rollout.max_response_tokens=300", *settings)
    return [str(GRPO) if word == str(PPO) else word for word in words] + [f"run_dir={run}"]


def busy(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def second_worker(engine: int) -> int:
    """Of a tensor-parallel engine."""
    children = psutil.Process(engine).children()
    _, second = sorted(child.pid for child in children if "VLLM::Worker" in " ".join(child.cmdline()))
    return second


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engines", "name", "struck", "says"),
    [
        ("engine.count=2", "engine rank 1", lambda engine: engine, "signal 9"),
        (
            "engine.tensor=2",
            "engine",
            second_worker,
            r"tensor-parallel worker rank 1 \(pid STRUCK\) was killed by signal 9",
        ),
    ],
    ids=["engine", "worker of an engine"],
)
def test_an_engine_killed_in_a_rollout_changes_no_sample(
    train_command: Callable[..., list[str]],
    tmp_path: Path,
    engines: str,
    name: str,
    struck: Callable[[int], int],
    says: str,
) -> None:
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    subprocess.run(small(train_command, whole, engines), check=True, capture_output=True, timeout=400)
    command = small(train_command, hurt, engines, "engine.restarts=1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not records(hurt):  # of the evaluation before the first step, whose rollout comes next
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        engine = process_of(hurt, name)
        start = busy(engine)
        while busy(engine) < start + 0.3:
            time.sleep(0.01)
        victim = struck(engine)
        os.kill(victim, signal.SIGKILL)
        output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert f"{name} (pid {engine} on " in output
    assert re.search(says.replace("STRUCK", str(victim)), output), output
    assert "its last phase: generate" in output
    assert process_of(hurt, name) != engine
    assert (hurt / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    before, after = ([r for r in records(run) if "rollout/score" in r] for run in (whole, hurt))
    assert len(before) == len(after) == 2
    for one, other in zip(before, after, strict=True):
        assert {k: v for k, v in one.items() if k.startswith(SAME)} == {
            k: v for k, v in other.items() if k.startswith(SAME)
        }, json.dumps(other)
