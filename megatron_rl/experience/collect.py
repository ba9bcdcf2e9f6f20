"""Take prompts, generate, score: where scored rollouts come from."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from megatron_rl.batches import RolloutBatch
from megatron_rl.config.schema import RolloutConfig
from megatron_rl.dataflow import Finish, Outcome, Rollout, Sampling, Score, ScoredRollout
from megatron_rl.experience.prompts import PromptStream
from megatron_rl.interfaces import RewardScorer, RolloutEngine
from megatron_rl.rewards.overlong import OverlongPenalty


def sample_seed(seed: int, step: int, prompt_id: str, sample: int) -> int:
    """The engine's seed for one sample: the same for a run that was resumed or that visits prompts in another order."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # engines take signed 64-bit seeds


class SamplingExhausted(RuntimeError):
    """Dynamic sampling did not find enough prompts that teach anything."""


class RewardRuleFails(RuntimeError):
    """The reward rule could not score too large a share of the samples."""


@dataclass(frozen=True, kw_only=True)
class FreshRollouts:
    """Generates every step's rollouts in that step: on-policy collection.

    Attributes:
        max_error_rate: the largest share of a step's samples whose rule may fail.
        overlong: added to every score; None adds nothing.
    """

    prompts: PromptStream
    engine: RolloutEngine
    rewards: RewardScorer
    config: RolloutConfig
    seed: int
    max_error_rate: float
    overlong: OverlongPenalty | None = None

    def __call__(self, prompts: int, step: int) -> list[ScoredRollout]:
        """The scored rollouts of the next ``prompts`` prompts.

        Raises:
            RewardRuleFails: the rule failed on too many samples.
        """
        scored = self.draw(prompts, step, first_sample=0)
        check_errors(scored, self.max_error_rate)
        return scored

    def draw(self, prompts: int, step: int, first_sample: int) -> list[ScoredRollout]:
        """The same, with the samples of a prompt numbered from ``first_sample``, so that a prompt that comes again in a
        step is answered anew; so is one that comes twice here, where an epoch ends or is shorter than a step.
        """
        taken = self.prompts.take(prompts)
        sampling = Sampling(
            temperature=self.config.temperature, max_tokens=self.config.max_response_tokens, stop=self.config.stop
        )
        numbers = range(first_sample, first_sample + self.config.samples_per_prompt)
        came: Counter[str] = Counter()
        seeds = []
        for prompt in taken:
            name = f"{prompt.id}/{came[prompt.id]}" if came[prompt.id] else prompt.id
            seeds.append([sample_seed(self.seed, step, name, number) for number in numbers])
            came[prompt.id] += 1
        scored = score_rollouts(self.engine.generate(taken, sampling, seeds), self.rewards)
        return scored if self.overlong is None else [self.overlong.apply(item) for item in scored]


@dataclass(kw_only=True)
class DynamicSampling:
    """Keeps only prompts whose samples differ in score, and draws others in place of the rest: DAPO's dynamic sampling.

    Source: Yu et al., "DAPO" (2025), equation 11, for scores of any value: samples that all score the same have no
    group-relative advantage. The first round draws as many prompts as a step needs, each further one as many as the
    missing ones should take at the share kept so far, and never more than the first. What a round keeps beyond the need
    is left, in the order drawn, so that the prompt stream's position is all there is to resume from.

    Attributes:
        source: where rollouts come from.
        max_rounds: how often it may be asked in a step.
    """

    source: FreshRollouts
    max_rounds: int
    _counts: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, prompts: int, step: int) -> list[ScoredRollout]:
        """The scored rollouts of the next ``prompts`` prompts whose samples differ in score.

        Raises:
            SamplingExhausted: ``max_rounds`` rounds found fewer.
            RewardRuleFails: the rule failed on too many of the samples drawn so far. No round is judged by itself: a
                later one may be so small that one bad question is most of it.
        """
        drawn: list[ScoredRollout] = []
        kept: list[ScoredRollout] = []
        for number in range(self.max_rounds):
            missing = prompts - len(kept)
            asked = min(prompts, math.ceil(missing * len(drawn) / len(kept))) if kept else prompts
            found = self.source.draw(asked, step, first_sample=number * self.source.config.samples_per_prompt)
            drawn += found
            check_errors(drawn, self.source.max_error_rate)
            kept += [item for item in found if not is_uniform(item)]
            if len(kept) >= prompts:
                self._counts = {"sampling/rounds": number + 1.0, **_drawn_metrics(drawn)}
                return kept[:prompts]
        raise SamplingExhausted(_exhausted(drawn, kept, prompts, self.max_rounds))

    def take_metrics(self, _step: Mapping[str, float]) -> dict[str, float]:
        """What the last step drew, once; nothing where no step was collected since.

        Returns:
            under ``sampling/``: ``rounds``; ``prompts_drawn``, ``prompts_uniform``; and of all samples drawn, the
            dropped ones too, ``score``, ``accuracy`` (where the rule says what is correct), ``timeouts``, ``errors``
            and ``response_tokens`` (those under ``rollout/`` speak of the kept ones).
        """
        counts, self._counts = self._counts, {}
        return counts


def is_uniform(scored: ScoredRollout) -> bool:
    """Whether all samples of a prompt have the same score."""
    return len({score.value for score in scored.scores}) == 1


def _drawn_metrics(drawn: Sequence[ScoredRollout]) -> dict[str, float]:
    every = rollout_metrics(drawn)
    told = ("score", "accuracy", "timeouts", "errors", "response_tokens")
    return {
        "sampling/prompts_drawn": float(len(drawn)),
        "sampling/prompts_uniform": float(sum(map(is_uniform, drawn))),
        **{f"sampling/{name}": every[name] for name in told if name in every},
    }


