"""vLLM's own linear layers, loaded in an engine's worker: with weights that they quantise, and with what we push."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_rl.weights.fp8_push import quantization_config

Named = list[tuple[str, Tensor]]
PREFIX = "model.layers.0."
HIDDEN, HEAD, FFN = 256, 128, 384
SHAPES = {
    "self_attn.q_proj": (2 * HEAD, HIDDEN),
    "self_attn.k_proj": (HEAD, HIDDEN),
    "self_attn.v_proj": (HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 2 * HEAD),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
"""Of the weights of a layer with two heads for queries and one for keys and values."""
_JOINED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def loaded_both_ways(worker: Any, name: str, plain: Named, pushed: Named) -> tuple[dict[str, Tensor], ...]:
    """What two sets of layers hold: after vLLM's online quantisation of ``plain``, and after loading ``pushed``.

    A CPU has no kernel that multiplies with two of the three formats, nor one for fixed scales: none is asked to
    multiply, and that one is written out here.
    """
    from vllm import _custom_ops
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w8a8_fp8
    from vllm.model_executor.layers.quantization.online import fp8

    methods = {
        "fp8_per_channel": fp8.Fp8PtpcOnlineLinearMethod,
        "fp8_per_tensor": fp8.Fp8PerTensorOnlineLinearMethod,
        "fp8_per_block": fp8.Fp8PerBlockOnlineLinearMethod,
    }
    serialized = CompressedTensorsConfig.from_config(quantization_config(name))
    serialized.packed_modules_mapping = {
        joined: [part for part, (whole, _) in _JOINED.items() if whole == joined]
        for joined in ("qkv_proj", "gate_up_proj")
    }
    with (
        set_current_vllm_config(worker.vllm_config),
        patch.object(fp8, "init_fp8_linear_kernel", _NoKernel),
        patch.object(compressed_tensors_w8a8_fp8, "init_fp8_linear_kernel", _NoKernel),
        patch.object(fp8, "expose_input_quant_key", _nothing),
        patch.object(compressed_tensors_w8a8_fp8, "expose_input_quant_key", _nothing),
        patch.object(_custom_ops, "scaled_fp8_quant", _scaled_fp8_quant),
    ):
        own = _layers(_Online(methods[name]))
        _load(own, plain)  # each layer quantises as soon as it is whole
        ours = _layers(serialized)
        _load(ours, pushed)
        for layer in ours.values():
            layer.quant_method.process_weights_after_loading(layer)
    return tuple(
        {
            f"{place}.{kind.removesuffix('_inv')}": parameter.detach().clone()
            for place, layer in layers.items()
            for kind, parameter in layer.named_parameters()
        }
        for layers in (own, ours)
    )


def _layers(quant_config: Any) -> dict[str, Any]:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    common = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": quant_config}
    qkv, gate_up, out, down = (
        f"{PREFIX}{place}" for place in ("self_attn.qkv_proj", "mlp.gate_up_proj", "self_attn.o_proj", "mlp.down_proj")
    )
    return {
        qkv: QKVParallelLinear(HIDDEN, HEAD, 2, 1, prefix=qkv, **common),
        gate_up: MergedColumnParallelLinear(HIDDEN, [FFN, FFN], prefix=gate_up, **common),
        out: RowParallelLinear(2 * HEAD, HIDDEN, prefix=out, **common),
        down: RowParallelLinear(FFN, HIDDEN, prefix=down, **common),
    }


def _load(layers: dict[str, Any], tensors: Named) -> None:
    for name, tensor in tensors:
        parent, part, kind = name.rsplit(".", 2)
        joined, *shard = _JOINED.get(part, (part,))
        parameter = dict(layers[f"{parent}.{joined}"].named_parameters())[kind]
        parameter.weight_loader(parameter, tensor, *shard)


class _Online:
    """A quant_config whose layers quantise what they load."""

    online_quantization_config = None

    def __init__(self, method: Any) -> None:
        self._method = method

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        return self._method()


class _NoKernel:
    def __init__(self, **_: Any) -> None:
        pass

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing to pack."""


def _nothing(*_: Any) -> None:
    pass


def _scaled_fp8_quant(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's kernel for fixed scales: ``csrc/quantization/w8a8/fp8/common.cu`` multiplies with the reciprocal."""
    return (weight.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn), scale
