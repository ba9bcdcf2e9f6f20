"""Losses: picklable values that turn model outputs into SUMS over loss tokens.

Each returns ``sum(loss_weight * term)``, which is its metric ``loss`` as well, and detached, unweighted sums for the
other metrics. Nothing is divided here: whoever runs the optimizer divides once by the loss tokens of its whole step, so
the result does not depend on how the step was cut into micro-batches. What stands outside ``loss_mask`` has neither a
value nor a gradient, whatever it is.

A loss of your own is a frozen dataclass with the same ``__call__``; one that changes the policy's objective alone is a
:class:`PolicyGradientLoss`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_rl.batches import LossTerms, MicroBatch, PackedTokens, TokenOutputs, ValueOutputs
from megatron_rl.interfaces import TokenLoss
from megatron_rl.maths.kl import LARGEST_LOG_RATIO, KlKind, kl_estimate
from megatron_rl.maths.masking import keep, row_sums


def _summed(term: Tensor, batch: PackedTokens, **metrics: Tensor) -> LossTerms:
    """The weighted sum of ``term`` [N] and the plain sums of ``metrics`` [N]; all are 0 outside the mask."""
    total = (keep(batch.loss_weight, batch.loss_mask) * term).sum()
    sums = {name: value.detach().sum() for name, value in metrics.items()}
    return LossTerms(total=total, metrics={"loss": total.detach(), **sums})


@dataclass(frozen=True, kw_only=True)
class PolicyGradientLoss(ABC):
    """What the policy losses have in common: a clipped objective of each token's advantage, an entropy bonus, and a KL
    term where its coefficient is above 0. A subclass says what the objective is.

    Metrics, each summed over loss tokens: ``loss`` (the weighted one); ``entropy`` (nats); ``kl_update`` (k3 estimate
    of KL(before || after this update), nats); ``clip_fraction`` (1 where a bound decides the objective); and with a KL
    term ``kl_ref`` (its estimate, nats). Log-ratios are bounded to 20 either way, so that ratios stay finite.

    Attributes:
        clip_low, clip_high: how far the ratio may go below and above 1.
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of the KL to the reference in the loss; 0 reads no reference.
        kl_kind: its estimator (k1 has no useful gradient in a loss: its expectation is 0).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_kind: KlKind = "k3"

    @abstractmethod
    def objective(self, logprobs: Tensor, old: Tensor, advantages: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """What is maximised for each token, and whether a bound decides it.

        Args:
            logprobs: [N], of the policy; like the next two 0 outside the batch's ``loss_mask``.
            old: [N], of the policy before the update.
            advantages: [N].
            batch: where the rows begin and end.

        Returns:
            [N] f32 with a gradient, 0 where the three are 0; [N] bool.
        """

    def __call__(self, outputs: TokenOutputs, batch: MicroBatch) -> LossTerms:
        """Sum over the loss tokens of ``batch``.

        Raises:
            ValueError: ``kl_coef`` is above 0 and the batch has no reference log-probs.
        """
        mask = batch.loss_mask
        logprobs, old = keep(outputs.logprobs, mask), keep(batch.old_logprobs, mask)
        entropy = keep(outputs.entropy, mask)
        objective, clipped = self.objective(logprobs, old, keep(batch.advantages, mask), batch)
        term = -objective - self.entropy_coef * entropy
        metrics = {
            "clip_fraction": (clipped & mask).to(term.dtype),
            "entropy": entropy,
            "kl_update": kl_estimate(old, logprobs.detach(), "k3"),
        }
        if self.kl_coef > 0:
            if batch.ref_logprobs is None:
                raise ValueError(f"kl_coef={self.kl_coef} in the loss needs reference log-probs, the batch has none")
            metrics["kl_ref"] = kl_estimate(logprobs, keep(batch.ref_logprobs, mask), self.kl_kind)
            term = term + self.kl_coef * metrics["kl_ref"]
        return _summed(term, batch, **metrics)


def _response_sums(x: Tensor, mask: Tensor, batch: PackedTokens) -> Tensor:
    """The sum of ``x`` [N] over each row's part of ``mask``, at every position of the row; without a gradient."""
    return row_sums(x.detach(), mask, batch.cu_seqlens // batch.parts, batch.over_parts)


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(PolicyGradientLoss):
    """PPO's clipped surrogate.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), equation 7, here with a bound of its own
    for each side (Yu et al., "DAPO", 2025, equation 10): with ``ratio = exp(logprob - old_logprob)``, the objective is
    ``min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``. ``dual_clip`` c bounds that of a token with A < 0
    from below by ``c * A`` (Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
    2020, dual-clip PPO).

    Where a bound decides, the token has no policy gradient; a ratio outside the bounds on the side that does not matter
    is not counted as clipped.

    Attributes:
        dual_clip: c > 1, or None.
    """

    dual_clip: float | None = None

    def objective(self, logprobs: Tensor, old: Tensor, advantages: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The surrogate of each token."""
        return self._clipped(_bounded_exp(logprobs - old), advantages)

    def _clipped(self, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        objective = ratio * advantages
        bounded = torch.minimum(objective, ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages)
        if self.dual_clip is not None:
            bounded = torch.where(advantages < 0, torch.maximum(bounded, self.dual_clip * advantages), bounded)
        return bounded, bounded.detach() != objective.detach()


@dataclass(frozen=True, kw_only=True)
class SequencePolicyLoss(PolicyLoss):
    """GSPO: PPO's surrogate with one ratio for the whole response.

    Source: Zheng et al., "Group Sequence Policy Optimization" (2025), equations 5 and 7, in the per-token form of
    equations 13 and 14: ``s = exp(mean over the response of (logprob - old_logprob))``, and the ratio of each token is
    ``stop_gradient(s) * prob / stop_gradient(prob)``: its value is s, its gradient ``s * grad logprob``. With the
    sequence mean, equal advantages of a response's tokens give equation 5 and its gradient.

    A response lies whole in one micro-batch, so that the ratio does not depend on how a step was cut; ranks that share
    its positions add up what each has.
    """

    def objective(self, logprobs: Tensor, old: Tensor, advantages: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The surrogate of each token."""
        now = logprobs.detach()
        tokens = _response_sums(torch.ones_like(now), batch.loss_mask, batch).clamp(min=1)
        mean = _response_sums(now - old, batch.loss_mask, batch) / tokens
        return self._clipped(_bounded_exp(mean + (logprobs - now)), advantages)


@dataclass(frozen=True, kw_only=True)
class ClippedWeightLoss(PolicyGradientLoss):
    """CISPO: REINFORCE with a bounded importance weight, so that no token loses its gradient.

    Source: MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention" (2025), equations 4
    and 5: the objective is ``stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logprob``. ``clip_fraction``
    counts the weights that were bounded. The paper sets no lower bound, which is ``clip_low=1``.
    """

    def objective(self, logprobs: Tensor, old: Tensor, advantages: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The weighted log-prob of each token."""
        ratio = _bounded_exp(logprobs.detach() - old)
        weight = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return weight * advantages * logprobs, weight != ratio


@dataclass(frozen=True, kw_only=True)
class EngineCorrection:
    """How much a token counts, given how much likelier the trainer found it than the engine that drew it.

    With ``ratio = exp(old_logprob - rollout_logprob)`` of a token, or the product of these over the response:

    * ``truncate``: ``min(ratio, high)``. Truncated importance sampling (TIS): Yao et al., "Your Efficient RL Framework
      Secretly Brings You Off-Policy RL Training" (2025).
    * ``mask``: ``ratio`` inside [low, high], 0 outside. Masked importance sampling (MIS), there with low = 0: Liu et
      al., "When Speed Kills Stability: Demystifying RL Collapse from the Inference-Training Mismatch" (2025). By token
      and with both bounds it is IcePop: Ling Team, "Every Step Evolves: Scaling Reinforcement Learning for
      Trillion-Scale Thinking Model" (2025).

    A token that the engine did not draw (a forced end of sequence) has weight 1 and no part in a response's ratio.

    Attributes:
        outside: what happens to a ratio out of bounds.
        level: one ratio per token, or one per response.
        low, high: the bounds; truncation has no lower one.
    """

    outside: Literal["truncate", "mask"]
    level: Literal["token", "sequence"]
    high: float
    low: float = 0.0

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Weights [N] f32 without a gradient, and whether the ratio was out of bounds [N] bool."""
        drawn = batch.sampled_mask & batch.loss_mask
        gap = keep(batch.old_logprobs - batch.rollout_logprobs, drawn).detach()
        if self.level == "sequence":
            gap = keep(_response_sums(gap, drawn, batch), drawn)
        ratio = _bounded_exp(gap)
        cut = drawn & ((ratio > self.high) | ((ratio < self.low) & (self.outside == "mask")))
        at_bound = torch.zeros_like(ratio) if self.outside == "mask" else ratio.clamp(max=self.high)
        return torch.where(cut, at_bound, ratio), cut


@dataclass(frozen=True, kw_only=True)
class CorrectedLoss:
    """Any policy loss with its tokens weighed by an :class:`EngineCorrection`: the loss's own weights are multiplied,
    its divisor stays, and of its metrics all but ``loss``, which is what is minimised.

    The entropy bonus and the KL term of a token are weighed as well, since they are taken at states that the engine
    drew.

    Metrics besides the loss's own, each summed over loss tokens: ``engine_weight``; ``engine_cut`` (1 where the ratio
    was out of bounds: truncated or dropped).

    Attributes:
        loss: the other one.
        correction: what a token counts.
    """

    loss: TokenLoss
    correction: EngineCorrection

    def __call__(self, outputs: TokenOutputs, batch: MicroBatch) -> LossTerms:
        """Sum over the loss tokens of ``batch``; errors as the loss's."""
        weight, cut = self.correction(batch)
        terms = self.loss(outputs, replace(batch, loss_weight=keep(batch.loss_weight, batch.loss_mask) * weight))
        metrics = {"engine_weight": keep(weight, batch.loss_mask).sum(), "engine_cut": cut.to(weight.dtype).sum()}
        return LossTerms(total=terms.total, metrics={**terms.metrics, **metrics})


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
        """Sum over the loss tokens of ``batch``.

        Raises:
            ValueError: the batch has no values or targets.
        """
        if batch.values is None or batch.returns is None:
            raise ValueError("a value loss needs the critic's values and targets, the batch has none")
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
