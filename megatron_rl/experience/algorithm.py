"""From the settings' names to the objects that the loop calls: the only place that knows algorithms by name."""

from __future__ import annotations

from typing import Any

from megatron_rl.config.schema import PPOConfig, RunConfig
from megatron_rl.interfaces import AdvantageEstimator, LossMean, TokenLoss
from megatron_rl.maths.advantages import GeneralizedAdvantage, GroupRelative, LeaveOneOut, ReturnToGo, Whitened
from megatron_rl.maths.losses import ClippedWeightLoss, CorrectedLoss, EngineCorrection, PolicyLoss, SequencePolicyLoss
from megatron_rl.maths.means import ConstantMean, SequenceMean, TokenMean


def advantage_estimator(ppo: PPOConfig) -> AdvantageEstimator:
    """The estimator of ``ppo.advantage``, whitened where the settings say so."""
    estimators: dict[str, AdvantageEstimator] = {
        "gae": GeneralizedAdvantage(gamma=ppo.gamma, lam=ppo.lam, critic_lam=ppo.critic_lam, lam_alpha=ppo.lam_alpha),
        "grpo": GroupRelative(scale=True),
        "dr_grpo": GroupRelative(scale=False),
        "rloo": LeaveOneOut(),
        "reinforce_pp": ReturnToGo(gamma=ppo.gamma),
        "reinforce_pp_baseline": GroupRelative(scale=False),
    }
    estimator = estimators[ppo.advantage]
    return Whitened(estimator=estimator) if ppo.whitens else estimator


def policy_loss(ppo: PPOConfig) -> TokenLoss:
    """The loss of ``ppo.loss``, with the correction of ``ppo.engine_correction``."""
    shared: dict[str, Any] = {
        "clip_low": ppo.clip_low,
        "clip_high": ppo.clip_high,
        "entropy_coef": ppo.entropy_coef,
        "kl_coef": ppo.kl_coef if ppo.kl_in == "loss" else 0.0,
        "kl_kind": ppo.kl_kind,
    }
    losses: dict[str, TokenLoss] = {
        "ppo": PolicyLoss(dual_clip=ppo.dual_clip, **shared),
        "gspo": SequencePolicyLoss(**shared),
        "cispo": ClippedWeightLoss(**shared),
    }
    loss = losses[ppo.loss]
    if ppo.engine_correction is None:
        return loss
    correction = EngineCorrection(
        outside="truncate" if ppo.engine_correction == "tis" else "mask",
        level=ppo.engine_ratio_level,
        low=ppo.engine_ratio_low,
        high=ppo.engine_ratio_high,
    )
    return CorrectedLoss(loss=loss, correction=correction)


def loss_mean(config: RunConfig) -> LossMean:
    """The average of ``ppo.loss_mean``; the constant is the longest response."""
    means: dict[str, LossMean] = {
        "token": TokenMean(),
        "sequence": SequenceMean(),
        "constant": ConstantMean(tokens=config.rollout.max_response_tokens),
    }
    return means[config.ppo.loss_mean]
