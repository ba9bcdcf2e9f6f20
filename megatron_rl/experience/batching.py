"""Scored samples become arrays, and arrays become the minibatches of the optimizer's steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_rl.batches import ExperienceBatch, Minibatch, RolloutBatch, TokenRows
from megatron_rl.config.schema import PPOConfig
from megatron_rl.dataflow import Finish, Sample, ScoredRollout
from megatron_rl.interfaces import LossMean
from megatron_rl.maths.means import TokenMean


class StaleRollout(RuntimeError):
    """Samples were not drawn by the trainer's weights."""


class NothingToLearn(RuntimeError):
    """Every sample of a step is left out of the loss."""


def collate(scored: Sequence[ScoredRollout], eos_ids: Sequence[int], *, version: int) -> RolloutBatch:
    """Lay scored samples out as rows, right-padded to the longest.

    Args:
        scored: at least one rollout.
        eos_ids: put the first of these tokens at the end of every response that ends in none of them (appended where
            the row has room up to the longest row, else in place of its last token), as the seed recipe does; without
            any, responses are left as they are.
        version: of the trainer's weights.

    Raises:
        StaleRollout: samples are of another version.
    """
    versions = sorted({item.rollout.policy_version for item in scored})
    if versions != [version]:
        raise StaleRollout(
            f"samples must be drawn by weights of version {version}, the engine used version "
            f"{', '.join(map(str, versions))}: the weight push did not reach it"
        )
    rows = [
        (group, item.rollout.prompt.token_ids, sample, score)
        for group, item in enumerate(scored)
        for sample, score in zip(item.rollout.samples, item.scores, strict=True)
    ]
    width = max(len(prompt) + len(sample.token_ids) for _, prompt, sample, _ in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    response_mask, sampled_mask = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(2))
    rollout_logprobs = torch.zeros(len(rows), width)
    lengths = torch.zeros(len(rows), dtype=torch.int64)
    for row, (_, prompt, sample, _) in enumerate(rows):
        drawn, forced = _with_eos(sample, eos_ids, room=width - len(prompt))
        start, end = len(prompt), len(prompt) + len(drawn)
        tokens[row, :start] = torch.tensor(prompt)
        tokens[row, start:end] = torch.tensor(drawn)
        response_mask[row, start:end] = True
        sampled_mask[row, start : end - forced] = True
        rollout_logprobs[row, start : end - forced] = torch.tensor(sample.logprobs[: len(drawn) - forced])
        lengths[row] = end
    return RolloutBatch(
        tokens=tokens,
        lengths=lengths,
        response_mask=response_mask,
        rollout_logprobs=rollout_logprobs,
        sampled_mask=sampled_mask,
        scores=torch.tensor([score.value for *_, score in rows], dtype=torch.float32),
        truncated=torch.tensor([sample.finish is Finish.LENGTH for _, _, sample, _ in rows]),
        group=torch.tensor([group for group, *_ in rows]),
        policy_version=version,
    )


def _with_eos(sample: Sample, eos_ids: Sequence[int], room: int) -> tuple[list[int], int]:
    """The response's tokens and how many of its last ones were forced (0 or 1)."""
    drawn = list(sample.token_ids)
    if not eos_ids or drawn[-1] in eos_ids:
        return drawn, 0
    return ([*drawn, eos_ids[0]] if len(drawn) < room else [*drawn[:-1], eos_ids[0]]), 1


def minibatches(
    experience: ExperienceBatch, ppo: PPOConfig, mean: LossMean, seed: tuple[int, int]
) -> Iterator[Minibatch[ExperienceBatch]]:
    """Shuffled minibatches, ``ppo.epochs`` times over; ``seed`` is (run, step).

    Each has ``ppo.minibatch_samples`` rows. With ``ppo.mask_truncated`` truncated rows are in none, so that no loss,
    mean or divisor knows of them; what is left is dealt out evenly to as many minibatches, or to one each where fewer
    rows are left than that.

    Raises:
        NothingToLearn: every row is left out.
    """
    batch = experience.rollouts
    kept = (~batch.truncated).nonzero()[:, 0] if ppo.mask_truncated else torch.arange(batch.rows)
    if not len(kept):
        raise NothingToLearn(
            "with ppo.mask_truncated=true a step needs a sample that rollout.max_response_tokens did not cut, all "
            f"{batch.rows} of this one are cut: raise that limit, or set ppo.mask_truncated=false"
        )
    parts = min(batch.rows // ppo.minibatch_samples, len(kept))
    generator = torch.Generator().manual_seed((seed[0] * 1_000_003 + seed[1]) % 2**64)
    for _ in range(ppo.epochs):
        for rows in kept[torch.randperm(len(kept), generator=generator)].tensor_split(parts):
            yield Minibatch(source=experience, rows=rows, loss_weight=mean(batch.response_mask[rows]))


def whole(rows: TokenRows) -> Minibatch[TokenRows]:
    """All of ``rows`` as one minibatch with the mean over tokens."""
    return Minibatch(source=rows, rows=torch.arange(rows.rows), loss_weight=TokenMean()(rows.response_mask))
