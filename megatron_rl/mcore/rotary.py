"""Rotary frequencies, in float32 to the last bit those of transformers: a rounding error grows with the position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rl.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling


def inverse_frequencies(theta: float, width: int, scaling: RopeScaling | None) -> Tensor:
    """Angle by which each pair of dims turns from one position to the next.

    Args:
        theta: base; pair ``i`` turns by ``theta^(-2i / width)`` a position (Su et al. 2021, "RoFormer", eq. 15).
        width: of the part of a head that rotates.
        scaling: how positions beyond the first window are reached, where they are.

    Returns:
        [width / 2] f32.
    """
    radians = theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if isinstance(scaling, LinearScaling):
        return 1.0 / radians / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(1.0 / radians, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(radians, theta, scaling)
    return 1.0 / radians


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    length = 2 * math.pi / plain
    window, low, high = scaling.original_positions, scaling.low_freq_factor, scaling.high_freq_factor
    share = (window / length - low) / (high - low)
    mixed = (1 - share) * plain / scaling.factor + share * plain
    slow, fast = length > window / low, length < window / high
    return torch.where(slow, plain / scaling.factor, torch.where(fast, plain, mixed))


def _yarn(radians: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    pairs = len(radians)

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair of dims that turns so often in the first window."""
        return pairs * math.log(scaling.original_positions / (times * 2 * math.pi)) / math.log(theta)

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    last += 0.001 if first == last else 0.0
    kept = 1 - ((torch.arange(pairs, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return 1.0 / (scaling.factor * radians) * (1 - kept) + 1.0 / radians * kept
