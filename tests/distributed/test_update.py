"""One optimizer step gives the same numbers however rows and weights are split."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.config.load import parse
from megatron_rl.config.schema import OptimizerConfig, RunConfig
from megatron_rl.layout import ParallelLayout
from tests.distributed.cases import (
    CRITIC,
    POLICY,
    Setup,
    few_rows,
    gather,
    learning_rates,
    loss_metrics,
    not_finite,
    supervised,
    threads_left,
    token_rows,
    trained,
    without_loss_tokens,
)
from tests.distributed.ranks import Ranks

SPLITS = [
    Setup(budget=60),
    Setup(layout=ParallelLayout(tensor=2)),
    Setup(layout=ParallelLayout(tensor=2, sequence_parallel=True), budget=90),
    Setup(layout=ParallelLayout(pipeline=2), budget=60),
    Setup(layout=ParallelLayout(data=2), budget=60),
    Setup(layout=ParallelLayout(data=2), distributed_optimizer=True),
    Setup(layout=ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True), distributed_optimizer=True, budget=60),
]


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


_REFERENCES: dict[tuple[str, str], Any] = {}


def _reference(ranks: Ranks, models: dict[str, Path], name: str, role: str, folder: Path) -> Any:
    """The same on one rank in one micro-batch."""
    if (name, role) not in _REFERENCES:
        [(results, after, _)] = ranks.run(1, trained, models[name], Setup(), role, folder / "one")
        _REFERENCES[name, role] = results, gather([after]), tensors(folder / "one")
    return _REFERENCES[name, role]


@pytest.mark.parametrize("setup", SPLITS, ids=str)
@pytest.mark.parametrize(
    ("name", "role"), [("qwen2", POLICY), ("qwen3", POLICY), ("llama-biases", POLICY), ("qwen2-tied", CRITIC)]
)
def test_an_update_is_the_same_for_any_split(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, name: str, role: str, setup: Setup
) -> None:
    results, after, weights = _reference(ranks, models, name, role, tmp_path)
    answers = ranks.run(setup.layout.world_size, trained, models[name], setup, role, tmp_path / "split")
    reporting = setup.layout.rank_of(pipeline=setup.layout.pipeline - 1)
    for rank, (updates, _, _) in enumerate(answers):
        assert all((update is not None) == (rank == reporting) for update in updates)
    for mine, reference in zip(answers[reporting][0], results, strict=True):
        assert mine.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
        assert loss_metrics(mine) == pytest.approx(loss_metrics(reference), rel=1e-5)
    torch.testing.assert_close(gather([answer[1] for answer in answers]), after, atol=1e-4, rtol=0)
    exported = tensors(tmp_path / "split")
    assert exported.keys() == weights.keys()
    for key, tensor in exported.items():
        torch.testing.assert_close(tensor, weights[key], atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_an_update_lowers_the_loss_and_leaves_the_reference_alone(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    setup = Setup(keep_reference=True, lr=1e-3)
    [(results, after, reference)] = ranks.run(1, trained, models["qwen2"], setup, POLICY, tmp_path / "out")
    frozen = Setup(keep_reference=True, lr=0.0)
    [(still, same, _)] = ranks.run(1, trained, models["qwen2"], frozen, POLICY, tmp_path / "frozen")
    assert results[1].metrics["loss"] < results[0].metrics["loss"]
    assert still[1].metrics["loss"] == still[0].metrics["loss"]
    assert still[0].learning_rate == 0
    assert torch.equal(gather([reference]), gather([same]))
    assert not torch.equal(gather([after]), gather([same]))
    before, untouched = tensors(models["qwen2"]), tensors(tmp_path / "frozen")
    assert all(torch.equal(before[name], untouched[name]) for name in before)


def test_a_fresh_critic_predicts_zero_and_learns(ranks: Ranks, models: dict[str, Path], tmp_path: Path) -> None:
    [(_, fresh, _)] = ranks.run(1, trained, models["qwen2"], Setup(lr=0.0), CRITIC, tmp_path / "fresh")
    assert not gather([fresh]).any()
    assert not tensors(tmp_path / "fresh")["score.weight"].any()
    [(_, learned, _)] = ranks.run(1, trained, models["qwen2"], Setup(), CRITIC, tmp_path / "learned")
    values = gather([learned])
    assert values[token_rows().response_mask].all()
    [(_, loaded, _)] = ranks.run(1, trained, tmp_path / "learned", Setup(lr=0.0), CRITIC, tmp_path / "loaded")
    torch.testing.assert_close(gather([loaded]), values)


def test_a_fresh_critic_may_begin_with_noise_which_is_the_same_on_all_ranks(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    alone = Setup(lr=0.0, value_head_std=0.1)
    [(_, values, _)] = ranks.run(1, trained, models["qwen2"], alone, CRITIC, tmp_path / "alone")
    head = tensors(tmp_path / "alone")
    assert float(head["score.weight"].std()) == pytest.approx(0.1, rel=0.3)
    assert not head["score.bias"].any()
    shared = replace(alone, layout=ParallelLayout(tensor=2, sequence_parallel=True, pipeline=2))
    answers = ranks.run(4, trained, models["qwen2"], shared, CRITIC, tmp_path / "shared")
    torch.testing.assert_close(gather([answer[1] for answer in answers]), gather([values]), atol=1e-5, rtol=0)
    # a checkpoint's head is its own
    [(_, loaded, _)] = ranks.run(1, trained, tmp_path / "alone", Setup(lr=0.0), CRITIC, tmp_path / "loaded")
    assert torch.equal(gather([loaded]), gather([values]))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen2-tied", "qwen3"])
def test_a_critic_is_a_token_classifier_of_transformers_with_the_same_values(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForTokenClassification

    setup, folder = Setup(layout=ParallelLayout(tensor=2, pipeline=2)), tmp_path / "critic"
    answers = ranks.run(4, trained, models[name], setup, CRITIC, folder)
    model, loading = AutoModelForTokenClassification.from_pretrained(folder, output_loading_info=True)
    assert {kind: set(found) for kind, found in loading.items() if found} == {}
    config = json.loads((folder / "config.json").read_text())
    family = model.config.model_type.capitalize()
    assert config["architectures"] == [f"{family}ForTokenClassification"] == [type(model).__name__]
    assert (config["num_labels"], config["id2label"], config["label2id"]) == (1, {"0": "value"}, {"value": 0})

    rows, expected = token_rows(), gather([answer[1] for answer in answers])
    assert float(expected[rows.response_mask].std()) > 1e-3
    for row, length in enumerate(rows.lengths.tolist()):
        with torch.no_grad():
            found = model.eval()(rows.tokens[row, None, :length]).logits[0, :-1, 0]
        mask = rows.response_mask[row, 1:length]
        torch.testing.assert_close(found[mask], expected[row, 1:length][mask], atol=1e-4, rtol=0)

    again = Setup(layout=ParallelLayout(pipeline=2), lr=0.0)
    answers = ranks.run(2, trained, folder, again, CRITIC, tmp_path / "again")
    torch.testing.assert_close(gather([answer[1] for answer in answers]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("setup", [Setup(), Setup(layout=ParallelLayout(pipeline=2), budget=60)], ids=str)
def test_a_supervised_update_needs_tokens_alone(ranks: Ranks, models: dict[str, Path], setup: Setup) -> None:
    [result] = ranks.run(setup.layout.world_size, supervised, models["llama"], setup)[-1]
    assert result is not None
    assert result.metrics["loss"] == pytest.approx(_likelihood(models["llama"]), rel=1e-4)


@cache
def _likelihood(folder: Path) -> float:
    from tests.distributed.test_outputs import _hugging_face

    rows = token_rows()
    return -float(_hugging_face(folder)[0].sum() / rows.response_mask.sum())


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_bfloat16_keeps_float32_main_weights(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, distributed_optimizer: bool
) -> None:
    results, _, weights = _reference(ranks, models, "qwen2", POLICY, tmp_path)
    setup = Setup(
        layout=ParallelLayout(tensor=2, sequence_parallel=True),
        dtype="bfloat16",
        distributed_optimizer=distributed_optimizer,
    )
    answers = ranks.run(2, trained, models["qwen2"], setup, POLICY, tmp_path / "half")
    assert answers[0][0][1].grad_norm == pytest.approx(results[1].grad_norm, rel=0.03)
    half = tensors(tmp_path / "half")
    assert half.keys() == weights.keys()
    for key, tensor in half.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), weights[key], atol=0.01, rtol=0.01)


def test_an_update_without_loss_tokens_says_so(ranks: Ranks, models: dict[str, Path]) -> None:
    [message] = ranks.run(1, without_loss_tokens, models["qwen2"])
    assert message == "an update needs at least one response token, got 2 rows without any"


@pytest.mark.parametrize("setup", [Setup(dtype="bfloat16"), Setup(layout=ParallelLayout(data=2))], ids=str)
@pytest.mark.parametrize("role", [POLICY, CRITIC])
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_a_gradient_that_is_not_finite_ends_the_update_before_the_weights_change(
    role: str, setup: Setup, distributed_optimizer: bool, ranks: Ranks, models: dict[str, Path]
) -> None:
    setup = replace(setup, distributed_optimizer=distributed_optimizer)
    for said, same in ranks.run(setup.layout.world_size, not_finite, models["qwen2"], setup, role):
        assert re.match(r"an update needs finite gradients, found one of norm (nan|inf);", said)
        assert same


@pytest.mark.parametrize(
    "setup",
    [
        Setup(layout=ParallelLayout(data=2), distributed_optimizer=True, overlap_communication=True),
        Setup(layout=ParallelLayout(data=2, pipeline=2, virtual_pipeline=2), budget=60),
    ],
    ids=str,
)
def test_a_replica_without_rows_does_not_keep_the_others_waiting(
    ranks: Ranks, models: dict[str, Path], setup: Setup
) -> None:
    one, two = (ranks.run(each.layout.world_size, few_rows, models["qwen2"], each) for each in (Setup(), setup))
    values = [gather([alone]) for alone in one[0]]
    assert len({float(each.sum()) for each in values}) == 3
    for alone, *shared in zip(values, *two, strict=True):
        torch.testing.assert_close(gather(shared), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "setup"),
    [
        ("qwen2", Setup(layout=ParallelLayout(data=2))),
        ("qwen2", Setup(layout=ParallelLayout(data=2), distributed_optimizer=True, overlap_communication=True)),
        ("qwen2-moe", Setup(layout=ParallelLayout(data=2, expert=2))),
    ],
    ids=str,
)
def test_a_closed_model_leaves_no_threads_of_its_groups(
    model: str, setup: Setup, ranks: Ranks, models: dict[str, Path]
) -> None:
    assert max(ranks.run(2, threads_left, models[model], setup)) < 10


def schedule(lr: float, warmup: float, **changes: Any) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, warmup_fraction=warmup, min_lr_fraction=0.1, **changes)


def test_learning_rate_warms_up_and_ends_at_its_floor(ranks: Ranks, models: dict[str, Path]) -> None:
    [rates] = ranks.run(1, learning_rates, models["qwen2"], schedule(1.0, 0.15), 11)
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done / 8)) for done in range(9)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *cosine])
    [rates] = ranks.run(1, learning_rates, models["qwen2"], schedule(1.0, 0.03), 1)
    assert rates == [0.5]
    [rates] = ranks.run(1, learning_rates, models["qwen2"], schedule(0.0, 0.03), 3)
    assert rates == [0, 0, 0]


def test_a_schedule_may_be_longer_than_the_run(ranks: Ranks, models: dict[str, Path]) -> None:
    [rates] = ranks.run(1, learning_rates, models["qwen2"], schedule(1.0, 0.15, schedule_updates=11), 4)
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 0.1 + 0.45 * (1 + math.cos(math.pi / 8))])


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_the_seeds_learning_rates_are_those_of_its_overlay(ranks: Ranks, models: dict[str, Path], role: str) -> None:
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    seed = Path(__file__).parents[2] / "examples/qwen2.5_math_7b"
    config = parse(RunConfig, [seed / name for name in ("simplerl_zero.toml", "4_nodes_a100.toml", "seed_exact.toml")])
    optimizer = config.trainers[role].optimizer
    updates = 20 * 8 * 64  # episodes, rollouts, minibatches
    [rates] = ranks.run(1, learning_rates, models["qwen2"], optimizer, updates)
    # its scheduler: cosine_with_min_lr, ceil(0.03 * 10640) updates of warm-up, a floor of a tenth
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=optimizer.lr)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(theirs, 320, 10_640, min_lr_rate=0.1)
    expected = []
    for _ in rates:
        expected.append(scheduler.get_last_lr()[0])
        theirs.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-9)
    if role == "policy":
        assert f"{rates[13]:.2e}" == "2.03e-08"  # after 13 updates, as a user's log of the seed has it
        assert (rates[0], rates[320]) == (0.0, 5e-7)


def test_warming_up_from_zero_is_one_update_late_and_may_be_short(ranks: Ranks, models: dict[str, Path]) -> None:
    [rates] = ranks.run(1, learning_rates, models["qwen2"], schedule(1.0, 0.03, warmup_from_zero=True), 1)
    assert rates == [0]
    [rates] = ranks.run(1, learning_rates, models["qwen2"], schedule(1.0, 0.0, warmup_from_zero=True), 2)
    assert rates == pytest.approx([1, 0.55])
