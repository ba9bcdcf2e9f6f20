"""Which average a loss is. Losses are sums and their divisor is the number N of loss tokens of an optimizer step, so
every average is a weight per token: one :class:`~megatron_rl.interfaces.LossMean` each.

All take the loss tokens of one whole optimizer step, [b, T] bool, and give [b, T] f32 weights, 0 outside the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenMean:
    """Over all tokens: weight 1.

    Source: Yu et al., "DAPO" (2025), equation 12; PPO's usual mean.
    """

    def __call__(self, mask: Tensor) -> Tensor:
        """The weights; their sum is N."""
        return mask.float()


@dataclass(frozen=True, kw_only=True)
class SequenceMean:
    """Over the tokens of each response and then over responses: weight ``N / (responses x tokens of the response)``.

    Source: Shao et al., "DeepSeekMath" (2024), equation 3 (GRPO); OpenRLHF's and SimpleRL-Zero's average.
    """

    def __call__(self, mask: Tensor) -> Tensor:
        """The weights; their sum is N."""
        per_row = mask.sum(1, keepdim=True)
        occupied = (per_row > 0).sum()
        return mask * (mask.sum() / (occupied * per_row.clamp(min=1)))


@dataclass(frozen=True, kw_only=True)
class ConstantMean:
    """Over a fixed number of tokens for each response, whatever its length, and then over responses: weight
    ``N / (responses x tokens)``.

    Source: Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective" (2025), section 3.2 and its
    listing 1 (Dr. GRPO), where the constant is the longest response allowed.

    Attributes:
        tokens: the constant.
    """

    tokens: int

    def __call__(self, mask: Tensor) -> Tensor:
        """The weights."""
        occupied = mask.any(1).sum().clamp(min=1)
        return mask * (mask.sum() / (occupied * self.tokens))
