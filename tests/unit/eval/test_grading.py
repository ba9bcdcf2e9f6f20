from __future__ import annotations

from eval.grading import Grader, same_answers
from eval.metrics import vote
from megatron_rl.dataflow import Score
from megatron_rl.rewards.rules import RULES
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
