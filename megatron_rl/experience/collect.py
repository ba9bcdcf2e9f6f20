"""Take prompts, generate, score: where scored rollouts come from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_rl.batches import RolloutBatch
from megatron_rl.config.schema import RolloutConfig
from megatron_rl.dataflow import Finish, Outcome, Rollout, Sampling, ScoredRollout
from megatron_rl.experience.prompts import PromptStream
from megatron_rl.interfaces import RewardScorer, RolloutEngine

_SAMPLES_SHOWN = 4


def sample_seed(seed: int, step: int, prompt_id: str, sample: int) -> int:
    """The engine's seed for one sample: the same for a run that was resumed or that visits prompts in another order."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # engines take signed 64-bit seeds


@dataclass(frozen=True, kw_only=True)
class FreshRollouts:
    """Generates every step's rollouts in that step: on-policy collection."""

    prompts: PromptStream
    engine: RolloutEngine
    rewards: RewardScorer
    config: RolloutConfig
    seed: int

    def __call__(self, prompts: int, step: int) -> list[ScoredRollout]:
        """The scored rollouts of the next ``prompts`` prompts."""
        taken = self.prompts.take(prompts)
        sampling = Sampling(
            temperature=self.config.temperature, max_tokens=self.config.max_response_tokens, stop=self.config.stop
        )
        seeds = [
            [sample_seed(self.seed, step, prompt.id, index) for index in range(self.config.samples_per_prompt)]
            for prompt in taken
        ]
        return score_rollouts(self.engine.generate(taken, sampling, seeds), self.rewards)


def score_rollouts(rollouts: Sequence[Rollout], rewards: RewardScorer) -> list[ScoredRollout]:
    """Score every sample of ``rollouts``."""
    requests = [
        (sample.text, rollout.prompt.answer, sample.finish) for rollout in rollouts for sample in rollout.samples
    ]
    scores = iter(rewards.score(requests))
    return [ScoredRollout(rollout=rollout, scores=tuple(next(scores) for _ in rollout.samples)) for rollout in rollouts]


def rollout_metrics(scored: Sequence[ScoredRollout], batch: RolloutBatch | None = None) -> dict[str, float]:
    """What the samples and their scores say: rates are shares of all samples, lengths are tokens of the response."""
    samples = [sample for item in scored for sample in item.rollout.samples]
    scores = [score for item in scored for score in item.scores]
    lengths = [len(sample.token_ids) for sample in samples]
    metrics = {
        "score": fmean(score.value for score in scores),
        "accuracy": fmean(score.parts.get("correct", 0.0) for score in scores),
        "format_rate": fmean(score.parts.get("boxed", 0.0) for score in scores),
        "length_mean": fmean(lengths),
        "length_max": float(max(lengths)),
        "truncation_rate": fmean(sample.finish is Finish.LENGTH for sample in samples),
        "timeouts": float(sum(score.outcome is Outcome.TIMEOUT for score in scores)),
        "errors": float(sum(score.outcome is Outcome.ERROR for score in scores)),
        "samples": float(len(samples)),
        "response_tokens": float(sum(lengths)),
    }
    if batch is not None:
        metrics["total_tokens"] = float(batch.lengths.sum())
        metrics["policy_version"] = float(batch.policy_version)
    return metrics


def sample_rows(scored: Sequence[ScoredRollout], step: int) -> list[dict[str, object]]:
    """The first sample of the first few prompts, to read."""
    return [
        {
            "step": step,
            "prompt": item.rollout.prompt.id,
            "answer": item.rollout.prompt.answer,
            "response": item.rollout.samples[0].text,
            "token_ids": list(item.rollout.samples[0].token_ids),
            "score": item.scores[0].value,
            "outcome": item.scores[0].outcome.value,
        }
        for item in scored[:_SAMPLES_SHOWN]
    ]
