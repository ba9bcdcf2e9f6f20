"""The invariances are tested by checks that can fail: each is shown to notice the mistake that it is there for.

A check measures how far an invariance is from holding. It is run on the package as it is, where it gives rounding, and
once more with one line of the package broken, where it must not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rl.batches import LossTerms, MicroBatch, Minibatch, TokenOutputs
from megatron_rl.config.schema import PPOConfig, RolloutConfig, RunConfig
from megatron_rl.dataflow import Score
from megatron_rl.experience import build
from megatron_rl.experience.algorithm import advantage_estimator, policy_loss
from megatron_rl.experience.packing import pack
from megatron_rl.maths import advantages, kl, losses, means
from tests.fakes import fake_config
from tests.oracle import Case, differences, experience_of, losses_of, part_of, random_case

HOLDS, BROKEN = 1e-9, 1e-3


def case_of(**settings: object) -> Case:
    ppo = PPOConfig(minibatch_samples=8, **{"kl_coef": 0.05, **settings})  # type: ignore[arg-type]
    config: RunConfig = fake_config(Path("none"), prompts_per_step=4, ppo=ppo)
    return random_case(dataclasses.replace(config, rollout=RolloutConfig(samples_per_prompt=4)), seed=5)


# Checks.


def from_the_formulas(**settings: object) -> float:
    """Distance of advantages, losses and gradients from the oracle's."""
    return max(differences(case_of(**settings)).values())


def from_another_micro_batch_split(**settings: object) -> float:
    """Distance of the policy's gradient, all rows in one micro-batch, from that of each row in its own."""
    case = case_of(**settings)
    experience = experience_of(case)
    rows = torch.arange(8)
    mask = experience.rollouts.response_mask
    minibatch = Minibatch(source=experience, rows=rows, loss_weight=mask[rows].float())
    loss = policy_loss(case.config.ppo)
    whole = pack(minibatch, range(8))
    logprobs = whole.old_logprobs + 0.3 * torch.sin(torch.arange(len(whole.inputs)))

    def gradient(batch: MicroBatch, numbers: torch.Tensor) -> torch.Tensor:
        leaf = numbers.clone().requires_grad_()
        loss(TokenOutputs(logprobs=leaf, entropy=torch.zeros_like(leaf)), batch).total.backward()
        assert leaf.grad is not None
        return leaf.grad

    starts = whole.cu_seqlens.tolist()
    parts = [gradient(part_of(whole, row), logprobs[starts[row] : starts[row + 1]]) for row in range(8)]
    return float((gradient(whole, logprobs) - torch.cat(parts)).abs().max())


def from_another_row_order(**settings: object) -> float:
    """Distance of a row's advantages from those that it has when the rows come in another order."""
    case = case_of(**settings)
    order = [11, 2, 7, 0, 5, 13, 9, 3, 15, 1, 10, 6, 4, 14, 8, 12]
    plain = experience_of(case)
    mask, group, values = plain.rollouts.response_mask, plain.rollouts.group, plain.values
    estimate = advantage_estimator(case.config.ppo)
    moved, _ = estimate(plain.rewards[order], None if values is None else values[order], mask[order], group[order])
    return float((moved - plain.advantages[order]).abs().max())


def from_other_groups_scores(**settings: object) -> float:
    """How far the advantages of a group move when another group's scores rise."""
    case = case_of(**settings)
    rollouts = [
        dataclasses.replace(item, scores=tuple(Score(value=score.value + 3.0) for score in item.scores))
        if number == 0
        else item
        for number, item in enumerate(case.rollouts)
    ]
    before, after = experience_of(case), experience_of(dataclasses.replace(case, rollouts=rollouts))
    others = before.rollouts.group != 0
    return float((before.advantages - after.advantages)[others].abs().max())


def from_the_engines_word_on_forced_tokens(**settings: object) -> float:
    """How far the loss moves with the engine's log-prob of tokens that it did not draw, which mean nothing."""
    case = case_of(**settings)
    experience = experience_of(case)
    rollouts = experience.rollouts
    forced = rollouts.response_mask & ~rollouts.sampled_mask
    assert forced.any()
    moved = dataclasses.replace(rollouts, rollout_logprobs=rollouts.rollout_logprobs - 5.0 * forced)
    losses_before, losses_after = (
        losses_of(case, batch) for batch in (experience, dataclasses.replace(experience, rollouts=moved))
    )
    pairs = zip(losses_before, losses_after, strict=True)
    return max(abs(one["policy"][0] - two["policy"][0]) for (_, one), (_, two) in pairs)


# Mistakes.

Patch = pytest.MonkeyPatch


