"""Numbers that say whether a run is healthy; none of them is trained on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_rl.maths.kl import kl_estimate
from megatron_rl.maths.masking import keep, masked_mean, masked_var

_CONSTANT = 1e-12


@dataclass(frozen=True, kw_only=True)
class LogprobGap:
    """How far two models are apart on the same tokens, in nats.

    Attributes:
        mean_abs: mean of the absolute difference per token.
        max_abs: the largest.
        k3: k3 estimate of KL(engine || trainer) per token.
    """

    mean_abs: float
    max_abs: float
    k3: float


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """``1 - Var(returns - values) / Var(returns)`` over ``mask``: 1 for a perfect critic, 0 for a constant one.

    Args:
        values: [B, T], of the critic before the update.
        returns: [B, T].
        mask: [B, T] bool.

    Returns:
        0.0 where the returns do not vary (variance at most 1e-12), so that it is never NaN for finite inputs.
    """
    values, returns = values.double(), returns.double()
    spread = masked_var(returns, mask)
    return 0.0 if float(spread) <= _CONSTANT else float(1 - masked_var(returns - values, mask) / spread)


def logprob_gap(old: Tensor, rollout: Tensor, mask: Tensor) -> LogprobGap:
    """Compare the trainer's log-probs before the update with those of the engine that drew the tokens.

    Args:
        old: [B, T] by the trainer.
        rollout: [B, T] by the engine.
        mask: [B, T] bool, tokens that the engine drew.

    Returns:
        the gap over ``mask``; all 0 where it selects nothing.
    """
    old, rollout = keep(old.double(), mask), keep(rollout.double(), mask)
    absolute = (old - rollout).abs()
    return LogprobGap(
        mean_abs=float(masked_mean(absolute, mask)),
        max_abs=float(absolute.max()) if absolute.numel() else 0.0,
        k3=float(masked_mean(kl_estimate(rollout, old, "k3"), mask)),
    )
