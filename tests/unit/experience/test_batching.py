"""Scored samples as rows, and rows as minibatches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_rl.batches import ExperienceBatch, MicroBatch, RolloutBatch, TokenOutputs, ValueOutputs
from megatron_rl.config.schema import PPOConfig
from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample, Score, ScoredRollout
from megatron_rl.experience.batching import NothingToLearn, StaleRollout, collate, minibatches
from megatron_rl.experience.build import experience_metrics
from megatron_rl.experience.packing import pack
from megatron_rl.interfaces import LossMean
from megatron_rl.maths.kl import KlControl
from megatron_rl.maths.losses import PolicyLoss, ValueLoss
from megatron_rl.maths.means import ConstantMean, SequenceMean, TokenMean
from tests.fakes import fake_config

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


@pytest.mark.parametrize("eos_ids", [(), (EOS,)])
def test_a_sample_is_truncated_by_its_finish_never_by_its_last_token(eos_ids: tuple[int, ...]) -> None:
    item = scored((1,), (5, EOS), (6, 7), (8, EOS))
    finishes = (Finish.LENGTH, Finish.STOP, Finish.STOP)  # cut at an EOS of the text; ended by a stop string; ended
    samples = tuple(dataclasses.replace(s, finish=f) for s, f in zip(item.rollout.samples, finishes, strict=True))
    item = dataclasses.replace(item, rollout=dataclasses.replace(item.rollout, samples=samples))
    assert collate([item], eos_ids, version=3).truncated.tolist() == [True, False, False]


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


def cut(*rows: int, of: int) -> ExperienceBatch:
    """Samples of two tokens, of which these are truncated."""
    batch = collate([scored((1,), *[(5, EOS)] * of)], (), version=3)
    return experience(dataclasses.replace(batch, truncated=torch.isin(torch.arange(of), torch.tensor(rows))))


def test_truncated_samples_are_trained_on_unless_they_are_masked() -> None:
    found = list(minibatches(cut(1, 2, 5, of=8), PPOConfig(minibatch_samples=4), TokenMean(), seed=(7, 1)))
    expected = torch.randperm(8, generator=torch.Generator().manual_seed(7 * 1_000_003 + 1)).split(4)
    assert [m.rows.tolist() for m in found] == [rows.tolist() for rows in expected]


def test_masked_samples_are_in_no_minibatch_and_the_others_are_dealt_out_evenly() -> None:
    ppo = PPOConfig(minibatch_samples=4, epochs=2, mask_truncated=True)
    rows = [m.rows.tolist() for m in minibatches(cut(1, 2, 5, of=8), ppo, TokenMean(), seed=(7, 1))]
    assert [len(each) for each in rows] == [3, 2, 3, 2]
    assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3]) == [0, 3, 4, 6, 7]
    assert rows[:2] != rows[2:]


def test_no_minibatch_is_empty_where_fewer_samples_are_left_than_there_are_minibatches() -> None:
    ppo = PPOConfig(minibatch_samples=2, epochs=2, mask_truncated=True)
    rows = [m.rows.tolist() for m in minibatches(cut(0, 1, 2, 4, 5, 7, of=8), ppo, TokenMean(), seed=(7, 1))]
    assert sorted(rows[:2]) == sorted(rows[2:]) == [[3], [6]]


def test_a_step_of_which_every_sample_is_masked_says_what_to_change() -> None:
    source = cut(0, 1, 2, 3, of=4)
    assert len(list(minibatches(source, PPOConfig(minibatch_samples=2), TokenMean(), seed=(7, 1)))) == 2
    ppo = PPOConfig(minibatch_samples=2, mask_truncated=True)
    with pytest.raises(NothingToLearn, match=r"all 4 of this one are cut: raise that limit, or set ppo.mask_truncated"):
        next(minibatches(source, ppo, TokenMean(), seed=(7, 1)))


@pytest.mark.parametrize("masked", [True, False])
def test_shares_of_samples_and_tokens_that_are_masked_are_told(tmp_path: Path, masked: bool) -> None:
    batch = collate([scored((1,), (5, EOS), (6, 7, 8), (EOS,))], (), version=3)  # the second one is cut
    ppo = PPOConfig(mask_truncated=masked)
    found = experience_metrics(experience(batch), KlControl(0.0), fake_config(tmp_path, ppo=ppo))
    told = {name: value for name, value in found.items() if name.startswith("masked")}
    assert told == (pytest.approx({"masked_samples": 1 / 3, "masked_tokens": 3 / 6}) if masked else {})


@pytest.mark.parametrize(
    ("mean", "masked", "policy", "value"),
    [
        # of tokens: (3 + 3 + 2) / 3; all: (3 + 3 + 2 + 3 x -5) / 6. Half the squared return: (4 + 4 + 1) / 2 / 3
        (TokenMean(), True, -8 / 3, 1.5),
        (TokenMean(), False, 7 / 6, (4 + 4 + 1 + 3 * 16) / 2 / 6),
        # of samples: (3 + 2) / 2; all: (3 + 2 - 5) / 3
        (SequenceMean(), True, -2.5, (4 + 1) / 2 / 2),
        (SequenceMean(), False, 0.0, (4 + 1 + 16) / 2 / 3),
        # 4 tokens a sample: (3 + 3 + 2) / 4 / 2
        (ConstantMean(tokens=4), True, -1.0, (4 + 4 + 1) / 2 / 4 / 2),
        (ConstantMean(tokens=4), False, 7 / 4 / 3, (4 + 4 + 1 + 3 * 16) / 2 / 4 / 3),
    ],
)
def test_both_losses_and_their_divisors_leave_masked_samples_out(
    mean: LossMean, masked: bool, policy: float, value: float
) -> None:
    batch = collate([scored((1,), (5, EOS), (6, 7, 8), (EOS,))], (), version=3)
    mask = batch.response_mask
    source = dataclasses.replace(
        experience(batch),
        advantages=torch.tensor([3.0, -5.0, 2.0])[:, None] * mask,
        returns=torch.tensor([2.0, -4.0, 1.0])[:, None] * mask,
    )
    ppo = PPOConfig(minibatch_samples=3, mask_truncated=masked)
    (minibatch,) = minibatches(source, ppo, mean, seed=(7, 1))
    packed = pack(minibatch, range(len(minibatch.rows)))
    assert isinstance(packed, MicroBatch)
    zeros = torch.zeros(len(packed.targets))
    tokens = int(mask[minibatch.rows].sum())
    assert tokens == (3 if masked else 6)
    of_policy = PolicyLoss()(TokenOutputs(logprobs=zeros, entropy=zeros), packed)
    of_critic = ValueLoss(clip=float("inf"))(ValueOutputs(values=zeros), packed)
    assert float(of_policy.total) / tokens == pytest.approx(policy, abs=1e-6)
    assert float(of_critic.total) / tokens == pytest.approx(value)


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
