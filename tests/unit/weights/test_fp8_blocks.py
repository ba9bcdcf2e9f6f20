from __future__ import annotations

import pytest
import torch

from megatron_rl.weights.fp8_blocks import dequantise, quantise, scale_shape


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
