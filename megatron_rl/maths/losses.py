"""Losses: picklable values that turn model outputs into SUMS over loss tokens.

Each returns ``sum(loss_weight * term)`` and detached, unweighted sums for the metrics. Nothing is divided here: whoever
runs the optimizer divides once by the loss tokens of its whole step, so the result does not depend on how the step was
cut into micro-batches. What stands outside ``loss_mask`` has neither a value nor a gradient, whatever it is.

A loss of your own is a frozen dataclass with the same ``__call__``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.batches import LossTerms, MicroBatch, PackedTokens, TokenOutputs, ValueOutputs
from megatron_rl.maths.kl import LARGEST_LOG_RATIO, KlKind, kl_estimate
from megatron_rl.maths.masking import keep


def _summed(term: Tensor, batch: PackedTokens, **metrics: Tensor) -> LossTerms:
    """The weighted sum of ``term`` [N] and the plain sums of ``metrics`` [N]; all are 0 outside the mask."""
    return LossTerms(
        total=(keep(batch.loss_weight, batch.loss_mask) * term).sum(),
        metrics={name: value.detach().sum() for name, value in {"loss": term, **metrics}.items()},
    )


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """PPO's clipped surrogate, with an entropy bonus and a KL term where their coefficients are above 0.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), equation 7, here with a bound of its own
    for each side (Yu et al., "DAPO", 2025, equation 10): with ``ratio = exp(logprob - old_logprob)``,
    ``term = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``. ``dual_clip`` c bounds the term of a token
    with A < 0 by ``-c * A`` (Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
    2020, dual-clip PPO). The log-ratio is bounded to 20 either way, so that the ratio stays finite.

    Metrics, each summed over loss tokens: ``loss`` (the whole term); ``entropy`` (nats); ``kl_update`` (k3 estimate of
    KL(before || after this update), nats); ``clip_fraction`` (1 where a bound decides the term, so that the token has
    no policy gradient: a ratio outside the bounds on the side that does not matter is not counted); and with a KL term
    ``kl_ref`` (its estimate, nats).

    Attributes:
        clip_low, clip_high: how far the ratio may go below and above 1.
        dual_clip: c > 1, or None.
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of the KL to the reference in the loss; 0 reads no reference.
        kl_kind: its estimator (k1 has no useful gradient in a loss: its expectation is 0).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_kind: KlKind = "k3"

    def __call__(self, outputs: TokenOutputs, batch: MicroBatch) -> LossTerms:
        """Sum over the loss tokens of ``batch``.

        Raises:
            ValueError: ``kl_coef`` is above 0 and the batch has no reference log-probs.
        """
        mask = batch.loss_mask
        logprobs, old = keep(outputs.logprobs, mask), keep(batch.old_logprobs, mask)
        advantages, entropy = keep(batch.advantages, mask), keep(outputs.entropy, mask)
        ratio = (logprobs - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
        objective = ratio * advantages
        bounded = torch.minimum(objective, ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages)
        if self.dual_clip is not None:
            bounded = torch.where(advantages < 0, torch.maximum(bounded, self.dual_clip * advantages), bounded)
        term = -bounded - self.entropy_coef * entropy
        metrics = {
            "clip_fraction": (bounded.detach() != objective.detach()).to(term.dtype),
            "entropy": entropy,
            "kl_update": kl_estimate(old, logprobs.detach(), "k3"),
        }
        if self.kl_coef > 0:
            if batch.ref_logprobs is None:
                raise ValueError(f"kl_coef={self.kl_coef} in the loss needs reference log-probs, the batch has none")
            metrics["kl_ref"] = kl_estimate(logprobs, keep(batch.ref_logprobs, mask), self.kl_kind)
            term = term + self.kl_coef * metrics["kl_ref"]
        return _summed(term, batch, **metrics)


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """Half the squared error of the critic, clipped around the values before the update.

    Source: OpenAI baselines' PPO, written down in Engstrom et al., "Implementation Matters in Deep Policy Gradients"
    (2020), section 3: ``term = max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2``.

    Metrics, each summed over loss tokens: ``loss``; ``clip_fraction`` (1 where the clipped error decides the term, so
    that the token has no gradient).

    Attributes:
        clip: how far the value may move; infinity gives the plain squared error.
    """

    clip: float = 0.2

    def __call__(self, outputs: ValueOutputs, batch: MicroBatch) -> LossTerms:
        """Sum over the loss tokens of ``batch``."""
        mask = batch.loss_mask
        values, returns = keep(outputs.values, mask), keep(batch.returns, mask)
        error = (values - returns) ** 2
        before = keep(batch.values, mask)
        # Not before + clamp(values - before): that differs from values by rounding where nothing is clipped.
        near = torch.minimum(torch.maximum(values, before - self.clip), before + self.clip)
        worst = torch.maximum(error, (near - returns) ** 2)
        clipped = (worst.detach() != error.detach()).to(worst.dtype)
        return _summed(0.5 * worst, batch, clip_fraction=clipped)


@dataclass(frozen=True, kw_only=True)
class SupervisedLoss:
    """Next-token cross-entropy: ``term = -logprob``, in nats. Metric: ``loss``, summed over loss tokens."""

    def __call__(self, outputs: TokenOutputs, batch: PackedTokens) -> LossTerms:
        """Sum over the loss tokens of ``batch``."""
        return _summed(-keep(outputs.logprobs, batch.loss_mask), batch)
