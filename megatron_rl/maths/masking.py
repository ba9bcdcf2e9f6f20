"""Sums, means and variances over the entries that a mask selects. What the mask leaves out may be anything, NaN too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SMALLEST_VARIANCE = 1e-8


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where ``mask`` [same shape, bool], 0 elsewhere; neither a NaN nor a gradient passes from elsewhere."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of ``x`` over ``mask``: along ``dim``, or of everything (a scalar)."""
    kept = keep(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``x`` over ``mask``: along ``dim``, or of everything (a scalar); 0 where the mask selects nothing."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divided by the count, not by the count - 1) of ``x`` over ``mask``, a scalar.

    0 where the mask selects nothing.
    """
    return masked_mean((keep(x, mask) - masked_mean(x, mask)) ** 2, mask)


def row_sums(
    x: Tensor, mask: Tensor, cu_seqlens: Tensor, over_parts: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Sum of ``x`` over the part of ``mask`` in each packed row, at every position of that row.

    Args:
        x: [N], rows laid end to end.
        mask: [N] bool.
        cu_seqlens: [S + 1], where each row starts; the last entry is N.
        over_parts: where others hold parts of the same rows, adds up their sums [S]; None: these are whole rows.

    Returns:
        [N].
    """
    rows = torch.arange(len(cu_seqlens) - 1, device=x.device).repeat_interleave(cu_seqlens.diff())
    sums = x.new_zeros(len(cu_seqlens) - 1).index_add(0, rows, keep(x, mask))
    return (sums if over_parts is None else over_parts(sums))[rows]


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Bring ``x`` to unit variance, and to mean 0, over ``mask``: ``(x - mean) * rsqrt(max(var, 1e-8))``.

    Population variance with this floor is what OpenRLHF's replay buffer does, and with it the SimpleRL recipe. The sums
    are taken in float64: float32 leaves a mean of equal numbers so far from them that the floor would make it count.

    Args:
        x: any shape.
        mask: bool, same shape.
        shift_mean: False puts the mean back after scaling.

    Returns:
        the shape of ``x``, 0 outside the mask.
    """
    exact = x.double()
    mean = masked_mean(exact, mask)
    scaled = (keep(exact, mask) - mean) * masked_var(exact, mask).clamp(min=_SMALLEST_VARIANCE).rsqrt()
    return keep(scaled if shift_mean else scaled + mean, mask).to(x.dtype)
