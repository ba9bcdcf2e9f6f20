"""Every algorithm, from scored samples to the gradient of each token, against formulas in NumPy."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.config.schema import PPOConfig, RolloutConfig, RunConfig
from tests.fakes import fake_config
from tests.oracle import differences, experience_of, losses_of, random_case

CLOSE = 1e-9

ALGORITHMS = {
    "ppo": {},
    "ppo, discounted": {"gamma": 0.97, "lam": 0.9},
    "ppo, all switches": {
        "dual_clip": 1.3,
        "clip_high": 0.28,
        "entropy_coef": 0.01,
        "value_clip": 0.1,
        "kl_in": "loss",
        "kl_kind": "k3",
        "kl_coef": 0.1,
        "loss_mean": "sequence",
        "epochs": 2,
    },
    "ppo, not whitened, no reference": {"whiten_advantages": False, "kl_coef": 0.0, "value_clip": float("inf")},
    "ppo, k2 in the reward": {"kl_kind": "k2", "kl_coef": 0.2},
    "ppo, k3 in the reward": {"kl_kind": "k3", "kl_coef": 0.2},
    "ppo, k2 in the loss": {"kl_kind": "k2", "kl_in": "loss", "kl_coef": 0.2},
    "vc-ppo": {"lam": 0.9, "critic_lam": 1.0},
    "vapo": {"lam_alpha": 0.3, "critic_lam": 1.0},
    "grpo": {"advantage": "grpo", "loss_mean": "sequence", "kl_in": "loss", "kl_kind": "k3"},
    "grpo, whitened": {"advantage": "grpo", "whiten_advantages": True},
    "dr. grpo": {"advantage": "dr_grpo", "loss_mean": "constant", "kl_coef": 0.0},
    "rloo": {"advantage": "rloo", "kl_coef": 0.1},
    "reinforce++": {"advantage": "reinforce_pp", "kl_coef": 0.1, "kl_kind": "k2"},
    "reinforce++, discounted": {"advantage": "reinforce_pp", "gamma": 0.9},
    "reinforce++-baseline": {"advantage": "reinforce_pp_baseline", "kl_in": "loss", "kl_kind": "k2"},
    "gspo": {"advantage": "grpo", "loss": "gspo", "loss_mean": "sequence", "clip_low": 0.05, "clip_high": 0.08},
    "cispo": {"advantage": "grpo", "loss": "cispo", "clip_low": 1.0, "clip_high": 0.3},
    "dapo": {"advantage": "grpo", "clip_high": 0.28, "kl_coef": 0.0},
    "overlong filtering": {"mask_truncated": True},
    "overlong filtering, grpo": {
        "advantage": "grpo",
        "loss_mean": "sequence",
        "kl_in": "loss",
        "kl_kind": "k3",
        "mask_truncated": True,
    },
    "tis": {"engine_correction": "tis", "engine_ratio_high": 1.3},
    "sequence tis": {"engine_correction": "tis", "engine_ratio_level": "sequence"},
    "mis": {"advantage": "grpo", "engine_correction": "mis", "engine_ratio_high": 1.3},
    "sequence mis on gspo": {
        "advantage": "grpo",
        "loss": "gspo",
        "loss_mean": "sequence",
        "engine_correction": "mis",
        "engine_ratio_level": "sequence",
        "engine_ratio_low": 0.5,
    },
    "icepop on cispo": {
        "advantage": "rloo",
        "loss": "cispo",
        "engine_correction": "icepop",
        "engine_ratio_low": 0.7,
        "engine_ratio_high": 1.5,
    },
}


def config_of(settings: dict[str, object]) -> RunConfig:
    ppo = PPOConfig(minibatch_samples=10, **{"kl_coef": 0.05, **settings})  # type: ignore[arg-type]
    assert list(ppo.problems()) == []
    config = fake_config(Path("none"), prompts_per_step=5, ppo=ppo)
    config = dataclasses.replace(config, rollout=RolloutConfig(samples_per_prompt=4, max_response_tokens=12))
    return config if ppo.has_critic else dataclasses.replace(config, critic=None)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("settings", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("seed", range(4))
def test_rewards_advantages_losses_and_gradients_equal_the_formulas(settings: dict[str, object], seed: int) -> None:
    found = differences(random_case(config_of(settings), seed, forced_eos=seed % 2 == 0))
    assert {name: size for name, size in found.items() if not size < CLOSE} == {}
    assert len(found) >= 2 + 2 * 2  # two optimizer steps


@pytest.mark.usefixtures("float64")
def test_no_two_algorithms_have_the_same_gradient() -> None:
    """Were a setting not passed on, two of them would be one."""
    gradients = {}
    for name, settings in ALGORITHMS.items():
        case = random_case(config_of(settings), seed=0)
        found = {row: np.zeros(len(response)) for row, response in enumerate(case.rows)}
        for _, losses in losses_of(case, experience_of(case)):
            found |= losses["policy"][1]
        gradients[name] = np.concatenate(list(found.values()))
    for one, other in itertools.combinations(ALGORITHMS, 2):
        assert np.abs(gradients[one] - gradients[other]).max() > 1e-5, (one, other)
