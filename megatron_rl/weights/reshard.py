"""Cut a full Megatron tensor into the shards of tensor-parallel ranks, and put them together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.rules import Op, Split
from megatron_rl.weights.weight_map import WeightEntry


def split(full: Tensor, entry: WeightEntry, dims: ModelDims, size: int, rank: int) -> Tensor:
    """The shard of one tensor-parallel (or expert-tensor-parallel) rank; a view of ``full`` where one is enough.

    Args:
        full: the whole tensor in Megatron's form.
        entry: which one it is.
        dims: sizes of the model.
        size: number of tensor-parallel ranks.
        rank: 0-based.

    Raises:
        ValueError: the tensor cannot be cut into ``size`` equal parts, or there is no such rank.
    """
    if not 0 <= rank < size:
        raise ValueError(f"{entry.megatron}: the tensor rank must be in [0, {size}), got {rank}")
    if entry.split is Split.NONE:
        return full
    if entry.op is Op.QKV:
        _check_divides(entry, size, dims.kv_heads, "key/value heads")  # a query group stays whole
    if entry.split is Split.GATE_UP:
        gate, up = full.chunk(2)
        _check_divides(entry, size, gate.shape[0], "rows of each half")
        return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank]))
    dim = 1 if entry.split is Split.COLUMNS else 0
    _check_divides(entry, size, full.shape[dim], "columns" if dim else "rows")
    return full.chunk(size, dim=dim)[rank]


def merge(shards: Sequence[Tensor], entry: WeightEntry, dims: ModelDims) -> Tensor:
    """The whole tensor: ``merge([split(x, ..., rank) for rank in range(size)]) == x``.

    Args:
        shards: in the order of their ranks; one for a tensor that is not cut.
        entry: which tensor it is.
        dims: sizes of the model.

    Raises:
        ValueError: there are none, several of a tensor that is not cut, or shards of different shapes.
    """
    shapes = {tuple(shard.shape) for shard in shards}
    if len(shapes) != 1 or (entry.split is Split.NONE and len(shards) != 1):
        wanted = "one tensor" if entry.split is Split.NONE else "shards of one shape"
        raise ValueError(
            f"{entry.megatron} of {dims.architecture} must come as {wanted}, got {len(shards)} of {sorted(shapes)}"
        )
    if len(shards) == 1:
        return shards[0]
    if entry.split is Split.GATE_UP:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(tuple(shards), dim=1 if entry.split is Split.COLUMNS else 0)


def _check_divides(entry: WeightEntry, size: int, whole: int, what: str) -> None:
    if whole % size:
        raise ValueError(f"{entry.megatron}: {size} tensor ranks must divide its {whole} {what}")
