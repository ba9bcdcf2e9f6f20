from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from megatron_rl.dataflow import Finish, Outcome, Prompt, Rollout, Sample, Score, ScoredRollout
from megatron_rl.experience.collect import rollout_metrics


def scored(scores: Sequence[Score]) -> list[ScoredRollout]:
    prompt = Prompt(id="p", token_ids=(1,), answer="1", source="test")
    samples = tuple(
        Sample(token_ids=(2,) * (index + 1), logprobs=(0.0,) * (index + 1), text="", finish=Finish.STOP)
        for index in range(len(scores))
    )
    return [ScoredRollout(rollout=Rollout(prompt=prompt, samples=samples, policy_version=0), scores=tuple(scores))]


def test_accuracy_counts_samples_that_were_not_scored_as_wrong() -> None:
    right: Mapping[str, float] = {"correct": 1.0, "boxed": 1.0}
    timeout = Score(value=-0.5, outcome=Outcome.TIMEOUT)
    metrics = rollout_metrics(scored([Score(value=1.0, parts=right), timeout]))
    assert (metrics["accuracy"], metrics["format_rate"], metrics["timeouts"]) == (0.5, 0.5, 1.0)
    assert metrics["score"] == pytest.approx(0.25)
    assert (metrics["length_mean"], metrics["length_max"]) == (1.5, 2.0)


def test_what_a_rule_does_not_tell_is_left_out() -> None:
    metrics = rollout_metrics(scored([Score(value=0.7), Score(value=0.1)]))
    assert metrics["score"] == pytest.approx(0.4)
    assert not {"accuracy", "format_rate"} & metrics.keys()
