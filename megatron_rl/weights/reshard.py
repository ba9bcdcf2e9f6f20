"""Where the parts of a whole Megatron tensor lie: the shards of tensor-parallel ranks, and Hugging Face tensors.

A tensor is cut along one dim. A part is a list of pieces, each a run of indices that the part and the whole tensor have
in common. Queries, keys and values interleaved by query group, or a gate above an up projection, are nothing but
several pieces; rows of a shard that no piece covers are padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.layout import padded_vocabulary
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.entries import WeightEntry
from megatron_rl.weights.rules import Op, Split
from megatron_rl.weights.shapes import full_shape, is_vocabulary


@dataclass(frozen=True)
class Piece:
    """Indices that a part and the whole tensor have in common, along the dim that is cut.

    Attributes:
        part: where it starts in the part.
        whole: where it starts in the whole tensor.
        length: how many.
    """

    part: int
    whole: int
    length: int


def cut_dim(entry: WeightEntry) -> int:
    """The dim along which the tensor is cut, for ranks and for Hugging Face."""
    return 1 if entry.split is Split.COLUMNS else 0


def resized(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    """``shape`` with another size of ``dim``."""
    return (*shape[:dim], size, *shape[dim + 1 :])


def shard_shape(entry: WeightEntry, dims: ModelDims, size: int) -> tuple[int, ...]:
    """The shape of one rank's shard, padding included; the same on each of ``size`` ranks.

    Raises:
        ValueError: the tensor cannot be cut into ``size`` equal parts.
    """
    shape, dim = full_shape(entry, dims), cut_dim(entry)
    if entry.split is Split.NONE:
        return shape
    if entry.op is Op.QKV and dims.kv_heads % size and size % dims.kv_heads:
        raise ValueError(
            f"{entry.megatron}: the number of tensor ranks must divide its {dims.kv_heads} key/value heads or be a "
            f"multiple of them, got {size}"
        )
    if is_vocabulary(entry):
        return resized(shape, dim, padded_vocabulary(shape[dim], size) // size)
    halves = 2 if entry.split is Split.GATE_UP else 1
    if shape[dim] % (halves * size):
        what = ("rows", "columns")[dim] + (" of each half" if halves == 2 else "")
        raise ValueError(f"{entry.megatron}: {size} tensor ranks must divide its {shape[dim] // halves} {what}")
    return resized(shape, dim, shape[dim] // size)


def shard_pieces(entry: WeightEntry, dims: ModelDims, size: int, rank: int) -> tuple[Piece, ...]:
    """What one tensor-parallel (or expert-tensor-parallel) rank holds; nothing where it holds padding alone.

    Args:
        entry: which tensor it is.
        dims: sizes of the model.
        size: number of tensor-parallel ranks.
        rank: 0-based.

    Raises:
        ValueError: the tensor cannot be cut into ``size`` equal parts, or there is no such rank.
    """
    if not 0 <= rank < size:
        raise ValueError(f"{entry.megatron}: the tensor rank must be in [0, {size}), got {rank}")
    dim = cut_dim(entry)
    whole, here = full_shape(entry, dims)[dim], shard_shape(entry, dims, size)[dim]
    if entry.split is Split.NONE or size == 1:
        return (Piece(0, 0, whole),)
    if entry.split is Split.GATE_UP:
        half = here // 2
        return Piece(0, rank * half, half), Piece(half, whole // 2 + rank * half, half)
    start = rank * here
    return (Piece(0, start, min(here, whole - start)),) if start < whole else ()


def hf_pieces(entry: WeightEntry, dims: ModelDims) -> tuple[tuple[Piece, ...], ...]:
    """What each of the tensors ``entry.hf`` holds."""
    whole = full_shape(entry, dims)[cut_dim(entry)]
    if entry.op is Op.COPY:
        return ((Piece(0, 0, whole),),)
    if entry.op is Op.GATE_UP:
        half = whole // 2
        return (Piece(0, 0, half),), (Piece(0, half, half),)
    queries, keys, values = dims.group_rows
    group = queries + keys + values
    rows = ((0, queries), (queries, keys), (queries + keys, values))
    return tuple(
        tuple(Piece(index * length, index * group + start, length) for index in range(dims.kv_heads))
        for start, length in rows
    )


def hf_shapes(entry: WeightEntry, dims: ModelDims) -> tuple[tuple[int, ...], ...]:
    """The shape of each of the tensors ``entry.hf``."""
    whole, dim = full_shape(entry, dims), cut_dim(entry)
    return tuple(resized(whole, dim, sum(piece.length for piece in pieces)) for pieces in hf_pieces(entry, dims))
