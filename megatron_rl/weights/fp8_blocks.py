"""Weights in 8 bits with a scale per block of 128 x 128, as DeepSeek-V3 publishes them.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 3.3.2 (blocks of 128 x 128 for weights, E4M3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
SCALE_SUFFIX = "_scale_inv"
"""``x.weight`` has its scales in ``x.weight_scale_inv``."""
QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""What ``config.json`` says of such weights."""

_LARGEST = torch.finfo(FP8).max


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of a matrix, the last ones of a row or column cut off where its sides are no multiple of 128.

    Raises:
        ValueError: it is not a matrix.
    """
    if len(shape) != 2:
        raise ValueError(f"only a matrix has blocks of {BLOCK} x {BLOCK}, got shape {shape}")
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def dequantise(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` times the scale of its block, computed in float32.

    Args:
        weight: [rows, columns] e4m3.
        scale_inv: [ceil(rows / 128), ceil(columns / 128)] f32.
        dtype: of the result.

    Raises:
        ValueError: the scales are not one per block.
    """
    _check_scales(weight, scale_inv)
    full = torch.empty(weight.shape, dtype=dtype)
    for row, rows in _bands(weight.shape[0]):
        full[rows] = weight[rows].float() * _over_columns(scale_inv[row].float(), weight.shape[1])
    return full


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: the largest number of each block becomes the largest that e4m3 has, 448.

    Args:
        weight: [rows, columns].

    Returns:
        weight [rows, columns] e4m3 and scale_inv [ceil(rows / 128), ceil(columns / 128)] f32. A block of zeros has
        scale 1.

    Raises:
        ValueError: it is not a matrix.
    """
    scale_inv = torch.empty(scale_shape(tuple(weight.shape)))
    small = torch.empty(weight.shape, dtype=FP8)
    columns = weight.shape[1]
    for row, rows in _bands(weight.shape[0]):
        band = weight[rows].float()
        largest = torch.nn.functional.pad(band.abs().amax(dim=0), (0, -columns % BLOCK)).view(-1, BLOCK).amax(dim=1)
        scale_inv[row] = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
        # a quotient may round to just above the largest number, which has no finite neighbour in e4m3
        small[rows] = (band / _over_columns(scale_inv[row], columns)).clamp(-_LARGEST, _LARGEST).to(FP8)
    return small, scale_inv


def _bands(rows: int) -> Iterator[tuple[int, slice]]:
    """Rows of one block, so that no whole matrix is ever held in float32."""
    return ((start // BLOCK, slice(start, min(start + BLOCK, rows))) for start in range(0, rows, BLOCK))


def _over_columns(scales: Tensor, columns: int) -> Tensor:
    return scales.repeat_interleave(BLOCK)[:columns]


def _check_scales(weight: Tensor, scale_inv: Tensor) -> None:
    wanted = scale_shape(tuple(weight.shape))
    if tuple(scale_inv.shape) != wanted:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} must have scales of shape {wanted}, one per {BLOCK} x {BLOCK} "
            f"block, got {tuple(scale_inv.shape)}"
        )
