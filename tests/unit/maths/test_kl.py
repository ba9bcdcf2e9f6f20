from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_rl.maths.kl import KlControl, kl_estimate

LOGPROBS = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
REFERENCE = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.5, -1.0, 0.0]),
        ("k2", [0.125, 0.5, 0.0]),
        ("k3", [math.exp(-0.5) - 0.5, math.exp(1.0) - 2.0, 0.0]),
    ],
)
def test_estimators_by_hand(kind, expected):
    assert kl_estimate(LOGPROBS, REFERENCE, kind).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_kl_divergence(kind):
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    exact = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.5) + 0.2 * math.log(0.2 / 0.3)
    expected = (policy * kl_estimate(policy.log(), reference.log(), kind)).sum()
    assert expected.item() == pytest.approx(exact)


def test_k3_stays_finite_for_any_distance():
    assert torch.isfinite(kl_estimate(torch.tensor([-1000.0, 0.0]), torch.tensor([0.0, -1000.0]), "k3")).all()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="k1, k2 or k3, got 'k4'"):
        kl_estimate(LOGPROBS, REFERENCE, "k4")


def test_a_fixed_coefficient_never_moves():
    control = KlControl(0.01)
    control.update(100.0, 512)
    control.restore({"coef": 7.0})
    assert control.coef == 0.01


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (6.6, 0.1 * (1 + 0.1 * 500 / 10_000)),  # error 6.6 / 6 - 1 = 0.1
        (60.0, 0.1 * (1 + 0.2 * 500 / 10_000)),  # error 9, bounded to 0.2
        (0.0, 0.1 * (1 - 0.2 * 500 / 10_000)),  # error -1, bounded to -0.2
        (6.0, 0.1),
    ],
)
def test_the_adaptive_coefficient_moves_towards_its_target(kl, coef):
    control = KlControl(0.1, target=6.0, horizon=10_000)
    control.update(kl, 500)
    assert control.coef == pytest.approx(coef)


def test_the_adaptive_coefficient_survives_a_restart():
    control = KlControl(0.1, target=6.0)
    control.update(60.0, 500)
    resumed = KlControl(0.1, target=6.0)
    resumed.restore(json.loads(json.dumps(control.state())))
    assert resumed.coef == control.coef != 0.1


def test_a_coefficient_that_the_configuration_changed_is_the_new_one_after_a_restart():
    control = KlControl(0.0, target=6.0)
    resumed = KlControl(0.01, target=6.0)
    resumed.restore(json.loads(json.dumps(control.state())))
    assert resumed.coef == 0.01
    resumed.update(60.0, 500)
    assert resumed.coef > 0.01


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="target > 0"):
        KlControl(0.1, target=0.0)
    with pytest.raises(ValueError, match="coef >= 0"):
        KlControl(-0.1)
    with pytest.raises(ValueError, match="finite mean KL, got nan"):
        KlControl(0.1, target=6.0).update(math.nan, 1)
