"""Where scored rollouts come from: fresh ones, and DAPO's dynamic sampling of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.dataflow import Finish, Outcome, Prompt, Rollout, Sample, Sampling, Score, ScoredRollout
from megatron_rl.experience.collect import (
    DynamicSampling,
    FreshRollouts,
    RewardRuleFails,
    SamplingExhausted,
    rollout_metrics,
    sample_rows,
    sample_seed,
)
from megatron_rl.experience.prompts import PromptStream
from megatron_rl.rewards.overlong import OverlongPenalty

Seeds = Sequence[Sequence[int]]


class CountingEngine:
    """Answers with the prompt's id, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.seeds: list[Seeds] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Seeds) -> list[Rollout]:
        self.asked.append([prompt.id for prompt in prompts])
        self.seeds.append(seeds)
        return [
            Rollout(
                prompt=prompt,
                samples=tuple(
                    Sample(token_ids=(1, 2), logprobs=(-0.1, -0.2), text=f"{prompt.id}/{n}", finish=Finish.STOP)
                    for n, _ in enumerate(own)
                ),
                policy_version=0,
            )
            for prompt, own in zip(prompts, seeds, strict=True)
        ]


class Scorer:
    """Scores by (prompt, sample number); of the prompts in ``unfinished`` no sample is scored."""

    def __init__(
        self,
        score: Callable[[int, int], float],
        *,
        parts: bool = True,
        unfinished: Mapping[int, Outcome] | None = None,
    ) -> None:
        self._score, self._parts, self._unfinished = score, parts, unfinished or {}

    def score(self, requests: Sequence[tuple[str, str, Finish]]) -> list[Score]:
        return [self._score_of(*map(int, text.split("/"))) for text, _, _ in requests]

    def _score_of(self, prompt: int, sample: int) -> Score:
        if prompt in self._unfinished:
            return Score(value=0.0, outcome=self._unfinished[prompt], reason=f"no number in {prompt}")
        value = self._score(prompt, sample)
        return Score(value=value, parts={"correct": float(value == 1), "boxed": 1.0} if self._parts else {})


def _fifty() -> list[Prompt]:
    return [Prompt(id=str(i), token_ids=(1,), answer="", source="") for i in range(50)]


def collecting(
    score: Callable[[int, int], float],
    *,
    rounds: int = 5,
    overlong: OverlongPenalty | None = None,
    parts: bool = True,
    unfinished: Mapping[int, Outcome] | None = None,
    max_error_rate: float = 0.25,
) -> tuple[DynamicSampling, CountingEngine]:
    prompts = _fifty()
    engine = CountingEngine()
    config = RolloutConfig(samples_per_prompt=2, max_response_tokens=4)
    source = FreshRollouts(
        prompts=PromptStream(prompts, seed=0),
        engine=engine,
        rewards=Scorer(score, parts=parts, unfinished=unfinished),
        config=config,
        seed=0,
        max_error_rate=max_error_rate,
        overlong=overlong,
    )
    return DynamicSampling(source=source, max_rounds=rounds), engine


def even_prompts_differ(prompt: int, sample: int) -> float:
    return float(sample) if prompt % 2 == 0 else 1.0


def test_prompts_whose_samples_all_score_the_same_are_replaced() -> None:
    sampling, engine = collecting(even_prompts_differ)
    kept = sampling(8, step=0)
    drawn = [prompt for asked in engine.asked for prompt in asked]
    assert [item.rollout.prompt.id for item in kept] == [prompt for prompt in drawn if int(prompt) % 2 == 0][:8]
    assert len(engine.asked) > 1
    assert all(len({score.value for score in item.scores}) == 2 for item in kept)


