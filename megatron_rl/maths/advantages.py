"""From scores to rewards, advantages and returns, per token.

The functions are the formulas. The dataclasses below them are what the loop calls: picklable values with one signature,
:class:`~megatron_rl.interfaces.AdvantageEstimator`. GRPO and its relatives are another object, not another loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.interfaces import AdvantageEstimator
from megatron_rl.maths.masking import keep, masked_sum, whiten

_SMALLEST_DEVIATION = 1e-6


def token_rewards(scores: Tensor, response_mask: Tensor, kl: Tensor | None, kl_coef: float) -> Tensor:
    """Reward of each token: the score on the last response token, less the KL penalty on every response token.

    Source: Ouyang et al., "Training language models to follow instructions with human feedback" (2022), equation 2,
    with the penalty paid token by token.

    Args:
        scores: [B], one per response.
        response_mask: [B, T] bool.
        kl: [B, T] KL estimates (nats), or None for no penalty.
        kl_coef: its coefficient.

    Returns:
        [B, T], 0 outside the response; all 0 in a row without a response.
    """
    remaining = response_mask.flip(1).cumsum(1).flip(1)
    rewards = keep(scores[:, None].expand(response_mask.shape), response_mask & (remaining == 1))
    return rewards if kl is None else rewards - kl_coef * keep(kl, response_mask)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that a critic learns.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016),
    equation 16: ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, with V and A 0 after
    the last response token. Returns are ``A_t + V_t``.

    Args:
        rewards: [B, T].
        values: [B, T], of the state just before each token.
        mask: [B, T] bool, the response of each row; responses may start and end in different columns.
        gamma: discount.
        lam: 1 gives Monte-Carlo returns, 0 one-step differences; one number, or one per row [B].

    Returns:
        advantages and returns, [B, T] each, 0 outside the mask.
    """
    rewards, values = keep(rewards, mask), keep(values, mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = keep(delta + gamma * lam * next_advantage, mask[:, t])
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, keep(advantages + values, mask)


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """The policy's lambda by the length l of each response: ``1 - 1 / (alpha l)``, at least 0.

    Source: Yue et al., "VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks" (2025),
    length-adaptive GAE: the weights ``lambda^t`` of a response then add up to ``alpha l``.

    Args:
        mask: [B, T] bool, the responses.
        alpha: above 0; the paper's is 0.05.

    Returns:
        [B] f64.
    """
    lengths = mask.sum(1).clamp(min=1).double()
    return (1 - 1 / (alpha * lengths)).clamp(min=0)


def group_relative(scores: Tensor, group: Tensor, *, scale: bool) -> Tensor:
    """Each sample's score less the mean of its group, over the group's standard deviation where ``scale`` is set.

    Source: Shao et al., "DeepSeekMath" (2024), section 4.1.2 (GRPO with outcome supervision):
    ``A_i = (r_i - mean(r)) / std(r)``. Without the division: Liu et al., "Understanding R1-Zero-Like Training: A
    Critical Perspective" (2025), section 3.2 (Dr. GRPO). The deviation is that of a sample (divided by G - 1), plus
    1e-6, as in the implementations in use; the paper does not say.

    Args:
        scores: [B].
        group: [B] int64, the prompt that each sample answers.
        scale: divide by the standard deviation.

    Returns:
        [B]; 0 in a group whose scores are all the same.

    Raises:
        ValueError: a group has one sample.
    """
    centred, size, index = _centred(scores, group)
    if scale:
        variance = _group_sums(centred**2, index, len(size)) / (size - 1)
        centred = centred / (variance.sqrt() + _SMALLEST_DEVIATION)[index]
    return centred.to(scores.dtype)


def leave_one_out(scores: Tensor, group: Tensor) -> Tensor:
    """Each sample's score less the mean of the other samples of its group.

    Source: Kool et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!" (2019); Ahmadian et al., "Back to Basics:
    Revisiting REINFORCE-Style Optimization" (2024), the RLOO estimator:
    ``A_i = r_i - sum_{j != i} r_j / (G - 1)``, which is ``(r_i - mean(r)) G / (G - 1)``.

    Args:
        scores: [B].
        group: [B] int64, the prompt that each sample answers.

    Returns:
        [B].

    Raises:
        ValueError: a group has one sample.
    """
    centred, size, index = _centred(scores, group)
    return (centred * (size / (size - 1))[index]).to(scores.dtype)


def _centred(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores less their group's mean [B] f64, the size of each group [g], and each sample's place in it [B]."""
    _, index, size = group.unique(return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise ValueError(
            "a group-relative advantage needs at least 2 samples of each prompt, got a prompt with 1: raise "
            "rollout.samples_per_prompt"
        )
    wide = scores.double()  # in float32 a group of equal scores has a deviation near the 1e-6 that it is divided by
    return wide - (_group_sums(wide, index, len(size)) / size)[index], size, index


def _group_sums(x: Tensor, index: Tensor, groups: int) -> Tensor:
    return x.new_zeros(groups).index_add_(0, index, x)


def _spread(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B] -> [B, T]: every token of a response has the response's advantage."""
    return keep(advantages[:, None].expand(mask.shape), mask)


@dataclass(frozen=True, kw_only=True)
class GeneralizedAdvantage:
    """PPO with a critic: :func:`gae`, with one lambda for both models, or one for each.

    Source of the two lambdas: Yuan et al., "What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the
    Secret" (2025), decoupled GAE (VC-PPO).

    Attributes:
        gamma: discount.
        lam: of the policy's advantages.
        critic_lam: of the critic's targets; None: as the policy's.
        lam_alpha: the policy's lambda by length (:func:`length_adaptive_lambda`) in place of ``lam``; None: ``lam``.
    """

    gamma: float
    lam: float
    critic_lam: float | None = None
    lam_alpha: float | None = None

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages and the critic's targets.

        Raises:
            ValueError: there are no values.
        """
        if values is None:
            raise ValueError("generalised advantages need a critic's values, got none: give the run a critic")
        lam = self.lam if self.lam_alpha is None else length_adaptive_lambda(mask, self.lam_alpha).to(values.dtype)
        advantages, returns = gae(rewards, values, mask, gamma=self.gamma, lam=lam)
        if self.critic_lam is not None:
            _, returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.critic_lam)
        return advantages, returns


@dataclass(frozen=True, kw_only=True)
class ReturnToGo:
    """The discounted sum of later rewards, without a baseline; whitened, it is REINFORCE++.

    Source: Hu, "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models" (2025), where the KL
    penalty is part of each token's reward.

    Attributes:
        gamma: discount.
    """

    gamma: float

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages; no targets."""
        return gae(rewards, torch.zeros_like(rewards), mask, gamma=self.gamma, lam=1.0)[0], None


@dataclass(frozen=True, kw_only=True)
class GroupRelative:
    """GRPO and Dr. GRPO: :func:`group_relative` of what each response earned, on every token of it.

    Whitened and without ``scale``, it is REINFORCE++-baseline (Hu, 2025).

    Attributes:
        scale: divide by the group's standard deviation (GRPO), or not (Dr. GRPO).
    """

    scale: bool

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages; no targets.

        Raises:
            ValueError: a group has one sample.
        """
        return _spread(group_relative(masked_sum(rewards, mask, 1), group, scale=self.scale), mask), None


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """RLOO: :func:`leave_one_out` of what each response earned, on every token of it."""

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages; no targets.

        Raises:
            ValueError: a group has one sample.
        """
        return _spread(leave_one_out(masked_sum(rewards, mask, 1), group), mask), None


@dataclass(frozen=True, kw_only=True)
class Whitened:
    """Another estimator's advantages at mean 0 and variance 1 over all response tokens of the rollout, before it is cut
    into minibatches; the critic's targets are left alone.

    Attributes:
        estimator: the other one.
    """

    estimator: AdvantageEstimator

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As the estimator's."""
        advantages, returns = self.estimator(rewards, values, mask, group)
        return whiten(advantages, mask), returns
