"""A run that is killed, or asked to stop, goes on as if nothing had been: the same numbers to the last bit."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_rl.checkpoints import find_checkpoint
from tests.end_to_end.test_train import wait_for_step

Command = Callable[..., list[str]]
ONE_RANK = ("policy.layout.tensor=1", "critic.layout.pipeline=1")
SIX_STEPS = ("steps=6", "ppo.critic_warmup_steps=1", "checkpoint.every=1")
OF_THE_MACHINE = re.compile("time$|eta_s|seconds/|busy_s/|tokens_per_s/|peak_rss_gib/|checkpoint/")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def computed(run: Path) -> list[dict[str, float]]:
    """What each step computed: its metrics without times and memory."""
    steps = [row for row in lines(run / "metrics.jsonl") if row["kind"] == "step"]
    return [{key: value for key, value in row.items() if not OF_THE_MACHINE.match(key)} for row in steps]


def finish(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_in_step_4(command: list[str], run: Path) -> None:
    """Kill -9 the driver once the checkpoint of step 3 is there; nothing of the run may outlive it."""
    latest = run / "checkpoints" / "latest"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 200
        while not latest.is_file() or latest.read_text() != "step_000003\n":
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
        started = psutil.Process(process.pid).children(recursive=True)
        assert {"raylet", "gcs_server"} <= {child.name() for child in started}
        process.kill()
    _, alive = psutil.wait_procs(started, timeout=15)
    assert not alive, alive


def test_a_killed_run_goes_on_with_the_same_numbers_to_the_last_bit(train_command: Command, tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finish(train_command(*SIX_STEPS, *ONE_RANK, f"run_dir={unbroken}"))
    command = train_command(*SIX_STEPS, *ONE_RANK, f"run_dir={broken}")
    kill_in_step_4(command, broken)
    kept = [row["time"] for row in lines(broken / "metrics.jsonl") if row["step"] < 3]
    said = finish(command)

    assert "going on from" in said
    assert "after step 3 of 6" in said
    assert [row["step"] for row in computed(broken)] == list(range(6))
    assert [row["time"] for row in lines(broken / "metrics.jsonl")][: len(kept)] == kept
    assert computed(broken) == computed(unbroken)
    assert lines(broken / "samples.jsonl") == lines(unbroken / "samples.jsonl")
    manifests = [json.loads((run / "checkpoints/step_000006/manifest.json").read_text()) for run in (unbroken, broken)]
    for model in ("policy", "critic"):
        name = f"{model}/__0_0.distcp"  # weights, main weights, both moments
        assert manifests[0][name] == manifests[1][name]
    assert manifests[0]["hf/model.safetensors"] == manifests[1]["hf/model.safetensors"]


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model's checkpoint, whole, whatever layout wrote it."""
    import torch.distributed.checkpoint as torch_checkpoint

    reader = torch_checkpoint.FileSystemReader(folder)
    listed = reader.read_metadata().state_dict_metadata.items()
    tensors = {name: torch.empty(kind.size) for name, kind in listed if hasattr(kind, "size")}
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.mark.slow
def test_a_killed_run_goes_on_at_another_layout(train_command: Command, tmp_path: Path) -> None:
    """From TP2 to PP2: rounding alone may differ."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    settings = (*SIX_STEPS, "critic.layout.pipeline=1")
    finish(train_command(*settings, f"run_dir={unbroken}"))
    kill_in_step_4(train_command(*settings, f"run_dir={broken}"), broken)
    finish(train_command(*settings, f"run_dir={broken}", "policy.layout.tensor=1", "policy.layout.pipeline=2"))

    assert lines(broken / "samples.jsonl") == lines(unbroken / "samples.jsonl")
    for got, want in zip(computed(broken), computed(unbroken), strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    expected = saved_tensors(unbroken / "checkpoints/step_000006/policy")
    moments = [name for name in expected if "exp_avg" in name]
    assert len(moments) == 2 * sum(name.startswith(("decoder.", "embedding.", "output_layer.")) for name in expected)
    for name, tensor in saved_tensors(broken / "checkpoints/step_000006/policy").items():
        gap = float((tensor - expected[name]).norm() / expected[name].norm())
        assert gap < 1e-4, (name, gap)


def test_sigterm_finishes_the_step_saves_it_and_exits_well(train_command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = train_command("steps=500", *ONE_RANK)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(run, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert "asked to stop: finishing this step and saving it" in errors
    saved = find_checkpoint(run / "checkpoints")
    assert saved is not None
    assert saved.step == computed(run)[-1]["step"] + 1
    assert not any(row.get("aborted") for row in lines(run / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["seed=1"], "seed: was 0, is 1; the order of prompts and every sample are drawn from it"),
        (["rollout.samples_per_prompt=2"], "rollout.samples_per_prompt: was 4, is 2"),
        (["data.max_prompt_tokens=22"], "data.train: other prompts"),
        (["model.path={wider}"], "model.path: another model, ffn_hidden was 192, is 256"),
        (["policy.layout.tensor=64"], "possible: [1, 2]"),
        (["--fresh"], "--fresh needs an empty folder"),
    ],
)
def test_what_cannot_be_resumed_is_told_before_anything_starts(
    train_command: Command, stopped_run: Path, wider: Path, settings: list[str], says: str
) -> None:
    command = train_command(f"run_dir={stopped_run}", *(setting.format(wider=wider) for setting in settings))
    started = time.monotonic()
    done = subprocess.run([*command, "steps=2"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in {1, 2}
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 15
    assert not (stopped_run / "logs").exists()