def test_a_round_asks_for_what_the_missing_ones_should_take() -> None:
    sampling, engine = collecting(lambda prompt, sample: float(sample) if prompt % 4 else 0.0, rounds=9)
    sampling(12, step=0)
    drawn = kept = 0
    for asked in engine.asked:
        wanted = 12 if not kept else min(12, -(-(12 - kept) * drawn // kept))
        assert len(asked) == wanted
        drawn, kept = drawn + len(asked), kept + sum(int(prompt) % 4 != 0 for prompt in asked)


def test_where_every_prompt_teaches_it_is_plain_collection() -> None:
    sampling, engine = collecting(lambda prompt, sample: float(sample))
    plain, other = collecting(lambda prompt, sample: float(sample))
    assert sampling(6, step=3) == plain.source(6, step=3)
    assert engine.seeds == other.seeds
    assert sampling.take_metrics({})["sampling/rounds"] == 1


def test_what_was_drawn_is_counted_once() -> None:
    sampling, engine = collecting(even_prompts_differ)
    sampling(8, step=0)
    drawn = [int(prompt) for asked in engine.asked for prompt in asked]
    odd = sum(prompt % 2 for prompt in drawn)
    assert sampling.take_metrics({}) == {
        "sampling/rounds": len(engine.asked),
        "sampling/prompts_drawn": len(drawn),
        "sampling/prompts_uniform": odd,
        # one of two samples is right where they differ, both where they do not
        "sampling/score": pytest.approx((odd + (len(drawn) - odd) / 2) / len(drawn)),
        "sampling/accuracy": pytest.approx((odd + (len(drawn) - odd) / 2) / len(drawn)),
        "sampling/timeouts": 0,
        "sampling/errors": 0,
        "sampling/response_tokens": 4 * len(drawn),
    }
    assert sampling.take_metrics({}) == {}


def test_a_rule_that_does_not_say_what_is_correct_has_no_accuracy() -> None:
    sampling, _ = collecting(even_prompts_differ, parts=False)
    sampling(8, step=0)
    names = {name.removeprefix("sampling/") for name in sampling.take_metrics({})}
    assert names == {"rounds", "prompts_drawn", "prompts_uniform", "score", "timeouts", "errors", "response_tokens"}


def test_a_dropped_prompt_that_could_not_be_scored_is_counted_among_what_was_drawn() -> None:
    first, second = (int(prompt.id) for prompt in PromptStream(_fifty(), seed=0).take(2))
    unfinished = {first: Outcome.TIMEOUT, second: Outcome.ERROR}
    sampling, engine = collecting(even_prompts_differ, unfinished=unfinished)
    kept = sampling(8, step=0)
    assert {str(first), str(second)} <= set(engine.asked[0]), "or nothing is tested"
    assert (rollout_metrics(kept)["timeouts"], rollout_metrics(kept)["errors"]) == (0, 0)
    counted = sampling.take_metrics({})
    assert (counted["sampling/timeouts"], counted["sampling/errors"]) == (2, 2)


def test_one_bad_question_in_a_small_round_is_a_small_share_of_the_step() -> None:
    # of the first round seven of eight prompts differ; the second asks for two, the first of which cannot be scored
    order = [int(prompt.id) for prompt in PromptStream(_fifty(), seed=0).take(10)]

    def score(prompt: int, sample: int) -> float:
        return 0.0 if prompt == order[7] else float(sample)

    sampling, engine = collecting(score, unfinished={order[8]: Outcome.ERROR}, max_error_rate=0.25)
    assert len(sampling(8, step=0)) == 8
    assert engine.asked[1][0] == str(order[8])
    assert len(engine.asked[1]) <= 2, "a round of which the bad question is at least half"
    strict, _ = collecting(score, unfinished={order[8]: Outcome.ERROR}, max_error_rate=0.09)
    with pytest.raises(
        RewardRuleFails, match=rf"2 of 20 samples could not be scored, at most .*_rate=0\.09 .*no number in {order[8]}"
    ):
        strict(8, step=0)


def test_too_many_errors_end_plain_collection_and_timeouts_do_not() -> None:
    every = range(50)
    late, _ = collecting(even_prompts_differ, unfinished=dict.fromkeys(every, Outcome.TIMEOUT))
    assert rollout_metrics(late.source(8, step=0))["timeouts"] == 16
    first, *_ = PromptStream(_fifty(), seed=0).take(8)
    few, _ = collecting(even_prompts_differ, unfinished={int(first.id): Outcome.ERROR}, max_error_rate=0.125)
    assert rollout_metrics(few.source(8, step=0))["errors"] == 2
    many, _ = collecting(even_prompts_differ, unfinished={int(first.id): Outcome.ERROR}, max_error_rate=0.12)
    with pytest.raises(RewardRuleFails, match=r"2 of 16 samples could not be scored, at most .*max_error_rate=0\.12 "):
        many.source(8, step=0)


def test_too_few_prompts_end_the_run_and_say_what_was_found() -> None:
    sampling, engine = collecting(lambda prompt, sample: 1.0 if prompt else float(sample), rounds=3)
    message = r"needs 20 prompts .* found 1 among 60 in 3 rounds \(59 prompts all 1\): raise rollout\.sampling_rounds"
    with pytest.raises(SamplingExhausted, match=message):
        sampling(20, step=0)
    assert len(engine.asked) == 3


def test_a_prompt_that_comes_again_in_a_step_is_answered_anew() -> None:
    sampling, engine = collecting(lambda prompt, sample: 0.0, rounds=2)
    with pytest.raises(SamplingExhausted):
        sampling(50, step=0)  # each round is the whole file
    first, second = ({seed for own in seeds for seed in own} for seeds in engine.seeds)
    assert len(first) == len(second) == 100
    assert not first & second


def test_a_prompt_that_comes_twice_at_once_is_answered_anew() -> None:
    _, engine = collecting(even_prompts_differ)
    prompts = [Prompt(id=str(i), token_ids=(1,), answer="", source="") for i in range(3)]
    config = RolloutConfig(samples_per_prompt=2, max_response_tokens=4)
    source = FreshRollouts(
        prompts=PromptStream(prompts, seed=0),
        engine=engine,
        rewards=Scorer(even_prompts_differ),
        config=config,
        seed=0,
        max_error_rate=0.0,
    )
    source(8, 0)
    assert len(set(engine.asked[0])) == 3
    drawn = [seed for own in engine.seeds[0] for seed in own]
    assert len(set(drawn)) == len(drawn) == 16
    first = [sample_seed(0, 0, engine.asked[0][0], number) for number in range(2)]
    assert list(engine.seeds[0][0]) == first


def test_a_resumed_run_draws_the_prompts_that_come_next() -> None:
    whole, engine = collecting(even_prompts_differ)
    whole(8, step=0)
    state = whole.source.prompts.state()
    assert state["taken"] == sum(map(len, engine.asked))
    expected = whole(8, step=1)
    resumed, _ = collecting(even_prompts_differ)
    resumed.source.prompts.restore(state)
    assert resumed(8, step=1) == expected


def test_the_overlong_penalty_is_part_of_the_score_and_of_the_metrics() -> None:
    # two tokens of at most 4, buffer 3: (4 - 3 - 2) / 3
    sampling, _ = collecting(even_prompts_differ, overlong=OverlongPenalty(max_tokens=4, buffer=3))
    scored = sampling(4, step=0)
    assert [score.value for score in scored[0].scores] == pytest.approx([-1 / 3, 1 - 1 / 3])
    metrics = rollout_metrics(scored)
    assert metrics["overlong_penalty"] == pytest.approx(-1 / 3)
    assert metrics["score"] == pytest.approx(0.5 - 1 / 3)
    assert metrics["accuracy"] == 0.5


def with_scores(scores: Sequence[Score]) -> list[ScoredRollout]:
    prompt = Prompt(id="p", token_ids=(1,), answer="1", source="test", text="What is 1?")
    samples = tuple(
        Sample(token_ids=(2,) * (index + 1), logprobs=(0.0,) * (index + 1), text="", finish=Finish.STOP)
        for index in range(len(scores))
    )
    return [ScoredRollout(rollout=Rollout(prompt=prompt, samples=samples, policy_version=0), scores=tuple(scores))]


def test_accuracy_counts_samples_that_were_not_scored_as_wrong() -> None:
    right = {"correct": 1.0, "boxed": 1.0}
    timeout = Score(value=-0.5, outcome=Outcome.TIMEOUT)
    metrics = rollout_metrics(with_scores([Score(value=1.0, parts=right), timeout]))
    assert (metrics["accuracy"], metrics["format_rate"], metrics["timeouts"]) == (0.5, 0.5, 1.0)
    assert metrics["score"] == pytest.approx(0.25)
    assert (metrics["length_mean"], metrics["length_max"]) == (1.5, 2.0)


def test_prompts_that_are_solved_by_any_and_by_all_samples_are_counted() -> None:
    def scored(*right: float) -> list[ScoredRollout]:
        return with_scores([Score(value=value, parts={"correct": value, "boxed": 1.0}) for value in right])

    metrics = rollout_metrics([*scored(1, 1), *scored(0, 1), *scored(1, 0), *scored(0, 0)])
    assert (metrics["accuracy"], metrics["solved_by_any"], metrics["solved_by_all"]) == (0.5, 0.75, 0.25)
    assert not {"solved_by_any", "solved_by_all"} & rollout_metrics(scored(1)).keys()


def test_what_a_rule_does_not_tell_is_left_out() -> None:
    metrics = rollout_metrics(with_scores([Score(value=0.7), Score(value=0.1)]))
    assert metrics["score"] == pytest.approx(0.4)
    assert not {"accuracy", "format_rate", "solved_by_any"} & metrics.keys()


def test_rows_to_read_show_few_samples_and_tell_of_a_change_in_any() -> None:
    scored = with_scores([Score(value=0.0)] * 3) * 6
    first, *others = sample_rows(scored, step=7, count=4)
    assert [row["token_ids"] for row in (first, *others)] == [[2]] * 4
    assert (first["prompt_text"], first["finish"]) == ("What is 1?", "stop")
    assert {row["step_digest"] for row in others} == {first["step_digest"]}
    assert sample_rows(scored, step=8, count=1)[0]["step_digest"] == first["step_digest"]
    last = scored[-1].rollout
    changed = replace(last.samples[2], token_ids=(2, 2, 3))
    other = replace(scored[-1], rollout=replace(last, samples=(*last.samples[:2], changed)))
    assert sample_rows([*scored[:-1], other], step=7, count=4)[0]["step_digest"] != first["step_digest"]
