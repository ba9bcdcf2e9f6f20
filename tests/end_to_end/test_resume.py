"""A run that is killed, or asked to stop, goes on as if nothing had been: the same numbers to the last bit."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from megatron_rl.checkpoints import RunCheckpoints, RunIdentity, find_checkpoint
from megatron_rl.config.load import dotted, load
from megatron_rl.config.schema import RunConfig
from megatron_rl.durable import locked
from megatron_rl.experience.prompts import load_prompts
from megatron_rl.model_dims import read_model_dims
from tests.distributed.test_checkpoint import saved_tensors
from tests.end_to_end.test_train import wait_for_step
from tests.fakes import FileModel

Command = Callable[..., list[str]]
WARMUP = Path(__file__).parents[2] / "examples/arithmetic_cpu/warmup.toml"
ONE_RANK = ("policy.layout.tensor=1", "critic.layout.pipeline=1")
SIX_STEPS = ("steps=6", "ppo.critic_warmup_steps=1", "checkpoint.every=1")
OF_THE_MACHINE = re.compile(r"time$|push/\w+_s$|eta_s|seconds/|busy_s/|tokens_per_s/|peak_rss_gib/|checkpoint/")


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


def kill_after_step_3(command: list[str], run: Path) -> int:
    """Kill -9 the driver once the checkpoint of step 3 is there; all that it started is gone after that. The step of
    the last checkpoint.
    """
    latest = run / "checkpoints" / "latest"

    def saved() -> int:
        name = latest.read_text() if latest.is_file() else "none"
        return int(name.removeprefix("step_")) if name.startswith("step_") else 0

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 200
        while saved() < 3:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
        started = psutil.Process(process.pid).children(recursive=True)
        assert {"raylet", "gcs_server"} <= {child.name() for child in started}
        process.kill()
    assert psutil.wait_procs(started, timeout=30)[1] == []
    assert saved() < 6, "the run must have steps left"
    return saved()


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_with_the_same_numbers_to_the_last_bit(train_command: Command, tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finish(train_command(*SIX_STEPS, *ONE_RANK, f"run_dir={unbroken}"))
    command = train_command(*SIX_STEPS, *ONE_RANK, f"run_dir={broken}")
    step = kill_after_step_3(command, broken)
    kept = [row["time"] for row in lines(broken / "metrics.jsonl") if row["step"] < step]
    said = finish(command)

    assert "going on from" in said
    assert f"after step {step} of 6" in said
    assert [row["step"] for row in computed(broken)] == list(range(6))
    assert [row["time"] for row in lines(broken / "metrics.jsonl")][: len(kept)] == kept
    assert computed(broken) == computed(unbroken)
    sampled = lines(unbroken / "samples.jsonl")
    assert len({row["step_digest"] for row in sampled}) == 6
    assert lines(broken / "samples.jsonl") == sampled  # digests of all tokens sampled in a step included
    manifests = [json.loads((run / "checkpoints/step_000006/manifest.json").read_text()) for run in (unbroken, broken)]
    for model in ("policy", "critic"):
        name = f"{model}/__0_0.distcp"  # weights, main weights, both moments
        assert manifests[0][name] == manifests[1][name]
    assert manifests[0]["hf/model.safetensors"] == manifests[1]["hf/model.safetensors"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_at_another_layout(train_command: Command, tmp_path: Path) -> None:
    """From TP2 to PP2: rounding alone may differ. At the seed's learning rates; the quick start's, hundreds of times as
    large, carry the rounding of one update into the next (1.2e-6 then).
    """
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    rates = ("policy.optimizer.lr=5e-7", "critic.optimizer.lr=9e-6")
    settings = (*SIX_STEPS, "critic.layout.pipeline=1", *rates)
    finish(train_command(*settings, f"run_dir={unbroken}"))
    kill_after_step_3(train_command(*settings, f"run_dir={broken}"), broken)
    finish(train_command(*settings, f"run_dir={broken}", "policy.layout.tensor=1", "policy.layout.pipeline=2"))

    assert lines(broken / "samples.jsonl") == lines(unbroken / "samples.jsonl")
    for got, want in zip(computed(broken), computed(unbroken), strict=True):
        assert got.pop("kind") == want.pop("kind")
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
    expected = saved_tensors(unbroken / "checkpoints/step_000006/policy")
    moments = [name for name in expected if "exp_avg" in name]
    assert len(moments) == 2 * sum(name.startswith(("decoder.", "embedding.", "output_layer.")) for name in expected)
    found = saved_tensors(broken / "checkpoints/step_000006/policy")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        gap = float((tensor - expected[name]).norm() / expected[name].norm())
        assert gap < (1e-5 if name in moments else 1e-4), (name, gap)
    for moment in ("exp_avg_sq", "exp_avg"):
        of_all = [name for name in moments if name.endswith(f".{moment}") or f".{moment}." in name]
        apart = sum(float((found[name] - expected[name]).square().sum()) for name in of_all)
        whole = sum(float(expected[name].square().sum()) for name in of_all)
        assert len(of_all) == len(moments) / 2
        assert math.sqrt(apart / whole) < 1.5e-6, (moment, math.sqrt(apart / whole))  # measured: 6.0e-7, 9.8e-7


def test_sigterm_finishes_the_step_saves_it_and_exits_well(train_command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = train_command("steps=500", *ONE_RANK)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(run, process)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert "asked to stop: finishing this step and saving it" in errors
    saved = find_checkpoint(run / "checkpoints")
    assert saved is not None
    assert saved.step == computed(run)[-1]["step"] + 1
    assert not any(row.get("aborted") for row in lines(run / "metrics.jsonl"))
    assert f"stopped as asked after step {saved.step} of 500; the same command goes on from there" in printed
    assert json.loads((run / "summary.json").read_text())["stopped_after_step"] == saved.step
    assert (run / "curve.png").is_file()


@pytest.mark.slow  # three starts of Ray; the same without Ray is in tests/distributed/test_supervised.py
@pytest.mark.timeout(900)
def test_a_supervised_stage_that_is_stopped_goes_on_to_the_same_model(task: Path, tmp_path: Path) -> None:
    def command(run: Path) -> list[str]:
        return [
            *[sys.executable, "-m", "megatron_rl", "sft", str(WARMUP)],
            *(f"run_dir={run}", f"output={run / 'model'}", f"model.path={task / 'model'}"),
            *(f"data={task / 'warmup.jsonl'}", "steps=120", "samples_per_step=16", "checkpoint.every=50"),
        ]

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    finish(command(whole))
    with subprocess.Popen(command(parted), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(parted, process, metric="model/loss")
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    saved = find_checkpoint(parted / "checkpoints")
    assert saved is not None
    assert 0 < saved.step < 120
    assert f"stopped as asked after step {saved.step} of 120; the same command goes on from there" in printed
    assert json.loads((parted / "summary.json").read_text())["stopped_after_step"] == saved.step
    assert not (parted / "model").exists()
    assert f"going on from {saved.folder}, after step {saved.step} of 120" in finish(command(parted))
    assert computed(parted) == computed(whole)
    summary = json.loads((parted / "summary.json").read_text())
    assert (summary["steps"], summary["loss_last"]) == (120, computed(parted)[-1]["model/loss"])
    assert "stopped_after_step" not in summary
    mine, theirs = ((run / "model/model.safetensors").read_bytes() for run in (parted, whole))
    assert mine == theirs


@pytest.fixture
def saved_run(train_command: Command, tmp_path: Path) -> Path:
    """The folder of a run with a checkpoint, of a model that is one number."""
    command = train_command()
    first = next(place for place, word in enumerate(command) if word.endswith(".toml"))
    config = load(RunConfig, [Path(command[first])], command[first + 1 :])
    tokenizer = Tokenizer.from_file(str(config.model.path / "tokenizer.json"))
    prompts = load_prompts(config.data.train, tokenizer, config.data)
    checkpoints = RunCheckpoints(
        config.run_dir / "checkpoints",
        keep=2,
        asynchronous=True,
        models={"policy": FileModel()},
        parts={},
        like=config.model.path,
        identity=RunIdentity(
            model=asdict(read_model_dims(config.model.path)), prompts=prompts.digest(), settings=dotted(config)
        ),
    )
    checkpoints.start(None)
    for step in (1, 2):
        checkpoints.save(step, wait=True)
    return config.run_dir


def refused(command: list[str], run: Path) -> str:
    """What a run says that does not start."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in {1, 2}
    assert "Traceback" not in done.stderr
    assert not (run / "logs").exists(), "no process may have been started"
    return done.stderr


