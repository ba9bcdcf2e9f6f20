from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.maths.masking import keep, masked_mean, masked_sum, masked_var, row_sums, whiten

X = torch.tensor([[1.0, math.nan, 3.0], [math.inf, 5.0, -math.inf]])
MASK = torch.tensor([[True, False, True], [False, True, False]])
NOTHING = torch.zeros_like(MASK)


def test_sums_and_means_see_only_what_the_mask_selects():
    assert masked_sum(X, MASK).item() == 9.0
    assert masked_sum(X, MASK, 1).tolist() == [4.0, 5.0]
    assert masked_mean(X, MASK).item() == 3.0
    assert masked_mean(X, MASK, 1).tolist() == [2.0, 5.0]


def test_variance_is_divided_by_the_count():
    # deviations of 1, 3, 5 from 3: -2, 0, 2 -> (4 + 0 + 4) / 3
    assert masked_var(X, MASK).item() == pytest.approx(8 / 3)


def test_an_empty_mask_gives_zero_and_not_nan():
    assert masked_mean(X, NOTHING).item() == 0.0
    assert masked_var(X, NOTHING).item() == 0.0
    assert whiten(X, NOTHING).tolist() == [[0.0] * 3] * 2


def test_whitening_gives_mean_zero_and_variance_one():
    scale = math.sqrt(3 / 8)
    expected = torch.tensor([[-2 * scale, 0.0, 0.0], [0.0, 2 * scale, 0.0]])
    torch.testing.assert_close(whiten(X, MASK), expected)


def test_whitening_can_keep_the_mean():
    scale = math.sqrt(3 / 8)
    expected = torch.tensor([[3 - 2 * scale, 0.0, 3.0], [0.0, 3 + 2 * scale, 0.0]])
    torch.testing.assert_close(whiten(X, MASK, shift_mean=False), expected)


def test_whitening_constants_is_bounded_by_the_variance_floor():
    assert whiten(torch.tensor([2.0, 2.0]), torch.tensor([True, True])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("score", [0.1, 0.9, -0.7, 1 / 3])
def test_whitening_many_equal_numbers_makes_nothing_of_their_rounding(score):
    x = torch.full((512, 300), score)
    mask = torch.ones_like(x, dtype=torch.bool)
    assert whiten(x, mask).abs().max().item() < 1e-9
    assert whiten(x, mask).dtype == torch.float32


def test_no_gradient_reaches_what_the_mask_leaves_out():
    x = X.clone().requires_grad_()
    (keep(x, MASK) ** 2).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2.0, 0.0, 6.0], [0.0, 10.0, 0.0]]


def test_row_sums_stand_at_every_position_of_their_row():
    x = torch.tensor([1.0, 2.0, math.nan, 4.0, 5.0])
    mask = torch.tensor([True, True, False, True, False])
    assert row_sums(x, mask, torch.tensor([0, 3, 3, 5], dtype=torch.int32)).tolist() == [3, 3, 3, 4, 4]


def test_row_sums_add_up_what_others_hold_of_the_rows():
    x, mask = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([True, False, True])
    sums = row_sums(x, mask, torch.tensor([0, 2, 3]), lambda mine: mine + torch.tensor([10.0, 20.0]))
    assert sums.tolist() == [11, 11, 24]
