from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.maths.diagnostics import Bucket, critic_calibration, explained_variance, logprob_gap

MASK = torch.tensor([[True, True, False], [True, True, False]])


def rows(*values):
    return torch.tensor([[values[0], values[1], math.nan], [values[2], values[3], math.inf]])


def test_explained_variance_by_hand():
    # returns 0, 2, 4, 6: variance 5. errors 0, 1, 1, 2: mean 1, variance 0.5.
    assert explained_variance(rows(0.0, 1.0, 3.0, 4.0), rows(0.0, 2.0, 4.0, 6.0), MASK) == pytest.approx(0.9)


def test_a_perfect_critic_explains_everything_and_a_constant_one_nothing():
    returns = rows(0.0, 2.0, 4.0, 6.0)
    assert explained_variance(returns, returns, MASK) == pytest.approx(1.0)
    assert explained_variance(rows(7.0, 7.0, 7.0, 7.0), returns, MASK) == pytest.approx(0.0)


def test_constant_returns_give_zero():
    assert explained_variance(rows(0.0, 2.0, 4.0, 6.0), rows(0.1, 0.1, 0.1, 0.1), MASK) == 0.0
    assert explained_variance(rows(0.0, 2.0, 4.0, 6.0), rows(0.0, 2.0, 4.0, 6.0), MASK & False) == 0.0


def test_the_gap_between_trainer_and_engine_by_hand():
    gap = logprob_gap(rows(-1.0, -2.0, -1.5, -3.0), rows(-1.0, -2.5, -1.0, -3.0), MASK)
    assert gap.mean_abs == pytest.approx(0.25)
    assert gap.max_abs == pytest.approx(0.5)
    # trainer - engine: 0, 0.5, -0.5, 0 -> exp(d) - 1 - d
    assert gap.k3 == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-0.5) - 0.5) / 4)


def test_a_gap_over_nothing_is_zero():
    gap = logprob_gap(rows(-1.0, -2.0, -1.5, -3.0), rows(0.0, 0.0, 0.0, 0.0), MASK & False)
    assert (gap.mean_abs, gap.max_abs, gap.k3) == (0.0, 0.0, 0.0)


def test_calibration_puts_every_token_into_one_bucket_of_each_family():
    mask = torch.tensor([[False, True, True, True, True, False], [False, False, True, False, False, False]])
    values = torch.tensor([[9.0, 0.1, 0.2, 0.3, 0.4, 9.0], [9.0, 9.0, 0.6, 9.0, 9.0, math.nan]])
    returns = torch.tensor([[9.0, 1.0, 1.0, 0.75, 0.5, 9.0], [9.0, 9.0, -1.0, 9.0, 9.0, math.nan]])
    found = critic_calibration(values, returns, mask)

    def bucket(tokens, value, return_):
        return Bucket(tokens=tokens, value=pytest.approx(value), return_=pytest.approx(return_))

    assert found == {
        "return_below_-0.75": bucket(1, 0.6, -1.0),
        "return_-0.75_to_-0.25": bucket(0, 0.0, 0.0),
        "return_-0.25_to_0.25": bucket(0, 0.0, 0.0),
        "return_0.25_to_0.75": bucket(1, 0.4, 0.5),
        "return_above_0.75": bucket(3, 0.2, 2.75 / 3),
        # a response of one token has it in its first quarter
        "position_first_quarter": bucket(2, 0.35, 0.0),
        "position_second_quarter": bucket(1, 0.2, 1.0),
        "position_third_quarter": bucket(1, 0.3, 0.75),
        "position_last_quarter": bucket(1, 0.4, 0.5),
    }
