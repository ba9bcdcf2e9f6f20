from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rl.weights.fp8_blocks import (
    PER_BLOCK,
    PER_CHANNEL,
    PER_TENSOR,
    Scaling,
    dequantise,
    quantise,
    scale_shape,
)


def test_each_block_is_multiplied_by_its_own_scale() -> None:
    weight = torch.ones(130, 200).to(torch.float8_e4m3fn)
    weight[129, 199] = 2.0
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    full = dequantise(weight, scale, torch.float32)
    assert full[0, 0] == 1
    assert full[127, 128] == 2
    assert full[128, 127] == 3
    assert full[129, 199] == 8
    assert full.dtype == torch.float32
    assert dequantise(weight, scale, torch.bfloat16).dtype == torch.bfloat16


def test_the_largest_number_of_a_block_becomes_448() -> None:
    weight = torch.zeros(128, 256)
    weight[3, 5], weight[7, 9], weight[0, 200] = -896.0, 448.0, 0.5
    small, scale = quantise(weight)
    assert scale.tolist() == [[2.0, pytest.approx(0.5 / 448)]]
    assert small[3, 5].item() == -448
    assert small[7, 9].item() == 224
    assert small[0, 200].item() == 448
    assert quantise(torch.zeros(1, 1))[1].tolist() == [[1.0]]


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (300, 129), (256, 640)])
def test_numbers_stay_within_half_a_step_and_quantising_again_changes_nothing(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    small, scale = quantise(weight)
    assert tuple(scale.shape) == scale_shape(shape)
    back = dequantise(small, scale, torch.float32)
    # e4m3 has 3 bits of mantissa: a step is 1/8 of the power of two below; beneath 2^-6 it is 2^-9 of the scale
    step = torch.maximum(weight.abs() / 16, scale.max() * 2.0**-10)
    assert ((back - weight).abs() <= step * 1.0001).all()
    again, again_scale = quantise(back)
    assert torch.equal(again.view(torch.uint8), small.view(torch.uint8))
    torch.testing.assert_close(again_scale, scale, rtol=1e-6, atol=0)


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have scales of shape \(2, 1\).*got \(1, 1\)"):
        dequantise(torch.zeros(129, 2).to(torch.float8_e4m3fn), torch.ones(1, 1), torch.float32)
    with pytest.raises(ValueError, match="only a matrix has blocks"):
        scale_shape((3,))


SHAPES = [(128, 128), (1, 1), (300, 129), (256, 640), (100, 3)]
SCALINGS = [
    replace(scaling, power_of_two=power_of_two)
    for scaling in (PER_BLOCK, PER_TENSOR, PER_CHANNEL, Scaling(block=(192, 32)))
    for power_of_two in (False, True)
]


def block_by_block(weight: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """The definition: a block is divided by its scale and cast, one at a time, with scales by NumPy."""
    height, width = (size or whole for size, whole in zip(scaling.block, weight.shape, strict=True))
    small = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(scale_shape(tuple(weight.shape), scaling))
    for row, column in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
        place = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
        block = weight[place].float()
        scale = np.float32(block.abs().max()) / np.float32(448)
        if scaling.power_of_two:
            scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
        scales[row, column] = float(scale)
        small[place] = (block / scales[row, column]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return small, scales


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_is_a_cast_of_each_block_by_its_scale(
    shape: tuple[int, int], scaling: Scaling, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    small, scales = quantise(weight, scaling)
    wanted, wanted_scales = block_by_block(weight, scaling)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(small.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_scaling_stays_within_half_a_step_and_comes_back(shape: tuple[int, int], scaling: Scaling) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    small, scales = quantise(weight, scaling)
    back = dequantise(small, scales, torch.float32, scaling)
    step = torch.maximum(weight.abs() / 16, scales.max() * 2.0**-10)
    assert ((back - weight).abs() <= step * 1.0001).all()
    again, again_scales = quantise(back, scaling)
    torch.testing.assert_close(dequantise(again, again_scales, torch.float32, scaling), back, rtol=1e-6, atol=0)


def test_scales_that_are_powers_of_two_are_rounded_up() -> None:
    weight = torch.tensor([[448.0], [449.0], [900.0], [0.0]])
    small, scales = quantise(weight, Scaling(block=(1, 0), power_of_two=True))
    assert scales.flatten().tolist() == [1.0, 2.0, 4.0, 1.0]
    assert small.flatten().tolist() == [448.0, 224.0, 224.0, 0.0]


def test_a_row_of_zeros_has_the_smallest_scale_where_there_is_one() -> None:
    assert quantise(torch.zeros(2, 3), PER_CHANNEL)[1].flatten().tolist() == pytest.approx([1 / (448 * 512)] * 2)
    assert quantise(torch.zeros(2, 3), PER_TENSOR)[1].tolist() == [[1.0]]
