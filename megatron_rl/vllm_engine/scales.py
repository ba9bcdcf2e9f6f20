"""What the scales of the engine's linears are, and how vLLM is told to leave them as they are. Loads no vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SCALES = ("weight_scale", "weight_scale_inv")
_BLACKWELL = (10, 0)
_BY_CHANCE = 4
"""So many scales may be powers of two by chance: of a bfloat16 weight each is one in 128 times."""


def environment(quantization: str | None, capability: tuple[int, int]) -> dict[str, str]:
    """What vLLM must read for scales of blocks to stay the float32 numbers that the trainer divides by.

    DeepGEMM (Hopper, Blackwell) quantises weights anew, with scales rounded up to powers of two, unless told otherwise
    (``vllm/model_executor/kernels/linear/scaled_mm/deep_gemm.py``). On Blackwell it takes no other scales (DeepGEMM,
    ``csrc/apis/gemm.hpp``), so vLLM must do without it there, and takes CUTLASS.

    Args:
        quantization: see :class:`megatron_rl.vllm_engine.engine.EngineSpec`.
        capability: of the engine's GPU, such as (9, 0).
    """
    if quantization != "fp8_per_block":
        return {}
    return {"VLLM_USE_DEEP_GEMM_E8M0": "0"} | ({"VLLM_USE_DEEP_GEMM": "0"} if capability >= _BLACKWELL else {})


@torch.no_grad()
def scaling(module: Any) -> dict[str, Any]:
    """``block`` and ``scale`` of :class:`~megatron_rl.linear_formats.LinearFormat` for one of vLLM's linears; empty
    where it has no scale.

    Raises:
        ValueError: the scales are neither one, nor one per output row or block.
    """
    scale = next((getattr(module, name) for name in _SCALES if getattr(module, name, None) is not None), None)
    if scale is None:
        return {}
    if block := getattr(module, "weight_block_size", None):
        return {"block": tuple(block), "scale": "float8_e8m0fnu" if _powers_of_two(scale) else _dtype(scale)}
    if scale.numel() == 1:
        sizes = 0, 0
    elif scale.numel() == module.output_size_per_partition:
        sizes = 1, 0
    else:
        raise ValueError(f"scales of {module.prefix} must be one, one per output row or per block, got {scale.shape}")
    return {"block": sizes, "scale": _dtype(scale)}


def _powers_of_two(scale: Tensor) -> bool:
    """Whether scales that are float32 are powers of two all the same, as after vLLM rounded them."""
    if not scale.is_floating_point() or scale.numel() <= _BY_CHANCE:
        return False
    mantissa, _ = torch.frexp(scale.float())
    return bool((mantissa == 0.5).all())


def _dtype(scale: Tensor) -> str:
    return str(scale.dtype).removeprefix("torch.")
