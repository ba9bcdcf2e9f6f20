"""Scored samples as rows, and rows as minibatches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_rl.batches import ExperienceBatch, RolloutBatch
from megatron_rl.config.schema import PPOConfig
from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample, Score, ScoredRollout
from megatron_rl.experience.batching import StaleRollout, collate, minibatches
from megatron_rl.interfaces import LossMean
from megatron_rl.maths.means import ConstantMean, SequenceMean, TokenMean

EOS = 9


def scored(prompt: tuple[int, ...], *responses: tuple[int, ...], version: int = 3) -> ScoredRollout:
    samples = tuple(
        Sample(
            token_ids=response,
            logprobs=tuple(-0.1 * (i + 1) for i in range(len(response))),
            text="",
            finish=Finish.STOP if response[-1] == EOS else Finish.LENGTH,
        )
        for response in responses
    )
    rollout = Rollout(
        prompt=Prompt(id="p", token_ids=prompt, answer="", source=""), samples=samples, policy_version=version
    )
    return ScoredRollout(rollout=rollout, scores=tuple(Score(value=float(i)) for i in range(len(samples))))


def test_rows_hold_prompt_then_response_and_masks_follow_tokens_not_pad_ids() -> None:
    batch = collate([scored((0, 1), (5, EOS), (6, 7, 8)), scored((2,), (0, EOS))], (), version=3)
    assert batch.tokens.tolist() == [[0, 1, 5, 9, 0], [0, 1, 6, 7, 8], [2, 0, 9, 0, 0]]
    assert batch.lengths.tolist() == [4, 5, 3]
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert batch.rollout_logprobs[1].tolist() == pytest.approx([0, 0, -0.1, -0.2, -0.3])
    assert batch.scores.tolist() == [0, 1, 0]
    assert batch.group.tolist() == [0, 0, 1]


def test_forced_eos_is_appended_where_there_is_room_and_else_replaces_the_last_token() -> None:
    batch = collate([scored((1,), (5, 6), (5, 6, 7))], (EOS,), version=3)
    assert batch.tokens.tolist() == [[1, 5, 6, EOS], [1, 5, 6, EOS]]
    assert batch.response_mask.int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]
    assert batch.sampled_mask.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0]]
    assert batch.rollout_logprobs.tolist()[1] == pytest.approx([0, -0.1, -0.2, 0])


def test_an_eos_that_was_sampled_is_left_alone() -> None:
    batch = collate([scored((1,), (5, EOS), (6, 7, EOS))], (EOS,), version=3)
    assert batch.tokens.tolist() == [[1, 5, 9, 0], [1, 6, 7, 9]]
    assert torch.equal(batch.sampled_mask, batch.response_mask)


def test_a_response_that_ended_by_another_token_that_ends_samples_is_left_alone() -> None:
    batch = collate([scored((1,), (5, EOS), (6, 7, 4), (8,))], (4, EOS), version=3)
    assert batch.tokens.tolist() == [[1, 5, EOS, 0], [1, 6, 7, 4], [1, 8, 4, 0]]
    assert (batch.response_mask & ~batch.sampled_mask).int().tolist() == [[0] * 4, [0] * 4, [0, 0, 1, 0]]


def test_stale_or_future_samples_are_refused() -> None:
    rollouts = [scored((1,), (5, EOS))]
    assert collate(rollouts, (), version=3).policy_version == 3
    for version in (2, 4):
        with pytest.raises(StaleRollout, match=f"version {version}, the engine used version 3"):
            collate(rollouts, (), version=version)


def test_mixed_versions_are_refused() -> None:
    with pytest.raises(StaleRollout, match="2, 3"):
        collate([scored((1,), (5,)), scored((1,), (5,), version=2)], (), version=3)


def experience(batch: RolloutBatch) -> ExperienceBatch:
    zeros = torch.zeros(batch.tokens.shape)
    return ExperienceBatch(
        rollouts=batch,
        old_logprobs=zeros,
        ref_logprobs=None,
        values=zeros,
        rewards=zeros,
        advantages=zeros,
        returns=zeros,
    )


def test_minibatches_visit_every_row_once_an_epoch_in_an_order_that_the_seed_fixes() -> None:
    batch = collate([scored((1,), *[(5, EOS)] * 8)], (), version=3)
    ppo = PPOConfig(minibatch_samples=4, epochs=2)
    order = [m.rows.tolist() for m in minibatches(experience(batch), ppo, TokenMean(), seed=(7, 1))]
    again = [m.rows.tolist() for m in minibatches(experience(batch), ppo, TokenMean(), seed=(7, 1))]
    other = [m.rows.tolist() for m in minibatches(experience(batch), ppo, TokenMean(), seed=(7, 2))]
    assert order == again != other
    assert sorted(order[0] + order[1]) == sorted(order[2] + order[3]) == list(range(8))
    assert len(list(minibatches(experience(batch), ppo, TokenMean(), seed=(20250101120000, 1)))) == 4


def test_weights_make_the_mean_that_they_are_named_after() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    terms = torch.tensor([[9, 1, 2, 3, 4], [9, 8, 9, 9, 9], [9, 5, 7, 9, 9.0]])

    def mean(weigh: LossMean) -> float:
        return float((weigh(mask) * terms).sum() / mask.sum())

    assert mean(SequenceMean()) == pytest.approx((2.5 + 8.0 + 6.0) / 3)
    assert mean(TokenMean()) == pytest.approx((10 + 8 + 12) / 7)
    assert mean(ConstantMean(tokens=5)) == pytest.approx((10 / 5 + 8 / 5 + 12 / 5) / 3)


@pytest.mark.parametrize("mean", [TokenMean(), SequenceMean(), ConstantMean(tokens=5)])
def test_a_row_without_loss_tokens_does_not_count_as_a_sample(mean: LossMean) -> None:
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]], dtype=torch.bool)
    padded = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)])
    torch.testing.assert_close(mean(padded)[:2], mean(mask))
    assert mean(padded)[2].tolist() == [0, 0, 0]


def test_a_batch_of_the_wrong_shape_says_what_it_got() -> None:
    batch = collate([scored((1,), (5, EOS))], (), version=3)
    with pytest.raises(ValueError, match=r"rollout_logprobs must be torch.float32 of shape \(1, 3\), got .*\(2, 3\)"):
        dataclasses.replace(batch, rollout_logprobs=torch.zeros(2, 3))
