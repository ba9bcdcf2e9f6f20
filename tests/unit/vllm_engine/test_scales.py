"""What the engine's linears say of their scales, and what vLLM is told so that these stay what they are."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.linear_formats import LinearFormat, first_difference
from megatron_rl.vllm_engine import engine
from megatron_rl.vllm_engine.engine import EngineSpec
from megatron_rl.vllm_engine.scales import environment, scaling
from megatron_rl.weights.fp8_blocks import ENGINE_SCALINGS, PER_BLOCK, Scaling, quantise

POWERS = Scaling(block=(128, 128), power_of_two=True)


def linear(scale: Tensor, name: str = "weight_scale_inv", block: list[int] | None = None) -> Any:
    return SimpleNamespace(**{name: scale}, weight_block_size=block, output_size_per_partition=384, prefix="up")


def scales_of(how: Scaling, rows: int = 384) -> Tensor:
    torch.manual_seed(0)
    return quantise(torch.randn(rows, 256, dtype=torch.bfloat16), how)[1]


def test_scales_of_blocks_that_are_all_powers_of_two_are_told_as_such_though_they_are_float32() -> None:
    plain, rounded = (scales_of(how) for how in (ENGINE_SCALINGS["fp8_per_block"], POWERS))
    assert plain.dtype == rounded.dtype == torch.float32
    assert scaling(linear(plain, block=[128, 128])) == {"block": (128, 128), "scale": "float32"}
    assert scaling(linear(rounded, block=[128, 128])) == {"block": (128, 128), "scale": "float8_e8m0fnu"}
    one_left = rounded.clone()
    one_left[2, 1] *= 1.25
    assert scaling(linear(one_left, block=[128, 128]))["scale"] == "float32"


def test_the_audit_tells_an_engine_that_rounded_its_scales_from_one_that_did_not() -> None:
    wanted, found = (
        LinearFormat(weight="up", dtype="float8_e4m3fn", **scaling(linear(scales_of(how), block=[128, 128])))
        for how in (PER_BLOCK, POWERS)
    )
    assert first_difference([wanted], [found]) == (
        "up must be float8_e4m3fn with a float32 scale per 128 x 128, "
        "found float8_e4m3fn with a float8_e8m0fnu scale per 128 x 128"
    )


def test_a_handful_of_scales_may_be_powers_of_two_by_chance() -> None:
    assert scaling(linear(scales_of(POWERS, rows=256), block=[128, 128]))["scale"] == "float32"


def test_packed_scales_are_told_as_they_are() -> None:
    packed = torch.zeros(384, 1, dtype=torch.int32)
    assert scaling(linear(packed, block=[128, 128])) == {"block": (128, 128), "scale": "int32"}


def test_scales_of_rows_and_tensors_are_never_rounded_and_not_looked_at() -> None:
    assert scaling(linear(torch.ones(384, 1), "weight_scale")) == {"block": (1, 0), "scale": "float32"}
    assert scaling(linear(torch.ones(1), "weight_scale")) == {"block": (0, 0), "scale": "float32"}
    assert scaling(SimpleNamespace()) == {}
    with pytest.raises(ValueError, match=r"scales of up must be one, one per output row or per block, got .*\[7\]"):
        scaling(linear(torch.ones(7), "weight_scale"))


HOPPER, BLACKWELL = (9, 0), (10, 0)


@pytest.mark.parametrize(
    ("quantization", "capability", "told"),
    [
        ("fp8_per_block", HOPPER, {"VLLM_USE_DEEP_GEMM_E8M0": "0"}),
        ("fp8_per_block", BLACKWELL, {"VLLM_USE_DEEP_GEMM_E8M0": "0", "VLLM_USE_DEEP_GEMM": "0"}),
        ("fp8_per_block", (12, 0), {"VLLM_USE_DEEP_GEMM_E8M0": "0", "VLLM_USE_DEEP_GEMM": "0"}),
        ("fp8_per_channel", HOPPER, {}),
        (None, BLACKWELL, {}),
    ],
)
def test_only_engines_with_blocks_are_told_what_their_gpu_needs(
    quantization: str | None, capability: tuple[int, int], told: dict[str, str]
) -> None:
    assert environment(quantization, capability) == told


def test_an_engine_on_a_gpu_has_it_in_its_environment_whatever_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_USE_DEEP_GEMM_E8M0": "1"})
    monkeypatch.setattr(engine, "compute_capability", lambda: HOPPER)
    engine._prepare_process(
        EngineSpec(
            model=tmp_path,
            dtype="bfloat16",
            max_model_len=8,
            kv_cache_mib=1,
            max_concurrent=1,
            on_cpu=False,
            quantization="fp8_per_block",
        )
    )
    assert os.environ["VLLM_USE_DEEP_GEMM_E8M0"] == "0"
