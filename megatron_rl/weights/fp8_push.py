"""A push in FP8: the trainer quantises the weights of linears, and the engine takes them up as they are.

What travels is what an engine with ``engine.quantization`` keeps: bfloat16, and for each linear its weight in e4m3 with
float32 scales beside it, under the names and in the shapes of compressed-tensors, which vLLM loads
(``compressed_tensors/schemes/compressed_tensors_w8a8_fp8.py``). The bits are those that the engine makes of the same
weights by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_rl.weights.formats import is_linear
from megatron_rl.weights.fp8_blocks import BLOCK, ENGINE_SCALINGS, PER_TENSOR, Scaling, divided, largest, scales
from megatron_rl.weights.weight_map import WeightMap

SCALE_SUFFIX = "_scale"
"""``x.weight`` has its scales in ``x.weight_scale``."""
_STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp8_per_channel": ({"strategy": "channel"}, {"strategy": "token"}),
    "fp8_per_tensor": ({"strategy": "tensor"}, {"strategy": "token"}),
    "fp8_per_block": (
        {"strategy": "block", "block_structure": [BLOCK, BLOCK]},
        {"strategy": "group", "group_size": BLOCK},
    ),
}


def quantised(tensors: Iterable[tuple[str, Tensor]], weights: WeightMap, name: str) -> Iterator[tuple[str, Tensor]]:
    """What is sent in place of ``tensors``.

    Weights that the engine joins to one (queries, keys and values; gate and up) share a scale where there is one for
    all of it, as they do when the engine quantises the joined weight.

    Args:
        tensors: Hugging Face names and whole tensors.
        weights: of the model.
        name: of the format, a key of :data:`~megatron_rl.weights.fp8_blocks.ENGINE_SCALINGS`.

    Yields:
        everything in bfloat16; of a linear the weight [rows, columns] in e4m3, and its scales in f32: [rows, 1] per
        channel, [1] per tensor, [blocks down, blocks across] per block.

    Raises:
        ValueError: a weight that is joined with others came without them.
    """
    joined = {part: entry.hf for entry in weights.entries if is_linear(entry) for part in entry.hf}
    waiting: dict[str, Tensor] = {}
    for part, tensor in tensors:
        kept = tensor.detach().to(torch.bfloat16)
        if part not in joined:
            yield part, kept
            continue
        waiting[part] = kept
        if all(other in waiting for other in joined[part]):
            yield from _in_fp8({other: waiting.pop(other) for other in joined[part]}, ENGINE_SCALINGS[name])
    if waiting:
        first = min(waiting)
        raise ValueError(f"{first} must be sent with all of {', '.join(joined[first])}, which the engine joins to one")


def _in_fp8(parts: Mapping[str, Tensor], scaling: Scaling) -> Iterator[tuple[str, Tensor]]:
    found = {name: largest(part, scaling) for name, part in parts.items()}
    whole = scaling.block == PER_TENSOR.block
    if whole:
        found = dict.fromkeys(parts, torch.stack([*found.values()]).amax(dim=0))
    for name, part in parts.items():
        scale = scales(found[name], scaling)
        yield name, divided(part, scale, scaling)
        yield name + SCALE_SUFFIX, scale.flatten() if whole else scale


def quantization_config(name: str) -> dict[str, Any]:
    """What ``config.json`` says of a model in format ``name``; inputs are quantised as they come (``dynamic``)."""
    weights, inputs = _STRATEGIES[name]
    each = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": each | weights | {"dynamic": False},
        "input_activations": each | inputs | {"dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"linears": group},
        "ignore": ["lm_head"],
    }
