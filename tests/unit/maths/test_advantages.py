from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.maths.advantages import (
    GeneralizedAdvantage,
    GroupRelative,
    LeaveOneOut,
    ReturnToGo,
    Whitened,
    gae,
    group_relative,
    leave_one_out,
    length_adaptive_lambda,
    token_rewards,
)
from megatron_rl.maths.masking import whiten

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


def test_a_lambda_for_each_row():
    rewards, values, lams = torch.rand(3, 5), torch.rand(3, 5), torch.tensor([0.0, 0.5, 1.0])
    found, _ = gae(rewards, values, MASK, gamma=0.9, lam=lams)
    for row, lam in enumerate(lams.tolist()):
        alone, _ = gae(rewards[[row]], values[[row]], MASK[[row]], gamma=0.9, lam=lam)
        torch.testing.assert_close(found[[row]], alone)


def test_the_length_adaptive_lambda_by_hand():
    # 3 tokens: 1 - 1/1.5; 1 token: 1 - 1/0.5 < 0; none: counted as one
    assert length_adaptive_lambda(MASK, 0.5).tolist() == pytest.approx([1 / 3, 0, 0])


REWARDS = torch.tensor([[0, 0, 0, 1.0, 0], [0, 0, -0.5, 0, 0], [0, 0, 0, 0, 0]])
VALUES = torch.tensor([[0, 0.5, 0.25, 0.75, 0], [0, 0, 0.5, 0, 0], [0, 0, 0, 0, 0]])
GROUP = torch.tensor([0, 0, 0])


def test_decoupled_lambdas_change_the_targets_and_not_the_advantages():
    one = GeneralizedAdvantage(gamma=1.0, lam=0.5)(REWARDS, VALUES, MASK, GROUP)
    two = GeneralizedAdvantage(gamma=1.0, lam=0.5, critic_lam=1.0)(REWARDS, VALUES, MASK, GROUP)
    torch.testing.assert_close(two[0], one[0])
    torch.testing.assert_close(two[1], torch.tensor([[0, 1.0, 1.0, 1.0, 0], [0, 0, -0.5, 0, 0], [0] * 5]))
    # with 0.5: A_3 = 1 - 0.75; A_2 = 0.5 + 0.5 A_3 = 0.625; A_1 = -0.25 + 0.5 A_2 = 0.0625; plus the values
    assert one[1][0].tolist() == [0, 0.5625, 0.875, 1.0, 0]


def test_the_length_adaptive_lambda_moves_the_policy_alone():
    adaptive = GeneralizedAdvantage(gamma=1.0, lam=0.9, critic_lam=1.0, lam_alpha=0.5)(REWARDS, VALUES, MASK, GROUP)
    third, _ = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=1 / 3)
    torch.testing.assert_close(adaptive[0][0], third[0])
    assert adaptive[1][0].tolist() == [0, 1, 1, 1, 0]


def test_generalised_advantages_without_a_critic_are_refused():
    with pytest.raises(ValueError, match="need a critic's values"):
        GeneralizedAdvantage(gamma=1.0, lam=1.0)(REWARDS, None, MASK, GROUP)


# Groups of 3 and 2, interleaved: scores 1, 4, 1 (mean 2, deviation sqrt(3)) and 0, 2 (mean 1, deviation sqrt(2)).
FIVE, GROUPS = torch.tensor([1.0, 0, 4, 1, 2]), torch.tensor([7, 2, 7, 7, 2])


def test_group_relative_advantages_by_hand():
    assert group_relative(FIVE, GROUPS, scale=False).tolist() == [-1, -1, 2, -1, 1]
    scaled = [-1 / 3**0.5, -1 / 2**0.5, 2 / 3**0.5, -1 / 3**0.5, 1 / 2**0.5]
    assert group_relative(FIVE, GROUPS, scale=True).tolist() == pytest.approx(scaled, abs=1e-5)


def test_leave_one_out_by_hand():
    # 1 - (4 + 1) / 2; 0 - 2; 4 - (1 + 1) / 2; 1 - (1 + 4) / 2; 2 - 0
    assert leave_one_out(FIVE, GROUPS).tolist() == [-1.5, -2, 3, -1.5, 2]


@pytest.mark.parametrize("scale", [True, False])
def test_equal_scores_have_no_advantage_even_where_they_are_not_exact_in_binary(scale):
    assert group_relative(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64), scale=scale).abs().max() < 1e-8


@pytest.mark.parametrize("estimator", [GroupRelative(scale=True), GroupRelative(scale=False), LeaveOneOut()])
def test_a_group_of_one_is_refused(estimator):
    with pytest.raises(ValueError, match="at least 2 samples of each prompt"):
        estimator(REWARDS, None, MASK, torch.tensor([0, 0, 1]))


def test_every_token_of_a_response_has_the_responses_advantage():
    rewards = REWARDS + torch.tensor([[9.0, 0.5, 0, 0, 9.0], [9.0] * 2 + [0] + [9.0] * 2, [9.0] * 5])
    # what the responses earned: 1.5, -0.5, 0
    advantages, targets = GroupRelative(scale=False)(rewards, None, MASK, GROUP)
    torch.testing.assert_close(advantages[0], torch.tensor([0, 1, 1, 1, 0]) * (1.5 - 1 / 3))
    torch.testing.assert_close(advantages[1], torch.tensor([0, 0, 1, 0, 0]) * (-0.5 - 1 / 3))
    assert advantages[2].tolist() == [0] * 5
    assert targets is None


def test_the_return_to_go_needs_no_critic():
    rewards = torch.tensor([[9.0, 0.25, -0.5, 1.0, 9.0]])
    advantages, targets = ReturnToGo(gamma=0.5)(rewards, None, MASK[:1], GROUP[:1])
    assert advantages.tolist() == [[0, 0.25, 0.0, 1.0, 0]]
    assert targets is None


def test_whitening_leaves_the_targets_alone():
    plain = GeneralizedAdvantage(gamma=1.0, lam=1.0)
    advantages, targets = plain(REWARDS, VALUES, MASK, GROUP)
    white, same = Whitened(estimator=plain)(REWARDS, VALUES, MASK, GROUP)
    torch.testing.assert_close(white, whiten(advantages, MASK))
    torch.testing.assert_close(same, targets)
    assert float(white[MASK].mean()) == pytest.approx(0, abs=1e-6)
    assert float(white[MASK].var(correction=0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "estimator", [GroupRelative(scale=True), LeaveOneOut(), Whitened(estimator=ReturnToGo(gamma=1.0))]
)
def test_an_estimator_travels_as_a_value(estimator):
    assert pickle.loads(pickle.dumps(estimator)) == estimator
