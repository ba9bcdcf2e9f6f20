"""Weights in 8 bits (e4m3) with a scale per block: 128 x 128 as DeepSeek-V3 publishes them, an output row, all of it.

A weight is about ``small * scale``: the largest number of each block becomes the largest that e4m3 has, 448. Scales in
float32 use all of that range; powers of two lose up to one bit of it, and multiply without rounding.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), section 3, for e4m3; DeepSeek-AI, "DeepSeek-V3
Technical Report" (2024), section 3.3.2, for blocks of 128 x 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
"""What ``config.json`` says of weights in blocks of 128 x 128."""

_LARGEST = torch.finfo(FP8).max


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Which numbers of a weight share a scale, and which scales there are.

    Attributes:
        block: output rows x input columns of a block; a size of 0 stands for all of them.
        power_of_two: scales are rounded up to powers of two.
        smallest: scale; 0: a block of zeros has scale 1.
    """

    block: tuple[int, int]
    power_of_two: bool = False
    smallest: float = 0.0


PER_BLOCK = Scaling(block=(BLOCK, BLOCK))
PER_TENSOR = Scaling(block=(0, 0))
PER_CHANNEL = Scaling(block=(1, 0), smallest=1 / (_LARGEST * 512))
"""With the bits, and the smallest scale, of vLLM's ``fp8_per_channel``."""


def scale_shape(shape: tuple[int, ...], scaling: Scaling = PER_BLOCK) -> tuple[int, int]:
    """Blocks of a matrix, the last ones of a row or column cut off where its sides are no multiple of the block's.

    Raises:
        ValueError: it is not a matrix.
    """
    rows, columns = _block(shape, scaling)
    return -(-shape[0] // rows), -(-shape[1] // columns)


def dequantise(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype, scaling: Scaling = PER_BLOCK) -> Tensor:
    """``weight`` times the scale of its block, computed in float32.

    Args:
        weight: [rows, columns] e4m3.
        scale_inv: [blocks down, blocks across] f32, see :func:`scale_shape`.
        dtype: of the result.
        scaling: which numbers share a scale.

    Raises:
        ValueError: the scales are not one per block.
    """
    _check_scales(weight, scale_inv, scaling)
    full = torch.empty(weight.shape, dtype=dtype)
    for rows, blocks in _bands(weight.shape, scaling):
        full[rows] = weight[rows].float() * _spread(scale_inv[blocks].float(), weight, rows, scaling)
    return full


def quantise(weight: Tensor, scaling: Scaling = PER_BLOCK) -> tuple[Tensor, Tensor]:
    """The inverse: the largest number of each block becomes the largest that e4m3 has, 448, or with scales that are
    powers of two a number above 224.

    Args:
        weight: [rows, columns].
        scaling: which numbers share a scale.

    Returns:
        weight [rows, columns] e4m3 and scale_inv [blocks down, blocks across] f32, see :func:`scale_shape`.

    Raises:
        ValueError: it is not a matrix.
    """
    scale_inv = _scales(_largest(weight, scaling), scaling)
    small = torch.empty(weight.shape, dtype=FP8)
    for rows, blocks in _bands(weight.shape, scaling):
        quotient = weight[rows].float() / _spread(scale_inv[blocks], weight, rows, scaling)
        # it may round to just above the largest number, which has no finite neighbour in e4m3
        small[rows] = quotient.clamp(-_LARGEST, _LARGEST).to(FP8)
    return small, scale_inv


def _largest(weight: Tensor, scaling: Scaling) -> Tensor:
    """[blocks down, blocks across] f32: the largest absolute value of each block."""
    found = torch.zeros(scale_shape(tuple(weight.shape), scaling))
    height, width = _block(weight.shape, scaling)
    for rows, blocks in _bands(weight.shape, scaling):
        band = weight[rows].float().abs()
        band = torch.nn.functional.pad(band, (0, -band.shape[1] % width, 0, -band.shape[0] % min(height, _BAND_ROWS)))
        here = band.view(found[blocks].shape[0], -1, found.shape[1], width).amax(dim=(1, 3))
        found[blocks] = torch.maximum(found[blocks], here)
    return found


def _scales(largest: Tensor, scaling: Scaling) -> Tensor:
    scales = largest / torch.tensor(_LARGEST)
    if scaling.power_of_two:
        mantissa, exponent = torch.frexp(scales)  # mantissa in [0.5, 1)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    if scaling.smallest:
        return scales.clamp_min(scaling.smallest)
    return torch.where(largest > 0, scales, torch.ones_like(scales))


_BAND_ROWS = 128
"""Rows that are in float32 at a time, so that no whole matrix ever is."""


def _block(shape: tuple[int, ...], scaling: Scaling) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"only a matrix has blocks with a scale each, got shape {tuple(shape)}")
    rows, columns = (size or max(1, whole) for size, whole in zip(scaling.block, shape, strict=True))
    return rows, columns


def _bands(shape: tuple[int, ...], scaling: Scaling) -> Iterator[tuple[slice, slice]]:
    """Rows, and the rows of blocks that they lie in: whole ones, or a part of one."""
    height, _ = _block(shape, scaling)
    within = _BAND_ROWS if height == shape[0] else height
    step = _BAND_ROWS // height * height if height <= _BAND_ROWS else within
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        yield slice(start, stop), slice(start // height, -(-stop // height))


def _spread(scales: Tensor, weight: Tensor, rows: slice, scaling: Scaling) -> Tensor:
    """For each number of these rows of ``weight``, the scale of its block."""
    height, width = _block(weight.shape, scaling)
    band = rows.stop - rows.start
    return scales.repeat_interleave(min(height, band), 0)[:band].repeat_interleave(width, 1)[:, : weight.shape[1]]


def _check_scales(weight: Tensor, scale_inv: Tensor, scaling: Scaling) -> None:
    wanted = scale_shape(tuple(weight.shape), scaling)
    if tuple(scale_inv.shape) != wanted:
        rows, columns = _block(weight.shape, scaling)
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} must have scales of shape {wanted}, one per {rows} x {columns} "
            f"block, got {tuple(scale_inv.shape)}"
        )
