"""A run whose trainer quantises what it pushes is the run whose engine does, with fewer bytes on the way."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.device import has_wide_vectors
from megatron_rl.weights.safetensors_io import HfFolder
from tests.end_to_end.conftest import PPO

FP8 = PPO.with_name("fp8.toml")
KV_CACHE_DTYPE = "fp8" if has_wide_vectors() else "auto"  # vLLM has it in FP8 with AVX-512 or AMX alone


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_it_does_not_matter_who_quantises_but_for_the_bytes(
    train_command: Callable[..., list[str]], task: Path, tmp_path: Path
) -> None:
    steps, digests = {}, {}
    for by in ("engine", "trainer"):
        run = tmp_path / by
        command = train_command(
            "steps=2",
            "ppo.critic_warmup_steps=0",
            "parity.enabled=true",
            f"sync.quantised_by={by}",
            f"engine.kv_cache_dtype={KV_CACHE_DTYPE}",
            f"run_dir={run}",
        )
        command.insert(command.index(str(PPO)) + 1, str(FP8))
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "14 linears in float8_e4m3fn with a float32 scale per 1 x all" in done.stdout
        steps[by] = [record for record in lines(run / "metrics.jsonl") if "rollout/score" in record]
        digests[by] = [sample["step_digest"] for sample in lines(run / "samples.jsonl")]
    assert len(steps["trainer"]) == 2
    assert digests["trainer"] == digests["engine"]
    for ours, theirs in zip(steps["trainer"], steps["engine"], strict=True):
        assert ours["push/probe_mean_abs"] == theirs["push/probe_mean_abs"] > 0
        assert ours["policy/grad_norm"] == theirs["policy/grad_norm"]
    shapes = {name: info.shape for name, info in HfFolder(task / "model").infos().items()}
    linears = {name for name in shapes if name.endswith("_proj.weight")}
    kept = sum(2 * math.prod(shape) for name, shape in shapes.items() if name not in linears)
    small = sum(math.prod(shapes[name]) + 4 * shapes[name][0] for name in linears)
    assert steps["trainer"][0]["push/bytes"] == kept + small
    assert steps["engine"][0]["push/bytes"] == sum(4 * math.prod(shape) for shape in shapes.values())
