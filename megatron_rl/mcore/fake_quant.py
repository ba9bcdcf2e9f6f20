"""Linear layers that compute with what FP8 keeps of their weights and inputs, in the model's own type, on any device.

Each number is rounded to FP8 and back, with the scales that vLLM's online quantisation takes (``quantise_dequantise``);
the product is then that of an FP8 kernel up to rounding. The gradient passes through the rounding unchanged
(straight-through: Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons",
2013, section 4), and updates the weights as they are: those are what is saved, exported and pushed.

Embedding, norms, output projection and value head stay as they are, as they do in the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_rl.model_dims import ModelDims

FP8 = torch.float8_e4m3fn
_LARGEST = torch.tensor(torch.finfo(FP8).max)
_SMALLEST_SCALE = 1.0 / (_LARGEST.item() * 512)
_SMALLEST_BLOCK = 1e-4
_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Which numbers share a scale, and how the engine divides by it.

    Attributes:
        block: rows x columns of one scale; 0: all of them.
        smallest: lower bound of a scale, so that zeros have one.
        reciprocal: numbers are multiplied by 1 / scale, which rounds a few of them to the other neighbour.
    """

    block: tuple[int, int]
    smallest: float = _SMALLEST_SCALE
    reciprocal: bool = False


@dataclass(frozen=True, kw_only=True)
class FakeFormat:
    """How a linear layer's two factors are quantised."""

    weight: Scaling
    activation: Scaling


_PER_TOKEN = Scaling(block=(1, 0), reciprocal=True)
FORMATS = {
    "fp8_per_channel": FakeFormat(weight=Scaling(block=(1, 0)), activation=_PER_TOKEN),
    "fp8_per_tensor": FakeFormat(weight=Scaling(block=(0, 0), reciprocal=True), activation=_PER_TOKEN),
    "fp8_per_block": FakeFormat(
        weight=Scaling(block=(_BLOCK, _BLOCK), smallest=_SMALLEST_BLOCK / _LARGEST.item(), reciprocal=True),
        activation=Scaling(block=(1, _BLOCK)),
    ),
}
"""By the name of vLLM's online quantisation. Its scales: ``vllm/model_executor/layers/quantization/online/fp8.py``
(weights), ``input_quant_fp8.py`` (inputs), ``vllm/utils/deep_gemm.py`` (blocks).
"""


def quantise_dequantise(x: Tensor, scaling: Scaling, group: dist.ProcessGroup | None = None) -> Tensor:
    """What E4M3 keeps of ``x``: each block times 448 / its largest number, rounded, and scaled back.

    Args:
        x: [rows, columns]; the blocks at its ends may be cut off.
        scaling: of the blocks.
        group: of the ranks that hold the other parts of each block.

    Returns:
        [rows, columns] of the type of ``x``.
    """
    rows, columns = x.shape
    high, wide = (size or whole for size, whole in zip(scaling.block, x.shape, strict=True))
    blocks = F.pad(x.float(), (0, -columns % wide, 0, -rows % high)).unflatten(1, (-1, wide)).unflatten(0, (-1, high))
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    # a tensor as divisor: by a Python number torch may multiply with its reciprocal
    scale = (largest / _LARGEST.to(x.device)).clamp_min(scaling.smallest)
    small = blocks * scale.reciprocal() if scaling.reciprocal else blocks / scale
    kept: Tensor = small.clamp(-_LARGEST.item(), _LARGEST.item()).to(FP8).float() * scale
    return kept.flatten(2, 3).flatten(0, 1)[:rows, :columns].to(x.dtype)


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
