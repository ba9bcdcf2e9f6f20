"""Whole PPO steps of ``megatron-rl train``, read from what it writes while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_checks import measure
from benchmarks.gpu_checks.case import ROOT, Case, at_least, at_most
from benchmarks.gpu_checks.costs import SHAPES, TINY_SHAPE, VOCABULARY
from benchmarks.gpu_checks.plan import Row
from examples.arithmetic_cpu.task import Sizes, prepare

TRAIN = (sys.executable, "-m", "megatron_rl", "train", "examples/arithmetic_cpu/ppo.toml")
_LOOK_S = 0.5
TURNS = ("/sleep", "/wake", "/offload", "/onload")
"""What who shares a device does when its turn ends and begins."""
_LEFT_GB, _LEFT_GOOD_GB = 5.0, 2.0
"""Of a device whose trainers and engine are all away: contexts, workspaces, and what was not given back."""


def ppo(case: Case) -> Iterator[Row]:
    """Steps of ``megatron-rl train`` on a model with random weights."""
    return _ppo(case, "ppo", [], gap_bound=0.02)


def ppo_fp8(case: Case) -> Iterator[Row]:
    """The same in FP8 on both sides."""
    settings = [f"{role}.fp8={{recipe='blockwise'}}" for role in ("policy", "critic")]
    return _ppo(case, "ppo_fp8", [*settings, "engine.quantization=fp8_per_block"], gap_bound=0.05)


def _ppo(case: Case, name: str, settings: list[str], *, gap_bound: float) -> Iterator[Row]:
    """Seconds per phase, GB/s of a push, gap of the parity gate and of the steps, memory; of each step as it ends, of
    which the last one stays.
    """
    folder, run_dir = case.scratch / "task", case.scratch / name
    if not (folder / "done").exists():
        _prepare(case, folder)
        (folder / "done").touch()
    running = subprocess.Popen(  # what it says is the check's own output, of which an overrun too tells the end
        [*TRAIN, *_overrides(case, folder, run_dir), *settings],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    known = 0
    while True:
        ended = running.poll() is not None
        records = _records(run_dir / "metrics.jsonl")
        if len(records) > known:
            known = len(records)
            yield from ppo_rows(records, copy_gbps=None, gap_bound=gap_bound, on_gpu=not case.small)
        if ended:
            break
        time.sleep(_LOOK_S)
    if running.returncode:
        raise RuntimeError(f"megatron-rl train ended with {running.returncode}; its last lines are above")
    if not case.small:  # not before: the engine asks how much memory is free
        rate = measure.copy_gbps(2**31)
        yield from ppo_rows(records, copy_gbps=rate, gap_bound=gap_bound, on_gpu=True)


def _prepare(case: Case, folder: Path) -> None:
    shape = TINY_SHAPE if case.small else SHAPES[0]
    sizes = Sizes(
        hidden=shape.hidden,
        layers=2 if case.small else 24,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn_hidden=shape.ffn_hidden,
        vocabulary=384 if case.small else VOCABULARY,
        init_std=0.1 if case.small else 0.03,
    )
    prepare(folder, sizes, seed=0, steps=1, samples_per_step=8)


def _overrides(case: Case, folder: Path, run_dir: Path) -> list[str]:
    prompts, tokens = (4, 8) if case.small else (32, 400)
    found = [
        f"run_dir={run_dir}",
        f"model.path={folder / 'model'}",
        f"model.dtype={'float32' if case.small else 'bfloat16'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.heldout={folder / 'heldout.jsonl'}",
        "steps=3",
        f"prompts_per_step={prompts}",
        f"rollout.max_response_tokens={tokens}",
        f"ppo.minibatch_samples={2 * prompts}",
        "ppo.critic_warmup_steps=0",
        "policy.layout.tensor=1",
        "critic.layout.pipeline=1",
        "parity.enabled=true",
        f"evaluation.prompts={prompts}",
        "checkpoint.every=0",
    ]
    if case.small:
        return found
    if min(case.gpus, case.asked_gpus) < 3:
        found.append("cluster.colocate=true")
    # CUDA graphs are captured for as many sequences as there may be at a time
    return [*found, "engine.kv_cache_mib=4096", f"engine.max_concurrent={4 * prompts}"]


def _records(file: Path) -> list[dict[str, Any]]:
    """Whole lines of it."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def ppo_rows(
    records: list[dict[str, Any]], *, copy_gbps: float | None, gap_bound: float, on_gpu: bool
) -> Iterator[Row]:
    """What the last step of a run says, and what the gate before the first one found.

    Args:
        records: of ``metrics.jsonl``, so far.
        copy_gbps: 1e9 bytes per second that a copy reads and writes; half of its rate is the goal. None: no goal.
        gap_bound: on the mean gap between trainer and engine, nats.
        on_gpu: memory that is given back has a goal.
    """
    for record in records:
        for key, value in sorted(record.items()):
            if key.startswith("parity/") and key.endswith("/mean"):
                yield Row(what=key, value=value, unit="nats")
    steps = [record for record in records if record["kind"] == "step" and not record.get("aborted")]
    if not steps:
        return
    last = steps[-1]
    yield Row(what="steps done", value=len(steps), unit="")
    for key, value in sorted(last.items()):
        if key.startswith("seconds/"):
            yield Row(what=key.replace("/", ": ", 1), value=value, unit="s")
    rate = last["push/bytes"] / last["push/transfer_s"] / 1e9
    goal = {} if copy_gbps is None else at_least(copy_gbps / 2 / 2, rate)
    yield Row(what="push: transfer", value=rate, unit="GB/s", **goal)
    for tokens, key in (("the probe", "push/probe_mean_abs"), ("sampled tokens", "experience/engine_gap_mean")):
        gap = last[key]
        yield Row(
            what=f"gap of trainer and engine on {tokens}, mean", value=gap, unit="nats", **at_most(gap_bound, gap)
        )
    largest = last["experience/engine_gap_max"]
    yield Row(what="gap of trainer and engine on sampled tokens, max", value=largest, unit="nats")
    for key, value in sorted(last.items()):
        if key.startswith("busy_s/") and key.endswith(TURNS):
            yield Row(what=key.replace("/", ": ", 1), value=value, unit="s")
    for key, value in sorted(last.items()):
        if key.startswith("memory/"):
            yield Row(what=key, value=value, unit="GiB")
    asleep = last.get("memory/train/engine/measured")
    if asleep is not None:  # the engine was asked when it had gone, and before the trainers came back
        yield Row(what="left after sleep", value=asleep * 2**30 / 1e9, unit="GB", **_left(asleep * 2**30 / 1e9, on_gpu))


def _left(residual: float, on_gpu: bool) -> dict[str, Any]:
    """On a CPU nothing is freed."""
    if not on_gpu:
        return {}
    return {"goal": f"at most {_LEFT_GB:g}, good below {_LEFT_GOOD_GB:g}", "met": residual <= _LEFT_GB}
