from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rl.device import prepare_megatron

prepare_megatron()

from megatron_rl.mcore.fake_quant import FORMATS, Scaling, quantise_dequantise, straight_through  # noqa: E402

CHANNEL, TOKEN = FORMATS["fp8_per_channel"].weight, FORMATS["fp8_per_channel"].activation


def test_each_row_is_rounded_to_three_bits_of_mantissa_below_its_largest_number() -> None:
    # 448 keeps scale 1: steps are 32 from 256 on, 2 from 16 on, 2^-9 below 2^-6; ties go to the even mantissa
    x = torch.tensor([[448.0, 300.0, -17.0, 2**-9 * 1.4], [4.48, 3.0, -0.17, 0.0]])
    kept = quantise_dequantise(x, CHANNEL)
    assert kept[0].tolist() == [448.0, 288.0, -16.0, 2**-9]
    torch.testing.assert_close(kept[1], torch.tensor([4.48, 2.88, -0.16, 0.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ((1, 0), [[448.0, 0.0], [0.4375, 0.4375]]),
        ((0, 0), [[448.0, 0.0], [0.4375, 0.4375]]),
        ((1, 1), [[448.0, 0.0], [0.45, 0.43]]),
    ],
)
def test_a_scale_is_that_of_the_largest_number_of_its_block(
    block: tuple[int, int], expected: list[list[float]]
) -> None:
    x = torch.tensor([[448.0, 0.0], [0.45, 0.43]])
    if block == (1, 0):  # its own scale: 0.45 is exact, 0.43 = 428.09 / 448 x 0.45, the nearest step is 416
        expected = [[448.0, 0.0], [0.45, 416 / 448 * 0.45]]
    torch.testing.assert_close(quantise_dequantise(x, Scaling(block=block)), torch.tensor(expected), rtol=1e-6, atol=0)


def test_blocks_at_the_ends_may_be_cut_off() -> None:
    x = torch.randn(130, 200, generator=torch.Generator().manual_seed(0))
    kept = quantise_dequantise(x, FORMATS["fp8_per_block"].weight)
    assert kept.shape == x.shape
    for rows in (slice(0, 128), slice(128, 130)):
        for columns in (slice(0, 128), slice(128, 200)):
            part = quantise_dequantise(x[rows, columns].contiguous(), Scaling(block=(0, 0), reciprocal=True))
            assert torch.equal(kept[rows, columns], part)


def test_zeros_stay_zero() -> None:
    for form in FORMATS.values():
        for scaling in (form.weight, form.activation):
            assert not quantise_dequantise(torch.zeros(3, 5), scaling).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_half_a_step(dtype: torch.dtype) -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept = quantise_dequantise(x, CHANNEL)
    assert kept.dtype == dtype
    largest = x.float().abs().amax(dim=1, keepdim=True)
    half_a_step = torch.maximum(x.float().abs() / 16, largest / 448 * 2**-10)
    slack = 1 + 2**-7 if dtype == torch.bfloat16 else 1 + 1e-6
    rounding = x.float().abs() * 2**-8 if dtype == torch.bfloat16 else 0
    assert bool(((kept.float() - x.float()).abs() <= half_a_step * slack + rounding).all())


def test_the_gradient_passes_through_the_rounding() -> None:
    x = torch.tensor([[1.0, 0.3], [2.0, 5.0]], requires_grad=True)
    kept = straight_through(x, lambda values: quantise_dequantise(values, CHANNEL))
    assert not torch.equal(kept, x)
    (kept * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]


_BY_THE_ENGINE = """
import sys, torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.online.fp8 import _fp8_channel_scale, _fp8_quant_per_channel
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.utils.deep_gemm import per_block_cast_to_fp8
def kept(x):
    scale = _fp8_channel_scale(x.abs().amax(dim=-1, keepdim=True))
    found = {"channel": _fp8_quant_per_channel(x, scale).float() * scale}
    with set_current_vllm_config(VllmConfig()):
        for name, group in (("token", GroupShape.PER_TOKEN), ("token_group", GroupShape(1, 128))):
            small, scale = QuantFP8(static=False, group_shape=group).forward_native(x)
            found[name] = small.float() * scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)
    small, scale = per_block_cast_to_fp8(x)
    found["block"] = small.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return found
torch.save({dtype: kept(x) for dtype, x in torch.load(sys.argv[1]).items()}, sys.argv[1])
"""


def test_the_numbers_are_the_engines_own_to_the_last_bit(tmp_path: Path) -> None:
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(2)) * 0.1
    given = {dtype: x.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    torch.save(given, tmp_path / "x.pt")
    command = [sys.executable, "-c", _BY_THE_ENGINE, str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    engine = torch.load(tmp_path / "x.pt")
    block = FORMATS["fp8_per_block"]
    mine = {"channel": CHANNEL, "token": TOKEN, "token_group": block.activation, "block": block.weight}
    for dtype, values in given.items():
        for name, scaling in mine.items():
            assert torch.equal(quantise_dequantise(values.float(), scaling), engine[dtype][name]), (dtype, name)
