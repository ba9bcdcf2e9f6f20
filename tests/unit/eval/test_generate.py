from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from eval.generate import batches, part_size, plan_draws, responses
from eval.tasks import Problem, ProblemSet
from megatron_rl.dataflow import Finish, Rollout, Sample, Sampling


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({"x": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def problem_set(*questions, name="t"):
    problems = tuple(Problem(id=str(n), question=question, gold="1") for n, question in enumerate(questions))
    return ProblemSet(name=name, title=name, file=Path("f"), sha256="", problems=problems)


def plan(tokenizer, problems, done=(), samples=2, **changes):
    return plan_draws(
        problems,
        set(done),
        tokenizer,
        **({"template": "{question} x", "samples": samples, "max_tokens": 4, "max_positions": 8} | changes),
    )


class EchoEngine:
    """Answers with the seed it was given, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, sampling, seeds):
        self.asked.append((len(prompts), sampling.max_tokens, threading.get_ident()))
        return [
            Rollout(
                prompt=prompt,
                samples=tuple(
                    Sample(token_ids=(1, 2), logprobs=(0.0, 0.0), text=str(seed), finish=Finish.STOP) for seed in of
                ),
                policy_version=0,
            )
            for prompt, of in zip(prompts, seeds, strict=True)
        ]


def drawn(tokenizer, parts, engines=None):
    found = responses(engines or [EchoEngine()], parts, Sampling(temperature=1.0, max_tokens=4), seed=5)
    return {(item.id, item.sample): item for part in found for item in part}


def test_only_what_is_missing_is_drawn(tokenizer):
    left = plan(tokenizer, problem_set("x", "x", "x"), done=[("0", 0), ("1", 0), ("1", 1)])
    assert [(item.prompt.id, item.numbers) for item in left] == [("0", (1,)), ("2", (0, 1))]
    assert left[0].text == "x x"
    assert left[0].prompt.token_ids == (0, 0)


def test_a_sample_is_the_same_in_any_order_and_after_a_resumption(tokenizer):
    everything = drawn(tokenizer, batches(plan(tokenizer, problem_set("x", "x", "x")), 100))
    assert len({item.response for item in everything.values()}) == 6
    rest = plan(tokenizer, problem_set("x", "x", "x"), done=[("0", 0), ("1", 0), ("1", 1)])
    again = drawn(tokenizer, batches(list(reversed(rest)), 1))
    assert again == {key: everything[key] for key in [("0", 1), ("2", 0), ("2", 1)]}
    more = drawn(tokenizer, batches(plan(tokenizer, problem_set("x", "x", "x"), samples=3), 100))
    assert {key: item for key, item in more.items() if key in everything} == everything


def test_a_long_prompt_gets_the_room_that_is_left_or_an_empty_response(tokenizer):
    left = plan(tokenizer, problem_set("x", "x x x x x", "x x x x x x x x"), samples=1)
    assert [item.max_tokens for item in left] == [4, 2, 0]
    engine = EchoEngine()
    found = drawn(tokenizer, batches(left, 100), [engine])
    assert sorted(asked[:2] for asked in engine.asked) == [(1, 2), (1, 4)]
    assert (found["2", 0].response, found["2", 0].finish, found["2", 0].tokens) == ("", Finish.LENGTH, 0)
    assert found["1", 0].tokens == 2


def test_parts_have_about_the_size_asked_for_and_one_task_each(tokenizer):
    draws = plan(tokenizer, problem_set(*"xxxxx", name="b")) + plan(tokenizer, problem_set(*"xx", name="a"))
    parts = batches(draws, 4)
    assert [[(item.prompt.source, item.prompt.id) for item in part] for part in parts] == [
        [("a", "0"), ("a", "1")],
        [("b", "0"), ("b", "1")],
        [("b", "2"), ("b", "3")],
        [("b", "4")],
    ]


def test_long_responses_come_in_smaller_parts():
    assert [part_size(256, tokens) for tokens in (1, 3_000, 4_096, 8_192, 16_384, 100_000)] == [
        *(1024, 1024, 1024, 512, 256, 256)
    ]


def test_many_samples_of_one_problem_are_several_parts(tokenizer):
    parts = batches(plan(tokenizer, problem_set("x", "x"), samples=5), 2)
    assert [[(item.prompt.id, item.numbers) for item in part] for part in parts] == [
        *([("0", (0, 1))], [("0", (2, 3))], [("0", (4,)), ("1", (0, 1))], [("1", (2, 3))], [("1", (4,))])
    ]


def test_several_engines_work_at_the_same_time(tokenizer):
    both = threading.Barrier(2, timeout=10)

    class Meeting(EchoEngine):
        def generate(self, prompts, sampling, seeds):
            both.wait()  # passes only if the other one is at work too
            return super().generate(prompts, sampling, seeds)

    parts = batches(plan(tokenizer, problem_set(*"xxxx"), samples=1), 1)
    found = drawn(tokenizer, parts, [Meeting(), Meeting()])
    assert found == drawn(tokenizer, parts)


def test_an_engine_that_fails_ends_it(tokenizer):
    class Failing(EchoEngine):
        def generate(self, prompts, sampling, seeds):
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        drawn(tokenizer, batches(plan(tokenizer, problem_set("x")), 1), [Failing()])


def test_an_interrupt_does_not_wait_for_what_is_under_way(tokenizer):
    """The engines are closed by whoever opened them, and a closed engine ends what it was asked for."""
    started, closed, ended = threading.Event(), threading.Event(), threading.Event()

    class Slow(EchoEngine):
        def generate(self, prompts, sampling, seeds):
            if self.asked:
                started.set()
                assert closed.wait(5)
                ended.set()
                raise RuntimeError("closed")
            return super().generate(prompts, sampling, seeds)

    engine = Slow()
    parts = batches(plan(tokenizer, problem_set(*"xxx"), samples=1), 1)
    found = responses([engine], parts, Sampling(temperature=1.0, max_tokens=4), seed=5)
    next(found)
    assert started.wait(5)
    with pytest.raises(KeyboardInterrupt):
        found.throw(KeyboardInterrupt)
    assert not ended.is_set()
    closed.set()
    assert ended.wait(5)
    assert len(engine.asked) == 1  # the third part was never asked for
