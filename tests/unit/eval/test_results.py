from __future__ import annotations

import math

import pytest

from eval.results import averages, table, task_results
from megatron_rl.dataflow import Finish, Outcome
from tests.unit.eval.builders import graded


def never(_later, _first):
    return False


def test_the_numbers_of_three_problems_by_hand():
    samples = [
        *[graded("a", n, answer) for n, answer in enumerate(["1", "1", "2", "1"])],
        *[graded("b", n, answer) for n, answer in enumerate(["2", "1", None, "3"])],
        *[graded("c", n, answer) for n, answer in enumerate([None, None, "2", "2"])],
    ]
    found = task_results(samples, never, seed=0)
    assert found["pass@1,none"] == found["avg@4,none"] == pytest.approx((3 / 4 + 1 / 4 + 0) / 3)
    assert found["pass@2,none"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found["pass@4,none"] == pytest.approx(2 / 3)
    assert found["maj@4,none"] == pytest.approx(1 / 3)  # b: three answers once each, the first is wrong
    # deviations from 1/3: 5/12, -1/12, -4/12; squares 42/144 over 2, over 3 problems
    assert found["pass@1_stderr,none"] == pytest.approx(math.sqrt(42 / 144 / 2 / 3))
    low, high = found["pass@1_ci95,none"]
    assert 0 <= low <= 1 / 3 <= high <= 0.75
    assert found["boxed,none"] == 9 / 12
    assert found["length,none"] == 10


def test_equal_answers_in_two_spellings_elect_together():
    answers = ["7", "1/2", "0.5"]
    samples = [graded("a", n, answer, gold="1/2", correct=answer != "7") for n, answer in enumerate(answers)]
    assert task_results(samples, never, seed=0)["maj@3,none"] == 0.0
    assert task_results(samples, lambda a, b: {a, b} == {"1/2", "0.5"}, seed=0)["maj@3,none"] == 1.0


def test_truncated_and_unfinished_samples_are_counted():
    samples = [
        graded("a", 0, None, finish=Finish.LENGTH, tokens=30),
        graded("b", 0, "1", outcome=Outcome.TIMEOUT, correct=False, score=-0.5),
    ]
    found = task_results(samples, never, seed=0)
    assert (found["truncated,none"], found["stopped,none"]) == (0.5, 0.5)
    assert (found["length,none"], found["length_max,none"]) == (20, 30)
    assert (found["grader_timeouts,none"], found["grader_errors,none"]) == (1, 0)
    assert found["pass@1,none"] == 0.0


def test_problems_with_different_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"as many samples as the others, got \[1, 2\]"):
        task_results([graded("a", 0, "1"), graded("b", 0, "1"), graded("b", 1, "1")], never, seed=0)


def test_the_table_has_the_form_of_the_seeds():
    values = {"aime24": 1 / 3, "math500": 0.772, "amc23": 0.625, "minerva_math": 0.335, "olympiadbench": 0.376}
    zero = {task: {"pass@1,none": value, "length,none": 700.0} for task, value in values.items()}
    part = {"gsm8k": {"pass@1,none": 0.9}, "math500": {"pass@1,none": 0.5}}
    assert table({"SimpleRL-Zero": zero, "other": part}).splitlines() == [
        "| | AIME 2024 | MATH 500 | AMC | Minerva Math | OlympiadBench | Avg. | GSM8K |",
        "|---|---|---|---|---|---|---|---|",
        "| SimpleRL-Zero | 33.3 | 77.2 | 62.5 | 33.5 | 37.6 | 48.8 | - |",
        "| other | - | 50.0 | - | - | - | - | 90.0 |",
    ]
    assert table({"m": {"mine": {"pass@1,none": 0.5}}}).splitlines()[::2] == ["| | mine |", "| m | 50.0 |"]
    failed = {"grader_timeouts,none": 2, "grader_errors,none": 1}
    assert table({"m": {"math500": {"pass@1,none": 0.5} | failed, "mine": {"pass@1,none": 0.5}}}).splitlines()[3:] == [
        *("", "m, MATH 500: 3 samples could not be graded and count as wrong (time-outs 2, errors 1).")
    ]
    found = averages({**zero, "gsm8k": {"pass@1,none": 0.9}})
    assert found["seed_average"]["length,none"] == 700.0
    assert found["average"] == {"pass@1,none": pytest.approx((sum(values.values()) + 0.9) / 6)}
    assert averages(part).keys() == {"average"}
