from __future__ import annotations

import json

from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample
from megatron_rl.experience.expected_length import ExpectedLength


def rollout(source: str, prompt_tokens: int, *lengths: int) -> Rollout:
    samples = tuple(
        Sample(token_ids=(1,) * length, logprobs=(0.0,) * length, text="", finish=Finish.STOP) for length in lengths
    )
    prompt = Prompt(id="p", token_ids=(1,) * prompt_tokens, answer="", source=source)
    return Rollout(prompt=prompt, samples=samples, policy_version=0)


def test_the_mean_runs_by_source_and_size_of_prompt() -> None:
    first = [rollout("a", 4, 10, 20), rollout("a", 7, 30), rollout("a", 8, 100), rollout("b", 4, 2)]
    expected = ExpectedLength().after(first)
    assert expected.of(rollout("a", 5).prompt, 1000) == 20  # 4 to 7 tokens: 10, 20 and 30
    assert expected.of(rollout("a", 15).prompt, 1000) == 100
    assert expected.of(rollout("b", 6).prompt, 1000) == 2
    later = expected.after([rollout("a", 4, 40)])
    assert later.of(rollout("a", 4).prompt, 1000) == 30  # half of 20 and half of 40
    assert later.of(rollout("b", 4).prompt, 1000) == 2


def test_what_was_never_seen_counts_as_the_longest_and_nothing_counts_more() -> None:
    expected = ExpectedLength().after([rollout("a", 4, 90)])
    assert expected.of(rollout("c", 4).prompt, 50) == 50
    assert expected.of(rollout("a", 4).prompt, 50) == 50
    assert ExpectedLength().of(rollout("a", 4).prompt, 7) == 7


def test_its_state_is_plain_and_exact() -> None:
    expected = ExpectedLength().after([rollout("a", 4, 1, 1, 5), rollout("b", 9, 7)])
    assert ExpectedLength.restored(json.loads(json.dumps(expected.state()))) == expected
    assert ExpectedLength.restored([]) == ExpectedLength()
