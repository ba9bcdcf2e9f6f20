"""From scores to rewards, advantages and returns, per token."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rl.maths.masking import keep


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


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that a critic learns.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016),
    equation 16: ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, with V and A 0 after
    the last response token. Returns are ``A_t + V_t``.

    Args:
        rewards: [B, T].
        values: [B, T], of the state just before each token.
        mask: [B, T] bool, the response of each row; responses may start and end in different columns.
        gamma: discount.
        lam: 1 gives Monte-Carlo returns, 0 one-step differences.

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
