"""Estimates from graded samples: pure functions of counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of ``k`` samples is right, without bias: ``1 - C(n - c, k) / C(n, k)``.

    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (2021), equation 1.

    Args:
        samples: n, drawn for the problem.
        right: c, how many of them are right.
        k: at most n.

    Raises:
        ValueError: ``0 <= right <= samples`` or ``1 <= k <= samples`` does not hold.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"0 <= right <= samples and 1 <= k <= samples must hold, got {right=}, {samples=}, {k=}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over problems.

    Attributes:
        mean: of the problems' values.
        stderr: standard error of the mean, clustered by problem: the sample standard deviation of the problems' means
            over the square root of their number. However many samples a problem has, it counts once. NaN for one.
        low, high: 95 % percentile bootstrap interval over problems.
    """

    mean: float
    stderr: float
    low: float
    high: float


def estimate(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean, clustered standard error and bootstrap interval; the same numbers give the same interval.

    Args:
        values: one per problem.
        seed: of the 10,000 resamples.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("an estimate needs the values of at least one problem, got none")
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    # one resample at a time: all indices at once would take gigabytes for thousands of problems
    means = [array[generator.integers(len(array), size=len(array))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    spread = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return Estimate(mean=float(array.mean()), stderr=spread, low=float(low), high=float(high))


def vote(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
    """The sample that a majority vote elects.

    Samples vote for their answer; equal ones (``same``) vote together, an answer joining the first group whose first
    member it equals. The largest group wins, of groups of one size the one that came first. A sample without an answer
    (None) does not vote.

    Source: Wang et al., "Self-Consistency Improves Chain of Thought Reasoning" (2022), section 2, votes
    unweighted.

    Returns:
        the index of the winning group's first sample, or None where nobody votes.
    """
    groups: list[list[int]] = []
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        for group in groups:
            first = answers[group[0]]
            if first is not None and (answer == first or same(answer, first)):
                group.append(index)
                break
        else:
            groups.append([index])
    return max(groups, key=len)[0] if groups else None  # max keeps the first of equals
