"""Numbers that say whether a run is healthy; none of them is trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_rl.maths.kl import kl_estimate
from megatron_rl.maths.masking import keep, masked_mean, masked_var

_CONSTANT = 1e-12
_RETURNS = {
    "return_below_-0.75": (-math.inf, -0.75),
    "return_-0.75_to_-0.25": (-0.75, -0.25),
    "return_-0.25_to_0.25": (-0.25, 0.25),
    "return_0.25_to_0.75": (0.25, 0.75),
    "return_above_0.75": (0.75, math.inf),
}
_PLACES = {
    "position_first_quarter": (0.0, 0.25),
    "position_second_quarter": (0.25, 0.5),
    "position_third_quarter": (0.5, 0.75),
    "position_last_quarter": (0.75, 1.0),
}


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


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Some tokens as the critic saw them and as they turned out.

    Attributes:
        tokens: how many.
        value: mean of the critic's values; 0 where there are none.
        return_: mean of the returns; 0 where there are none.
    """

    tokens: int
    value: float
    return_: float


def critic_calibration(values: Tensor, returns: Tensor, mask: Tensor) -> dict[str, Bucket]:
    """Where a critic is wrong: its mean value beside the mean return, by return and by place in the response.

    The buckets are fixed, so that runs can be compared: five of returns (in units of the score; the built-in rules'
    scores do not lie near a bound), and the quarters of each response, by the share of its tokens that come before. A
    lower bound belongs to its bucket, an upper one does not.

    A critic that knows the mean alone has the same value in every bucket; one that is right at the end of a response
    and wrong at its start differs between the quarters.

    Args:
        values: [B, T], of the critic before the update.
        returns: [B, T].
        mask: [B, T] bool, the responses.

    Returns:
        the buckets by name: ``return_...`` and ``position_...``; each family holds every token once.
    """
    place = (mask.cumsum(1) - 1).double() / mask.sum(1, keepdim=True).clamp(min=1)
    found = {}
    for key, buckets in ((returns, _RETURNS), (place, _PLACES)):
        for name, (low, high) in buckets.items():
            inside = mask & (key >= low) & (key < high)
            found[name] = Bucket(
                tokens=int(inside.sum()),
                value=float(masked_mean(values.double(), inside)),
                return_=float(masked_mean(returns.double(), inside)),
            )
    return found


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
