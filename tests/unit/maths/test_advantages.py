from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.maths.advantages import gae, token_rewards

# row 0: response in columns 1..3; row 1: in columns 2..2; row 2: none
MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
SCORES = torch.tensor([1.0, -0.5, 9.0])


def test_the_score_stands_on_the_last_response_token():
    expected = [[0, 0, 0, 1.0, 0], [0, 0, -0.5, 0, 0], [0, 0, 0, 0, 0]]
    assert token_rewards(SCORES, MASK, None, 0.01).tolist() == expected


def test_the_kl_penalty_falls_on_every_response_token():
    kl = torch.tensor([[9.0, 1.0, 2.0, -4.0, float("nan")], [9.0] * 5, [9.0] * 5])
    expected = torch.tensor([[0, -0.5, -1.0, 3.0, 0], [0, 0, -5.0, 0, 0], [0] * 5])
    torch.testing.assert_close(token_rewards(SCORES, MASK, kl, 0.5), expected)


def test_gae_by_hand():
    rewards = torch.tensor([[9.0, 0.0, 0.0, 1.0, 9.0], [9.0, 9.0, -0.5, 9.0, 9.0], [9.0] * 5])
    values = torch.tensor([[7.0, 0.5, 0.25, 0.75, 7.0], [7.0, 7.0, 0.5, 7.0, 7.0], [7.0] * 5])
    advantages, returns = gae(rewards, values, MASK, gamma=0.5, lam=0.5)
    # row 0, from the end: delta_3 = 1 - 0.75 = 0.25;            A_3 = 0.25
    #                      delta_2 = 0.5*0.75 - 0.25 = 0.125;    A_2 = 0.125 + 0.25*0.25 = 0.1875
    #                      delta_1 = 0.5*0.25 - 0.5 = -0.375;    A_1 = -0.375 + 0.25*0.1875 = -0.328125
    # row 1:               delta_2 = -0.5 - 0.5 = -1.0
    assert advantages.tolist() == [[0, -0.328125, 0.1875, 0.25, 0], [0, 0, -1.0, 0, 0], [0] * 5]
    assert returns.tolist() == [[0, 0.171875, 0.4375, 1.0, 0], [0, 0, -0.5, 0, 0], [0] * 5]


def test_without_discount_returns_are_the_sum_of_later_rewards():
    rewards = torch.tensor([[0.0, -0.25, -0.5, 1.0, 0.0]])
    values = torch.tensor([[0.0, 3.0, -2.0, 5.0, 0.0]])
    _, returns = gae(rewards, values, MASK[:1], gamma=1.0, lam=1.0)
    assert returns.tolist() == [[0, 0.25, 0.5, 1.0, 0]]


@st.composite
def rows(draw):
    width = draw(st.integers(1, 12))
    count = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**31))
    ends = [sorted((draw(st.integers(0, width)), draw(st.integers(0, width)))) for _ in range(count)]
    rng = np.random.default_rng(seed)
    mask = np.array([[start <= t < end for t in range(width)] for start, end in ends])
    return rng.normal(size=(count, width)), rng.normal(size=(count, width)), mask


def gae_oracle(rewards, values, mask, gamma, lam):
    """Equation 16 as a sum over all later temporal differences, row by row."""
    advantages = np.zeros_like(values)
    for row in range(len(values)):
        places = np.flatnonzero(mask[row])
        after = np.append(values[row, places], 0.0)
        deltas = rewards[row, places] + gamma * after[1:] - after[:-1]
        for i, t in enumerate(places):
            advantages[row, t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
    return advantages, np.where(mask, advantages + values, 0.0)


@given(rows(), st.sampled_from([1.0, 0.99, 0.5, 0.0]), st.sampled_from([1.0, 0.95, 0.0]))
@settings(deadline=None)
def test_gae_equals_the_sum_of_equation_16(row, gamma, lam):
    rewards, values, mask = row
    expected = gae_oracle(rewards, values, mask, gamma, lam)
    found = gae(
        torch.from_numpy(np.where(mask, rewards, np.nan)),
        torch.from_numpy(np.where(mask, values, np.inf)),
        torch.from_numpy(mask),
        gamma=gamma,
        lam=lam,
    )
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
