"""Weights in 8 bits (e4m3) with a scale per block: 128 x 128 as DeepSeek-V3 publishes them, an output row, all of it.

A weight is about ``small * scale``: the largest number of each block becomes the largest that e4m3 has, 448. Scales in
float32 use all of that range; powers of two lose up to one bit of it, and multiply without rounding.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), section 3, for e4m3; DeepSeek-AI, "DeepSeek-V3
Technical Report" (2024), section 3.3.2, for blocks of 128 x 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
SCALE_SUFFIX = "_scale_inv"
"""``x.weight`` has its scales in ``x.weight_scale_inv``."""
_LARGEST = torch.finfo(FP8).max


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Which numbers share a scale, which scales there are, and how numbers are divided by them.

    Attributes:
        block: rows x columns of a block (of a weight: outputs x inputs); a size of 0 stands for all of them.
        power_of_two: scales are rounded up to powers of two.
        smallest: scale; 0: a block of zeros has scale 1.
        reciprocal: numbers are multiplied by 1 / scale, which rounds a few of them to the other neighbour.
    """

    block: tuple[int, int]
    power_of_two: bool = False
    smallest: float = 0.0
    reciprocal: bool = False


PER_BLOCK = Scaling(block=(BLOCK, BLOCK))
PER_TENSOR = Scaling(block=(0, 0))
PER_CHANNEL = Scaling(block=(1, 0), smallest=1 / (_LARGEST * 512))
ENGINE_SCALINGS: Mapping[str, Scaling] = {
    "fp8_per_channel": PER_CHANNEL,
    "fp8_per_tensor": replace(PER_TENSOR, reciprocal=True),
    "fp8_per_block": replace(PER_BLOCK, smallest=1e-4 / _LARGEST, reciprocal=True),
}
"""Of weights, with the bits of vLLM's online quantisation of that name, of bfloat16 weights in the form in which its
layers hold them (``vllm/model_executor/layers/quantization/online/fp8.py``, blocks: ``vllm/utils/deep_gemm.py``).
"""


def block_config(whole: Sequence[str]) -> dict[str, Any]:
    """What ``config.json`` says of weights in blocks of 128 x 128.

    Args:
        whole: names of modules that have a matrix, but not in blocks: an engine takes any other one for blocks.
    """
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [*whole],
    }


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
    full = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows, blocks in _bands(weight.shape, scaling):
        band = _blocked(weight[rows], scaling) * scale_inv[blocks].float()[:, None, :, None]
        full[rows] = _flat(band, weight[rows])
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
    scale_inv = scales(largest(weight, scaling), scaling)
    return divided(weight, scale_inv, scaling), scale_inv


def largest(weight: Tensor, scaling: Scaling) -> Tensor:
    """[blocks down, blocks across] f32: the largest absolute value of each block; errors as :func:`quantise`."""
    found = torch.zeros(scale_shape(tuple(weight.shape), scaling), device=weight.device)
    for rows, blocks in _bands(weight.shape, scaling):
        found[blocks] = torch.maximum(found[blocks], _blocked(weight[rows], scaling).abs().amax(dim=(1, 3)))
    return found


def scales(largest: Tensor, scaling: Scaling) -> Tensor:
    """The scales of blocks whose largest absolute values are given, of the same shape, f32."""
    # a tensor as divisor: by a Python number torch may multiply with its reciprocal
    found = largest / largest.new_tensor(_LARGEST)
    if scaling.power_of_two:
        mantissa, exponent = torch.frexp(found)  # mantissa in [0.5, 1)
        found = torch.ldexp(torch.ones_like(found), exponent - (mantissa == 0.5).int())
    if scaling.smallest:
        return found.clamp_min(scaling.smallest)
    return torch.where(largest > 0, found, torch.ones_like(found))


def divided(weight: Tensor, scale_inv: Tensor, scaling: Scaling) -> Tensor:
    """[rows, columns] e4m3: each number divided by the scale of its block and rounded.

    Raises:
        ValueError: the scales are not one per block.
    """
    _check_scales(weight, scale_inv, scaling)
    small = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    for rows, blocks in _bands(weight.shape, scaling):
        band, scale = _blocked(weight[rows], scaling), scale_inv[blocks][:, None, :, None]
        quotient = band * scale.reciprocal() if scaling.reciprocal else band / scale
        # it may round to just above the largest number, which has no finite neighbour in e4m3
        small[rows] = _flat(quotient.clamp(-_LARGEST, _LARGEST), weight[rows]).to(FP8)
    return small


_BAND_NUMBERS = 1 << 22
"""So many are in float32 at a time: few calls, and never a large matrix."""


def _block(shape: tuple[int, ...], scaling: Scaling) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"only a matrix has blocks with a scale each, got shape {tuple(shape)}")
    rows, columns = (size or max(1, whole) for size, whole in zip(scaling.block, shape, strict=True))
    return rows, columns


def _bands(shape: tuple[int, ...], scaling: Scaling) -> Iterator[tuple[slice, slice]]:
    """Rows, and the rows of blocks that they lie in: whole ones, or a part of one that is all of the matrix."""
    height, _ = _block(shape, scaling)
    step = max(1, _BAND_NUMBERS // max(1, shape[1]))
    if height < shape[0]:
        step = max(height, step // height * height)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        yield slice(start, stop), slice(start // height, -(-stop // height))


def _blocked(band: Tensor, scaling: Scaling) -> Tensor:
    """[blocks down, rows of each, blocks across, columns of each] f32, filled up with zeros."""
    height, width = _block(band.shape, scaling)
    height = min(height, max(1, band.shape[0]))
    filled = torch.nn.functional.pad(band.float(), (0, -band.shape[1] % width, 0, -band.shape[0] % height))
    blocked: Tensor = filled.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return blocked


def _flat(blocked: Tensor, band: Tensor) -> Tensor:
    """The inverse, of the shape of ``band``."""
    return blocked.flatten(2, 3).flatten(0, 1)[: band.shape[0], : band.shape[1]]


def _check_scales(weight: Tensor, scale_inv: Tensor, scaling: Scaling) -> None:
    wanted = scale_shape(tuple(weight.shape), scaling)
    if tuple(scale_inv.shape) != wanted:
        rows, columns = _block(weight.shape, scaling)
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} must have scales of shape {wanted}, one per {rows} x {columns} "
            f"block, got {tuple(scale_inv.shape)}"
        )
