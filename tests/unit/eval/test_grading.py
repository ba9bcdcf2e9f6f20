from __future__ import annotations

import pytest

from eval.grading import Grader, check_rule, grade, same_answers
from eval.metrics import vote
from eval.tasks import BadInput
from megatron_rl.dataflow import Outcome, Score
from megatron_rl.rewards.rules import RULES, CorrectnessRule, FileRule, RewardRule
from megatron_rl.rewards.service import RewardService
from tests.unit.eval.builders import graded


class Values:
    """Compares answers by the number they begin with, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def score(self, requests):
        self.asked.append([(later, first) for later, first, _ in requests])
        return [Score(value=float(later[0] == first[0])) for later, first, _ in requests]


def same(samples, comparer):
    return same_answers(samples, Grader(name="boxed", rule=RULES["boxed"], scorer=comparer, comparer=comparer))


def test_an_answer_is_compared_with_the_first_of_each_group_until_it_joins_one():
    comparer = Values()
    answers = ["1a", "2a", "1b", "2b", "1a", "1c", None, "3a"]
    samples = [graded("p", number, answer) for number, answer in enumerate(answers)]
    found = same([*reversed(samples), graded("q", 0, "4a"), graded("q", 1, "4b")], comparer)
    assert comparer.asked == [
        [("2a", "1a"), ("1b", "1a"), ("2b", "1a"), ("1c", "1a"), ("3a", "1a"), ("4b", "4a")],
        [("2b", "2a"), ("3a", "2a")],
    ]
    assert found("1c", "1a")
    assert not found("3a", "2a")
    assert vote(answers, found) == 0


def test_equal_answers_cost_one_comparison_each():
    comparer = Values()
    same([graded("p", number, f"1{number}") for number in range(30)], comparer)
    assert sum(map(len, comparer.asked)) == 29


class Always:
    """Gives every response the same score."""

    def __init__(self, score):
        self.given = score

    def score(self, requests):
        return [self.given] * len(requests)


class NotHere(CorrectnessRule):
    """A rule that must not run in this process."""

    def __call__(self, text, answer, finish):
        raise AssertionError

    def prediction(self, text):
        raise AssertionError


SAID = Score(value=1.0, parts={"correct": 1.0}, answer="7")
SILENT = Score(value=1.0, parts={"correct": 1.0})


@pytest.mark.parametrize(
    ("rule", "score", "extracted"),
    [
        (NotHere(), SAID, "7"),
        (NotHere(), SILENT, None),
        (NotHere(), Score(value=0.0, outcome=Outcome.TIMEOUT), "1"),
        (FileRule("mine.py", "mine"), SAID, "7"),
        (FileRule("mine.py", "mine"), SILENT, "1"),
    ],
)
def test_what_was_compared_is_what_the_worker_says_or_the_last_box(
    rule: RewardRule, score: Score, extracted: str | None
) -> None:
    scorer = Always(score)
    (sample,) = grade([graded("p", 0, "1")], Grader(name="r", rule=rule, scorer=scorer, comparer=scorer))
    assert sample.extracted == extracted


@pytest.mark.parametrize(
    ("name", "response", "answer"),
    [
        ("final_answer", "The answer is 7.", "7"),
        ("seed", "I should have boxed 7", "7"),
        ("boxed", "so \\boxed{7}", "7"),
        ("correctness", "The answer is 7.", None),
    ],
)
def test_a_worker_says_which_answer_its_rule_read(name: str, response: str, answer: str | None) -> None:
    with RewardService(name) as service:
        (sample,) = grade(
            [graded("p", 0, "1", response=response)],
            Grader(name=name, rule=RULES[name], scorer=service, comparer=service),
        )
    assert sample.extracted == answer


class Listed:
    """Ends the scoring of each gold as listed, and remembers which it was asked."""

    def __init__(self, outcomes):
        self.outcomes = outcomes
        self.asked = []

    def score(self, requests):
        self.asked = [gold for _, gold, _ in requests]
        return [Score(value=0.0, parts={"correct": 0.0}, outcome=self.outcomes[gold]) for gold in self.asked]


def checked(outcomes, golds):
    scorer = Listed(outcomes)
    return check_rule(Grader(name="r", rule=RULES["boxed"], scorer=scorer, comparer=scorer), golds), scorer.asked


def test_a_rule_is_tried_on_eight_different_reference_answers():
    outcomes = {f"{number}": Outcome.SCORED for number in range(10)}
    assert checked(outcomes, ["0", "0", *outcomes]) == ("", [f"{number}" for number in range(8)])


@pytest.mark.parametrize(
    ("first", "second"),
    [(Outcome.ERROR, Outcome.SCORED), (Outcome.TIMEOUT, Outcome.TIMEOUT), (Outcome.ERROR, Outcome.TIMEOUT)],
)
def test_a_reference_answer_that_a_rule_does_not_score_is_told_and_is_no_end(first: Outcome, second: Outcome) -> None:
    told, _ = checked({"a": first, "b": second}, ["a", "b"])
    failed = sum(outcome is not Outcome.SCORED for outcome in (first, second))
    assert told.startswith(
        f"rule r did not score {failed} of 2 responses that box a reference answer: 'a' ({first.value})"
    )


def test_a_rule_that_raises_on_every_reference_answer_is_refused():
    with pytest.raises(BadInput, match=r"on each of 2 that box a reference answer, such as .* the gold answer 'a'"):
        checked({"a": Outcome.ERROR, "b": Outcome.ERROR}, ["a", "b"])
