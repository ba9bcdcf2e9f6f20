"""Linear layers that compute with what FP8 keeps of their weights and inputs, in the model's own type, on any device.

Each number is rounded to FP8 and back, with the scales that vLLM's online quantisation takes (``quantise_dequantise``);
the product is then that of an FP8 kernel up to rounding. The gradient passes through the rounding unchanged
(straight-through: Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons",
2013, section 4), and updates the weights as they are: those are what is saved, exported and pushed.

Embedding, norms, output projection and value head stay as they are, as they do in the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.fp8_blocks import (
    BLOCK,
    ENGINE_SCALINGS,
    PER_CHANNEL,
    Scaling,
    dequantise,
    divided,
    largest,
    scales,
)


@dataclass(frozen=True, kw_only=True)
class FakeFormat:
    """How a linear layer's two factors are quantised."""

    weight: Scaling
    activation: Scaling


_PER_TOKEN = replace(PER_CHANNEL, reciprocal=True)
_ACTIVATIONS = {
    "fp8_per_channel": _PER_TOKEN,
    "fp8_per_tensor": _PER_TOKEN,
    "fp8_per_block": replace(PER_CHANNEL, block=(1, BLOCK)),
}
FORMATS = {name: FakeFormat(weight=scaling, activation=_ACTIVATIONS[name]) for name, scaling in ENGINE_SCALINGS.items()}
"""By the name of vLLM's online quantisation. The scales of inputs: ``input_quant_fp8.py`` there."""


def quantise_dequantise(x: Tensor, scaling: Scaling, group: dist.ProcessGroup | None = None) -> Tensor:
    """What E4M3 keeps of ``x``: each block times 448 / its largest number, rounded, and scaled back.

    Args:
        x: [rows, columns]; the blocks at its ends may be cut off.
        scaling: of the blocks.
        group: of the ranks that hold the other parts of each block.

    Returns:
        [rows, columns] of the type of ``x``.
    """
    found = largest(x, scaling)
    if group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, group)
    scale = scales(found, scaling)
    return dequantise(divided(x, scale, scaling), scale, x.dtype, scaling)


class _StraightThrough(torch.autograd.Function):
    """Rounds, and lets the gradient pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return rounded(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """``rounded(x)`` with the gradient of ``x``."""
    return cast(Tensor, _StraightThrough.apply(x, rounded))  # type: ignore[no-untyped-call]


def quantise_linears(model: Any, name: str, dims: ModelDims) -> None:
    """Make the linear layers of a GPTModel's layers compute as in FP8.

    Args:
        model: whose ``decoder`` has megatron-core's own linear layers.
        name: a key of :data:`FORMATS`.
        dims: of the model.
    """
    for path, linear in model.decoder.named_modules():
        if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
            order = _query_key_value_rows(dims) if path.endswith("linear_qkv") and name == "fp8_per_block" else None
            # a layer multiplies through this method alone, whatever it gathers before and reduces after
            linear._forward_impl = _FakeQuantised(linear._forward_impl, FORMATS[name], linear, order)


class _FakeQuantised:
    """The multiplication of one linear layer."""

    def __init__(self, multiply: Callable[..., Tensor], form: FakeFormat, linear: Any, order: Tensor | None) -> None:
        self._multiply, self._form, self._order = multiply, form, order
        group = parallel_state.get_tensor_model_parallel_group()
        shared = group if group.size() > 1 else None
        by_columns = isinstance(linear, RowParallelLinear)
        self._weight_group = shared if form.weight.block[1 if by_columns else 0] == 0 else None
        self._activation_group = shared if by_columns and form.activation.block[1] == 0 else None

    def __call__(self, *, input: Tensor, weight: Tensor, **others: Any) -> Tensor:  # noqa: A002 - megatron-core's name
        return self._multiply(
            input=straight_through(input, self._round_activation),
            weight=straight_through(weight, self._round_weight),
            **others,
        )

    def _round_activation(self, x: Tensor) -> Tensor:
        return quantise_dequantise(x.flatten(0, -2), self._form.activation, self._activation_group).view_as(x)

    def _round_weight(self, weight: Tensor) -> Tensor:
        if self._order is None or len(self._order) != len(weight):
            return quantise_dequantise(weight, self._form.weight, self._weight_group)
        rounded = torch.empty_like(weight)
        rounded[self._order] = quantise_dequantise(weight[self._order], self._form.weight, self._weight_group)
        return rounded


def _query_key_value_rows(dims: ModelDims) -> Tensor:
    """Rows of Megatron's fused weight, which is ordered by query group, in the order of queries, keys, values.

    Where the weight is split over ranks its blocks must lie within heads, and then the order does not matter.
    """
    grouped = torch.arange((dims.heads + 2 * dims.kv_heads) * dims.head_dim).view(dims.kv_heads, -1, dims.head_dim)
    return torch.cat([grouped[:, :-2].flatten(), grouped[:, -2].flatten(), grouped[:, -1].flatten()])
