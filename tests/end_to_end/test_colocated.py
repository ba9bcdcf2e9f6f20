"""Trainers and engine on the same devices: the numbers are those of a run where each has its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.faulty import STRUCK, with_fault
from tests.end_to_end.test_train import process_of, records, wait_for_step

TIMED = ("seconds/", "busy_s/", "peak_rss_gib/", "tokens_per_s/", "memory/", "time", "eta_s", "checkpoint/")
LAYOUT = ("policy.layout.tensor=1", "critic.layout.pipeline=1", "ppo.critic_warmup_steps=0")
Command = Callable[..., list[str]]


def numbers(run: Path) -> list[dict[str, float]]:
    """What a run computed: its metrics without times and memory."""
    return [
        {key: value for key, value in record.items() if not key.startswith(TIMED) and not key.endswith("_s")}
        for record in records(run)
    ]


@pytest.mark.slow
def test_sharing_devices_changes_no_number(train_command: Command, tmp_path: Path) -> None:
    settings = (*LAYOUT, "steps=3", "evaluation.every=2", "checkpoint.every=2", "parity.enabled=true")
    for name, colocate in (("apart", "false"), ("together", "true")):
        command = train_command(*settings, f"cluster.colocate={colocate}", f"run_dir={tmp_path / name}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = done.stdout.count("memory in GiB, planned / measured: ")
        assert lines == (3 if name == "together" else 0), done.stdout
    apart, together = numbers(tmp_path / "apart"), numbers(tmp_path / "together")
    assert [record["step"] for record in apart] == [0, 0, 1, 2]
    assert apart == together
    assert (tmp_path / "apart" / "samples.jsonl").read_text() == (tmp_path / "together" / "samples.jsonl").read_text()
    last = records(tmp_path / "together")[-1]
    planned = {key: value for key, value in last.items() if key.startswith("memory/") and key.endswith("/planned")}
    assert planned["memory/train/engine/planned"] == 0
    assert planned["memory/generate/policy/planned"] == 0
    assert planned["memory/train/policy/planned"] > 3 * planned["memory/push/policy/planned"] > 0
    assert planned["memory/generate/engine/planned"] > planned["memory/push/engine/planned"] > 0
    assert all(last[key.replace("planned", "measured")] > 0 for key in planned)


@pytest.mark.slow
def test_a_rank_that_dies_while_another_has_the_device_ends_the_run(train_command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = train_command(*LAYOUT, "steps=500", "cluster.colocate=true")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(run, process)
        critic = process_of(run, "critic")
        os.kill(critic, signal.SIGKILL)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert f"critic (pid {critic} on " in errors
    assert re.search(r"its last phase: (idle after )?(offload|onload|values|update|save)", errors), json.dumps(errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("awake", "verb", "asleep", "phase"),
    [
        ("policy rank 0", "update", "engine", "sleep"),
        ("engine", "generate", "policy", "offload"),
        ("engine", "generate", "critic", "offload"),
    ],
)
def test_a_death_while_asleep_is_told_at_once(
    train_command: Command, tmp_path: Path, awake: str, verb: str, asleep: str, phase: str
) -> None:
    run = tmp_path / "run"
    command = with_fault((awake, verb, f"kill {asleep}"), train_command(*LAYOUT, "steps=500", "cluster.colocate=true"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    seconds = time.time() - (run / "logs" / STRUCK).stat().st_mtime
    assert done.returncode == 1
    assert re.search(
        rf"{asleep} \(pid {process_of(run, asleep)} on .*\) was killed by signal 9 .*"
        rf"its last phase: idle after {phase}",
        done.stderr,
    ), done.stderr
    assert seconds < 30, "long before any deadline of a call"