def _exhausted(drawn: Sequence[ScoredRollout], kept: Sequence[ScoredRollout], prompts: int, rounds: int) -> str:
    common = Counter(item.scores[0].value for item in drawn if is_uniform(item)).most_common(3)
    listed = ", ".join(f"{count} prompts all {value:g}" for value, count in common)
    return (
        f"dynamic sampling needs {prompts} prompts whose samples differ in score, found {len(kept)} among "
        f"{len(drawn)} in {rounds} rounds ({listed}): raise rollout.sampling_rounds or rollout.samples_per_prompt, or "
        "use questions that are neither too easy nor too hard"
    )


def score_rollouts(rollouts: Sequence[Rollout], rewards: RewardScorer) -> list[ScoredRollout]:
    """Score every sample of ``rollouts``."""
    requests = [
        (sample.text, rollout.prompt.answer, sample.finish) for rollout in rollouts for sample in rollout.samples
    ]
    scores = iter(rewards.score(requests))
    return [ScoredRollout(rollout=rollout, scores=tuple(next(scores) for _ in rollout.samples)) for rollout in rollouts]


def check_errors(scored: Sequence[ScoredRollout], max_error_rate: float) -> None:
    """Refuse samples of which the rule could not score too many. Time-outs do not count: hostile text may cause them.

    Raises:
        RewardRuleFails: more than the share ``max_error_rate`` are errors.
    """
    scores = [score for item in scored for score in item.scores]
    failed = [score for score in scores if score.outcome is Outcome.ERROR]
    if len(failed) > max_error_rate * len(scores):
        raise RewardRuleFails(
            f"{len(failed)} of {len(scores)} samples could not be scored, at most reward.max_error_rate="
            f"{max_error_rate:g} of them may fail; the first one: {failed[0].reason or 'the rule said so itself'}. "
            "Correct the reward rule, or raise the limit"
        )


def rollout_metrics(scored: Sequence[ScoredRollout], batch: RolloutBatch | None = None) -> dict[str, float]:
    """What the samples and their scores say: rates are shares of all samples, lengths are tokens of the response.

    Accuracy and format rate are there where the rule tells them, as parts ``correct`` and ``boxed`` of its scores;
    where prompts have several samples, so are the shares of prompts with a right one and with right ones alone.
    """
    samples = [sample for item in scored for sample in item.rollout.samples]
    scores = [score for item in scored for score in item.scores]
    lengths = [len(sample.token_ids) for sample in samples]
    metrics = {
        "score": fmean(score.value for score in scores),
        **_shares(scores, accuracy="correct", format_rate="boxed"),
        **_solved(scored),
        "length_mean": fmean(lengths),
        "length_max": float(max(lengths)),
        "truncation_rate": fmean(sample.finish is Finish.LENGTH for sample in samples),
        "timeouts": float(sum(score.outcome is Outcome.TIMEOUT for score in scores)),
        "errors": float(sum(score.outcome is Outcome.ERROR for score in scores)),
        "samples": float(len(samples)),
        "response_tokens": float(sum(lengths)),
    }
    penalties = [score.parts["overlong"] for score in scores if "overlong" in score.parts]
    if penalties:
        metrics["overlong_penalty"] = fmean(penalties)
    if batch is not None:
        metrics["total_tokens"] = float(batch.lengths.sum())
        metrics["policy_version"] = float(batch.policy_version)
    return metrics


def _shares(scores: Sequence[Score], **parts: str) -> dict[str, float]:
    """Means of the parts of a score, those that did not finish counted as 0; what a rule does not tell is left out."""
    return {
        name: fmean(score.parts.get(part, 0.0) for score in scores)
        for name, part in parts.items()
        if any(part in score.parts for score in scores)
    }


def _solved(scored: Sequence[ScoredRollout]) -> dict[str, float]:
    """Shares of prompts with any right sample (pass@n), and with right ones alone."""
    if not any("correct" in score.parts for item in scored for score in item.scores):
        return {}
    right = [[score.parts.get("correct", 0.0) == 1 for score in item.scores] for item in scored]
    if max(map(len, right)) == 1:
        return {}
    return {"solved_by_any": fmean(map(any, right)), "solved_by_all": fmean(map(all, right))}


def sample_rows(scored: Sequence[ScoredRollout], step: int, *, count: int) -> list[dict[str, object]]:
    """The first sample of the first ``count`` prompts, to read; each with a digest of all samples' tokens, by which two
    runs tell whether they drew the same.
    """
    digest = token_digest(scored)
    return [
        {
            "step": step,
            "prompt": item.rollout.prompt.id,
            "prompt_text": item.rollout.prompt.text,
            "answer": item.rollout.prompt.answer,
            "response": item.rollout.samples[0].text,
            "finish": item.rollout.samples[0].finish.value,
            "token_ids": list(item.rollout.samples[0].token_ids),
            "score": item.scores[0].value,
            "outcome": item.scores[0].outcome.value,
            "step_digest": digest,
        }
        for item in scored[:count]
    ]


def token_digest(scored: Sequence[ScoredRollout]) -> str:
    """blake2b-128 over the prompt id and the token ids of every sample, in order."""
    drawn = [(item.rollout.prompt.id, [sample.token_ids for sample in item.rollout.samples]) for item in scored]
    return hashlib.blake2b(json.dumps(drawn).encode(), digest_size=16).hexdigest()
