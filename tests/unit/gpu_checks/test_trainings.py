"""What the checks of FP8 and of layouts train, and what they make of it; the training itself is made up here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu_checks import trainings
from benchmarks.gpu_checks.case import Case
from benchmarks.gpu_checks.plan import Row
from benchmarks.gpu_checks.trainings import Job, Trained, run_rank
from examples.arithmetic_cpu.task import Sizes
from megatron_rl.config.precision import Gpu, fp8_problems
from megatron_rl.config.schema import ModelConfig
from megatron_rl.device import prepare_megatron
from megatron_rl.model_dims import read_model_dims
from megatron_rl.ray_runtime.supervisor import port_kept

H100 = Gpu(capability=(9, 0), cuda=(13, 0))


def sizes_alone(folder: Path, sizes: Sizes, seed: int) -> None:
    """A model's configuration without its weights."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn_hidden,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "num_hidden_layers": sizes.layers,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.max_positions,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))


class Ranks:
    """Stand in for ranks: jobs are noted, and trained as ``outcome`` says."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Trained]:
        assert len({job.trainer.layout.world_size for job in jobs}) == 1
        self.jobs += jobs
        for job in jobs:
            yield self.outcome(job)

    def outcome(self, job: Job) -> Trained:
        losses = [2.0] * job.updates
        spread, ones = np.linspace(-1.0, 1.0, 101, dtype=np.float32), np.ones(50, dtype=np.float32)
        plain = Trained(
            losses=losses,
            norms=losses,
            seconds=[9.0, 9.0] + [1.25] * (job.updates - 2),
            logprobs=spread - 9 if job.compared else None,
            gradients={"first": ones, "last": ones} if job.compared else {},
        )
        if job.trainer.fp8 is None:
            return plain
        return replace(
            plain,
            losses=[*losses[:-1], 2.01],
            seconds=[9.0, 9.0] + [1.0] * (job.updates - 2),
            logprobs=1.05 * spread - 9,
            gradients={"first": 1.25 * ones, "last": 1.02 * ones},
        )


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    found = Ranks()
    monkeypatch.setattr(trainings, "train", found)
    monkeypatch.setattr(trainings, "write_model", sizes_alone)
    return found


def problems(job: Job) -> list[str]:
    """What the rules of FP8 say of a job on an H100."""
    case = job.trainer.fp8_case(ModelConfig(path=job.model, dtype=job.dtype), read_model_dims(job.model), H100)
    return [] if case is None else fp8_problems(case)


def rows_of(check: Any, folder: Path, gpus: int = 1) -> dict[str, Row]:
    return {row.what: row for row in check(Case(gpus=gpus, asked_gpus=gpus, scratch=folder))}


def test_fp8_is_trained_at_every_size_and_held_to_its_speed_at_the_largest(ranks: Ranks, tmp_path: Path) -> None:
    rows = rows_of(trainings.training_fp8, tmp_path)
    asked = [(job.model.name, job.trainer.fp8 and job.trainer.fp8.recipe, job.updates) for job in ranks.jobs]
    recipes = (None, "tensorwise", "blockwise")
    updates = {"7B": 20, "1.5B": 10, "0.5B": 10}
    assert asked == [(size, recipe, count) for size, count in updates.items() for recipe in recipes]
    assert [problems(job) for job in ranks.jobs] == [[]] * len(ranks.jobs)
    for size in updates:
        for recipe in recipes[1:]:
            faster = rows[f"{size} {recipe}: times as fast as bfloat16"]
            assert faster.value == pytest.approx(1.25)
            assert faster.met == ({"tensorwise": False, "blockwise": True}[recipe] if size == "7B" else None)
            gap = rows[f"{size} {recipe}: largest relative loss difference"]
            assert (gap.value, gap.met) == (pytest.approx(0.005), True)
        for what, wanted in (
            ("log-probs, distance by their spread", 0.05),
            ("nearest gradient, relative distance (last)", 0.02),
            ("farthest gradient, relative distance (first)", 0.25),
        ):
            found = rows[f"{size} tensorwise: {what}"]
            assert (found.value, found.goal, found.met) == (pytest.approx(wanted), "0.01 to 0.3", True)
        tokens = rows[f"{size} bfloat16: tokens/s"]
        assert tokens.value == pytest.approx(8 * 4096 / 1.25)
        assert rows[f"{size} blockwise: MFU of 989 TFLOP/s"].value > 0


FIRST_UPDATE = {
    "log-probs, distance by their spread",
    "nearest gradient, relative distance",
    "farthest gradient, relative distance",
}


def missed(rows: dict[str, Row]) -> set[str]:
    """What of the first update misses its goal, without names of models, recipes and tensors."""
    return {
        what
        for what in FIRST_UPDATE
        for row in rows.values()
        if row.met is False and row.what.split(": ")[1].startswith(what)
    }


def test_fp8_that_is_not_used_is_missed(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = ranks.outcome
    monkeypatch.setattr(ranks, "outcome", lambda job: outcome(replace(job, trainer=replace(job.trainer, fp8=None))))
    assert missed(rows_of(trainings.training_fp8, tmp_path)) == FIRST_UPDATE


def run_negated(jobs: Sequence[Job], ports: Sequence[int], negated: bool) -> list[Trained]:
    """In a process of its own; where they round to FP8, linears give the negative of what they should."""
    prepare_megatron()
    from megatron_rl.mcore import fake_quant

    right = fake_quant._FakeQuantised.__call__
    if negated:
        fake_quant._FakeQuantised.__call__ = lambda self, **given: -right(self, **given)  # type: ignore[method-assign]
    return [run_rank(job, 0, port) for job, port in zip(jobs, ports, strict=True)]


@pytest.mark.parametrize("negated", [False, True])
def test_the_small_form_tells_wrong_fp8_from_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, negated: bool
) -> None:
    def train(jobs: Sequence[Job]) -> Iterator[Trained]:
        kept = [port_kept() for _ in jobs]
        ports = [port.getsockname()[1] for port in kept]
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield from pool.submit(run_negated, jobs, ports, negated).result(120)
        for port in kept:
            port.close()

    monkeypatch.setattr(trainings, "train", train)
    case = Case(gpus=0, asked_gpus=1, scratch=tmp_path)
    rows = {row.what: row for row in trainings.training_fp8(case)}
    far = {what for what in FIRST_UPDATE if "nearest" not in what}
    assert missed(rows) == (far if negated else set())
    # what was compared before does not tell them apart
    assert all(row.met for what, row in rows.items() if what.endswith("largest relative loss difference"))


def test_a_loss_that_is_no_number_is_infinitely_far() -> None:
    assert trainings.largest_gap([1.0, math.nan], [1.0, 1.0]) == math.inf
    assert trainings.largest_gap([1.0, 1.0], [1.0, math.nan]) == math.inf
    assert trainings.largest_gap([1.0], [math.inf]) == math.inf
    broken = np.array([1.0, math.nan], dtype=np.float32)
    assert trainings.distance(broken, np.ones(2, dtype=np.float32)) == math.inf
    assert trainings.distance(np.ones(2, dtype=np.float32), broken) == math.inf
    assert trainings.distance(np.ones(2, dtype=np.float32), np.zeros(2, dtype=np.float32)) == math.inf
    assert trainings.largest_gap([1.1, 2.0], [1.0, 2.0]) == pytest.approx(0.1)


def test_wide_blockwise_parameters_are_tried_at_four_ranks_without_a_goal(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan_where_wide(job: Job) -> Trained:
        losses = [1.0, math.nan if job.trainer.layout.tensor == 4 else 1.0, 1.0, 1.0]
        return Trained(losses=losses, norms=[1.0] * 4, seconds=[1.0] * 4)

    monkeypatch.setattr(ranks, "outcome", nan_where_wide)
    rows = rows_of(trainings.layouts_fp8, tmp_path, gpus=4)
    assert [problems(job) for job in ranks.jobs] == [[]] * len(ranks.jobs)
    wide = [job for job in ranks.jobs if job.trainer.layout.tensor == 4]
    assert [(job.model.name, job.head.name) for job in wide] == [("7B", "TOKEN"), ("7B", "VALUE")]
    assert all(job.trainer.fp8 and job.trainer.fp8.parameters for job in wide)
    for head in ("token", "value"):
        far = rows[f"blockwise fp8 parameters {head} head, TP4: losses, largest relative difference from one rank"]
        assert (far.value, far.met) == (math.inf, None)
        near = rows[f"blockwise fp8 parameters {head} head, TP2: losses, largest relative difference from one rank"]
        assert (near.value, near.met) == (0.0, True)
    # four kinds x two heads x three layouts, and TP4's two; losses and norms
    assert len(rows) == 2 * (4 * 2 * 3 + 2)


def test_on_two_gpus_wide_parameters_are_left_out_and_their_model_is_not_made(ranks: Ranks, tmp_path: Path) -> None:
    rows = rows_of(trainings.layouts_fp8, tmp_path, gpus=2)
    left_out = [what.split(" ", 1)[0] for what in rows if "is left out: it needs --gpus 4 or more" in what]
    assert left_out == ["TP2xPP2", "TP4"]
    assert {job.model.name for job in ranks.jobs} == {"1.5B"}
    assert len(rows) == 2 + 2 * (4 * 2 * 2)


def test_layouts_in_bfloat16_have_no_wide_one(ranks: Ranks, tmp_path: Path) -> None:
    rows = rows_of(trainings.layouts, tmp_path, gpus=4)
    assert {job.trainer.layout.world_size for job in ranks.jobs} == {1, 2, 4}
    assert max(job.trainer.layout.tensor for job in ranks.jobs) == 2
    assert len(rows) == 2 * 2 * 3
