from __future__ import annotations

import pytest

from megatron_rl.dataflow import Finish, Outcome, Prompt, Rollout, Sample, Score, ScoredRollout
from megatron_rl.rewards.overlong import OverlongPenalty


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (500, -1.0)]
)
def test_the_penalty_falls_over_the_buffer(length: int, expected: float) -> None:
    assert OverlongPenalty(max_tokens=100, buffer=20).of(length) == pytest.approx(expected)


def test_the_penalty_is_added_to_each_samples_own_score() -> None:
    samples = tuple(Sample(token_ids=(1,) * n, logprobs=(0.0,) * n, text="", finish=Finish.STOP) for n in (5, 9, 10))
    scores = (
        Score(value=1.0, parts={"correct": 1.0}),
        Score(value=-0.5),
        Score(value=-0.5, outcome=Outcome.TIMEOUT),
    )
    rollout = Rollout(prompt=Prompt(id="p", token_ids=(1,), answer="", source=""), samples=samples, policy_version=4)
    shaped = OverlongPenalty(max_tokens=10, buffer=4).apply(ScoredRollout(rollout=rollout, scores=scores))
    assert shaped.rollout is rollout
    assert [score.value for score in shaped.scores] == pytest.approx([1.0, -0.5 - 0.75, -0.5 - 1.0])
    assert [score.parts["overlong"] for score in shaped.scores] == pytest.approx([0.0, -0.75, -1.0])
    assert shaped.scores[0].parts["correct"] == 1.0
    assert shaped.scores[2].outcome is Outcome.TIMEOUT