def test_another_run_cannot_go_on_from_it(train_command: Command, saved_run: Path, task: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(task / "model", other)
    sizes = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(sizes | {"intermediate_size": 256}))
    said = refused(train_command("seed=1", "data.max_prompt_tokens=22", f"model.path={other}"), saved_run)
    assert "seed: was 0, is 1; the order of prompts and every sample are drawn from it" in said
    assert "data.train: other prompts" in said
    assert f"model.path: another model, ffn_hidden was {sizes['intermediate_size']}, is 256" in said


def test_a_truncated_file_is_named_with_the_way_on(train_command: Command, saved_run: Path) -> None:
    file = saved_run / "checkpoints/step_000002/policy/weights.txt"
    file.write_bytes(file.read_bytes()[:7])
    said = refused(train_command(), saved_run)
    assert f"{file} must have 100 bytes, has 7" in said
    assert "step_000001 is whole: to go on from it, write step_000001 into" in said


def test_a_second_run_in_the_same_folder_is_refused(train_command: Command, saved_run: Path) -> None:
    with locked(saved_run / "lock", writing=saved_run, wait_s=0):
        said = refused(train_command(), saved_run)
    assert f"another process is writing {saved_run} (pid {os.getpid()} on " in said


def test_a_fresh_start_refuses_a_folder_with_files(train_command: Command, saved_run: Path) -> None:
    assert "--fresh needs an empty folder" in refused(train_command("--fresh"), saved_run)
