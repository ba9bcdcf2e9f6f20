from __future__ import annotations

import math
from itertools import combinations

import pytest

from eval.metrics import estimate, pass_at_k, powers_of_two, vote
from eval.results import task_results
from tests.unit.eval.builders import graded


def same(a, b):
    return a == b or {a, b} == {"1/2", "0.5"}


@pytest.mark.parametrize(
    ("samples", "right", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 1 - C(3,2)/C(4,2) = 1 - 3/6
        (4, 2, 2, 5 / 6),  # 1 - C(2,2)/C(4,2) = 1 - 1/6
        (4, 0, 4, 0.0),
        (4, 1, 4, 1.0),
        (4, 3, 2, 1.0),  # fewer wrong ones than drawn
        (64, 1, 32, 0.5),
    ],
)
def test_pass_at_k_by_hand(samples, right, k, expected):
    assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("right", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right, k):
    verdicts = [True] * right + [False] * (6 - right)
    subsets = list(combinations(verdicts, k))
    assert pass_at_k(6, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(samples, right, k):
    with pytest.raises(ValueError, match="must hold"):
        pass_at_k(samples, right, k)


def test_k_runs_over_powers_of_two_and_ends_at_the_number_of_samples():
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(12) == [1, 2, 4, 8, 12]


def test_the_standard_error_is_clustered_by_problem():
    found = estimate([0.0, 0.5, 1.0, 0.5])
    # deviations -1/2, 0, 1/2, 0: variance 0.5 / 3, over 4 problems
    assert found.mean == 0.5
    assert found.stderr == pytest.approx(math.sqrt(0.5 / 3 / 4))


def test_more_samples_of_the_same_problems_leave_the_standard_error():
    def of(count):
        """Two problems with a quarter and three quarters of ``count`` samples right."""
        shares = {"a": count // 4, "b": 3 * count // 4}
        samples = [
            graded(problem, n, "1" if n < right else "2") for problem, right in shares.items() for n in range(count)
        ]
        return task_results(samples, same, seed=0)

    few, many = of(4), of(400)
    assert few["pass@1,none"] == many["pass@1,none"] == 0.5
    # deviations -1/4, 1/4: variance 1/8, over 2 problems
    assert few["pass@1_stderr,none"] == many["pass@1_stderr,none"] == pytest.approx(0.25)
    assert few["pass@1_ci95,none"] == many["pass@1_ci95,none"]


def test_the_interval_is_that_of_resampled_problems_and_repeats():
    values = [1.0] * 50 + [0.0] * 50
    found = estimate(values, seed=3)
    assert found == estimate(values, seed=3)
    # normal approximation: 0.5 +- 1.96 * 0.05
    assert found.low == pytest.approx(0.402, abs=0.011)
    assert found.high == pytest.approx(0.598, abs=0.011)
    assert estimate([1.0, 1.0, 1.0]).low == estimate([1.0, 1.0, 1.0]).high == 1.0


def test_one_problem_has_no_standard_error():
    assert math.isnan(estimate([1.0]).stderr)
    with pytest.raises(ValueError, match="at least one problem"):
        estimate([])


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["3", "4", "4"], 1),
        (["3", "4", "4", "3"], 0),  # a tie goes to the group that came first
        (["7", "1/2", "0.5"], 1),  # equal answers in two spellings vote together
        ([None, None, "3"], 2),  # who has no answer does not vote
        ([None, None], None),
        ([], None),
    ],
)
def test_the_majority_by_equality(answers, winner):
    assert vote(answers, same) == winner


def test_a_vote_compares_with_the_first_of_a_group_only():
    asked = []

    def recording(later, first):
        asked.append((later, first))
        return False

    assert vote(["a", "b", "a", "c"], recording) == 0
    assert asked == [("b", "a"), ("c", "a"), ("c", "b")]