def mean_per_micro_batch(patch: Patch) -> None:
    summed = losses._summed

    def averaged(term: torch.Tensor, batch: MicroBatch, **metrics: torch.Tensor) -> LossTerms:
        terms = summed(term, batch, **metrics)
        return dataclasses.replace(terms, total=terms.total / batch.loss_mask.sum())

    patch.setattr(losses, "_summed", averaged)


def advantages_one_token_later(patch: Patch) -> None:
    gae = advantages.gae

    def shifted(rewards, values, mask, **settings):  # type: ignore[no-untyped-def]
        found, returns = gae(rewards, values, mask, **settings)
        return found.roll(1, dims=1) * mask, returns

    patch.setattr(advantages, "gae", shifted)


def whitened_in_halves(patch: Patch) -> None:
    whiten = advantages.whiten

    def halves(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.cat([whiten(part, own) for part, own in zip(x.chunk(2), mask.chunk(2), strict=True)])

    patch.setattr(advantages, "whiten", halves)


def one_group(patch: Patch) -> None:
    centred = advantages._centred
    patch.setattr(advantages, "_centred", lambda scores, group: centred(scores, torch.zeros_like(group)))


def ratio_over_the_micro_batch(patch: Patch) -> None:
    patch.setattr(losses, "row_sums", lambda x, mask, starts, over_parts: (x * mask).sum().expand(len(x)))


def length_forgotten(patch: Patch) -> None:
    patch.setattr(means.SequenceMean, "__call__", means.TokenMean.__call__)


def kl_of_the_wrong_sign(patch: Patch) -> None:
    patch.setattr(build, "kl_estimate", lambda old, ref, kind: -kl.kl_estimate(old, ref, kind))


def forced_tokens_corrected(patch: Patch) -> None:
    correct = losses.EngineCorrection.__call__

    def all_tokens(self, batch):  # type: ignore[no-untyped-def]
        return correct(self, dataclasses.replace(batch, sampled_mask=batch.loss_mask))

    patch.setattr(losses.EngineCorrection, "__call__", all_tokens)


def deviation_of_a_population(patch: Patch) -> None:
    relative = advantages.group_relative

    def population(scores, group, *, scale):  # type: ignore[no-untyped-def]
        return relative(scores, group, scale=scale) * (4 / 3) ** 0.5

    patch.setattr(advantages, "group_relative", population)


def old_values_forgotten(patch: Patch) -> None:
    call = losses.ValueLoss.__call__

    def unclipped(self, outputs, batch):  # type: ignore[no-untyped-def]
        return call(dataclasses.replace(self, clip=float("inf")), outputs, batch)

    patch.setattr(losses.ValueLoss, "__call__", unclipped)


def divided_by_masked_samples_too(patch: Patch) -> None:
    """As where truncated samples are in the minibatch with weights of 0."""
    patch.setattr(means.SequenceMean, "__call__", lambda self, mask: mask * (mask.sum() / (8 * mask.sum(1)[:, None])))


GRPO = {"advantage": "grpo", "loss_mean": "sequence"}
TIS = {"engine_correction": "tis", "engine_ratio_high": 1.2}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("mistake", "check", "settings"),
    [
        (mean_per_micro_batch, from_another_micro_batch_split, {}),
        (mean_per_micro_batch, from_another_micro_batch_split, {**GRPO, "loss": "cispo"}),
        (ratio_over_the_micro_batch, from_another_micro_batch_split, {**GRPO, "loss": "gspo"}),
        (ratio_over_the_micro_batch, from_another_micro_batch_split, {**TIS, "engine_ratio_level": "sequence"}),
        (advantages_one_token_later, from_the_formulas, {}),
        (advantages_one_token_later, from_the_formulas, {"advantage": "reinforce_pp"}),
        (whitened_in_halves, from_another_row_order, {}),
        (whitened_in_halves, from_the_formulas, {"advantage": "reinforce_pp_baseline"}),
        (one_group, from_other_groups_scores, GRPO),
        (one_group, from_other_groups_scores, {"advantage": "rloo"}),
        (deviation_of_a_population, from_the_formulas, GRPO),
        (length_forgotten, from_the_formulas, GRPO),
        (divided_by_masked_samples_too, from_the_formulas, {**GRPO, "mask_truncated": True}),
        (kl_of_the_wrong_sign, from_the_formulas, {}),
        (old_values_forgotten, from_the_formulas, {"value_clip": 0.05}),
        (forced_tokens_corrected, from_the_formulas, TIS),
        (forced_tokens_corrected, from_the_engines_word_on_forced_tokens, TIS),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_a_check_holds_and_notices_the_mistake(
    monkeypatch: Patch,
    mistake: Callable[[Patch], None],
    check: Callable[..., float],
    settings: dict[str, object],
) -> None:
    assert check(**settings) < HOLDS
    mistake(monkeypatch)
    assert check(**settings) > BROKEN
