"""Which bytes go where when a model changes its form, computed from names, sizes and layouts alone.

A model lies on the ranks of a :class:`~megatron_rl.layout.ParallelLayout` or in the Hugging Face files. Between any two
of these a :class:`TransferPlan` lists rectangular regions to move, each byte once. Whoever holds weights executes it:
import (:func:`megatron_rl.mcore.export.load_hf`), export and the push to the engine (``full_tensors`` there).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.families import EMBEDDING
from megatron_rl.weights.reshard import Piece, cut_dim, hf_pieces, hf_shapes, resized, shard_pieces, shard_shape
from megatron_rl.weights.rules import Split
from megatron_rl.weights.shapes import is_float32
from megatron_rl.weights.weight_map import Stage, WeightEntry, WeightMap


@dataclass(frozen=True)
class HfFiles:
    """The Hugging Face files, as one end of a plan."""


End = ParallelLayout | HfFiles


@dataclass(frozen=True, kw_only=True)
class Region:
    """Some indices of one dim of a tensor, and all of its other dims.

    Attributes:
        rank: that holds the tensor; None: it is in the files.
        name: of the tensor, Megatron's with global numbers on a rank, Hugging Face's in the files.
        shape: of the tensor, on a rank that of its shard, padding included.
        dim: along which the region is cut out.
        start: first index.
        stop: behind the last one.
    """

    rank: int | None
    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int

    @property
    def index(self) -> tuple[slice, ...]:
        """What to index the tensor with."""
        return (*(slice(None),) * self.dim, slice(self.start, self.stop))

    @property
    def region_shape(self) -> tuple[int, ...]:
        """The shape of what :attr:`index` gives."""
        return resized(self.shape, self.dim, self.stop - self.start)

    @property
    def whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.region_shape == self.shape

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.region_shape)


@dataclass(frozen=True, kw_only=True)
class Move:
    """Elements that go from one place to another, in order.

    Attributes:
        source: where they lie.
        target: where they go; a region of the same shape.
        size_bytes: of them at the source.
    """

    source: Region
    target: Region
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class TensorMoves:
    """How one entry of the weight map gets to its target.

    Attributes:
        entry: which tensor it is.
        moves: in the order of the target's parts, and in each of them.
        padding: regions of the target that nothing is moved to: they are zero.
    """

    entry: WeightEntry
    moves: tuple[Move, ...]
    padding: tuple[Region, ...]


@dataclass(frozen=True)
class TransferPlan:
    """All moves of a model from one form to another, tensor by tensor from the embedding up.

    Attributes:
        tensors: of the weight map, in its order.
    """

    tensors: tuple[TensorMoves, ...]

    @property
    def moves(self) -> Iterator[Move]:
        """Those of all tensors."""
        return (move for tensor in self.tensors for move in tensor.moves)

    def bytes_by_pair(self) -> dict[tuple[int | None, int | None], int]:
        """By source and target rank; None stands for the files. From a rank to itself they stay where they are."""
        pairs: dict[tuple[int | None, int | None], int] = {}
        for move in self.moves:
            pair = move.source.rank, move.target.rank
            pairs[pair] = pairs.get(pair, 0) + move.size_bytes
        return pairs


def transfer_plan(weights: WeightMap, source: End, target: End, *, element_bytes: int = 2) -> TransferPlan:
    """Plan how a model gets from ``source`` to ``target``.

    Of copies only the first takes part: it sends for all of them, and it alone receives. :func:`shards_on` says whose
    shard a copy is.

    Args:
        weights: all tensors of the model, or some.
        source: where they are.
        target: where they are wanted.
        element_bytes: of an element at the source; what stays in float32 whatever the model's type takes 4.

    Raises:
        ValueError: a tensor cannot be laid out so.
    """
    return TransferPlan(
        tuple(_tensor_moves(entry, weights.dims, source, target, element_bytes) for entry in weights.entries)
    )


def _tensor_moves(entry: WeightEntry, dims: ModelDims, source: End, target: End, element_bytes: int) -> TensorMoves:
    element_bytes = 4 if is_float32(entry) else element_bytes
    sources = [(part, piece) for part in _parts(entry, dims, source) for piece in part.pieces]
    sources.sort(key=lambda found: found[1].whole)
    moves: list[Move] = []
    padding: list[Region] = []
    for part in _parts(entry, dims, target):
        for piece in part.pieces:
            for other, theirs in sources:
                start = max(piece.whole, theirs.whole)
                length = min(piece.whole + piece.length, theirs.whole + theirs.length) - start
                if length <= 0:
                    continue
                here = part.region(start - piece.whole + piece.part, length)
                there = other.region(start - theirs.whole + theirs.part, length)
                moves.append(Move(source=there, target=here, size_bytes=here.elements * element_bytes))
        covered = sum(piece.length for piece in part.pieces)
        if covered < part.shape[part.dim]:
            padding.append(part.region(covered, part.shape[part.dim] - covered))
    return TensorMoves(entry=entry, moves=tuple(moves), padding=tuple(padding))


@dataclass(frozen=True)
class _Part:
    """One tensor of an end that holds a part of an entry."""

    rank: int | None
    name: str
    shape: tuple[int, ...]
    dim: int
    pieces: tuple[Piece, ...]

    def region(self, start: int, length: int) -> Region:
        return Region(rank=self.rank, name=self.name, shape=self.shape, dim=self.dim, start=start, stop=start + length)


def _parts(entry: WeightEntry, dims: ModelDims, end: End) -> list[_Part]:
    dim = cut_dim(entry)
    if isinstance(end, HfFiles):
        parts = zip(entry.hf, hf_shapes(entry, dims), hf_pieces(entry, dims), strict=True)
        return [_Part(None, name, shape, dim, pieces) for name, shape, pieces in parts]
    ranks = holders(entry, end, dims)
    shape = shard_shape(entry, dims, len(ranks))
    return [
        _Part(rank, entry.megatron, shape, dim, shard_pieces(entry, dims, len(ranks), part))
        for part, rank in enumerate(ranks)
    ]


def stage_of(entry: WeightEntry, layout: ParallelLayout, layers: int) -> int:
    """The pipeline stage that holds ``entry``.

    Args:
        entry: the tensor.
        layout: of the model.
        layers: of the whole model.

    Raises:
        ValueError: the stages cannot share the layers, or the model has no such layer.
    """
    if entry.layer is not None:
        return layout.stage_of_layer(entry.layer, layers)
    return 0 if entry.stage is Stage.FIRST else layout.pipeline - 1


def holders(entry: WeightEntry, layout: ParallelLayout, dims: ModelDims) -> tuple[int, ...]:
    """The ranks whose shards make up ``entry``, in the order of the shards: of all copies, the first.

    One rank, the first of its stage, for a tensor that every tensor rank holds whole.

    Raises:
        ValueError: as :func:`stage_of`.
    """
    stage = stage_of(entry, layout, dims.layers)
    if entry.expert is not None:
        group = _expert_group(entry.expert, layout, dims)
        parts = 1 if entry.split is Split.NONE else layout.expert_tensor
        return tuple(layout.expert_rank_of(expert_tensor=part, expert=group, pipeline=stage) for part in range(parts))
    parts = 1 if entry.split is Split.NONE else layout.tensor
    return tuple(layout.rank_of(tensor=part, pipeline=stage) for part in range(parts))


@dataclass(frozen=True)
class Shard:
    """A shard as plans name it.

    Attributes:
        rank: its first holder.
        name: of the tensor it is a part of.
    """

    rank: int
    name: str


def shards_on(weights: WeightMap, layout: ParallelLayout, rank: int) -> dict[str, Shard]:
    """What one rank holds, by its own name for it: its shards, or whose it has copies of.

    The last stage of a tied model holds the embedding once more, as its output layer.

    Args:
        weights: all tensors of the model: one without an output layer is taken for tied.
        layout: of the model.
        rank: which one.

    Raises:
        ValueError: as :func:`stage_of`, or the rank is outside the layout.
    """
    at, expert_at = layout.coordinates(rank), layout.expert_coordinates(rank)
    found: dict[str, Shard] = {}
    for entry in weights.entries:
        if stage_of(entry, layout, weights.dims.layers) != at.pipeline:
            continue
        ranks = holders(entry, layout, weights.dims)
        if entry.expert is None:
            part = at.tensor
        elif _expert_group(entry.expert, layout, weights.dims) == expert_at.expert:
            part = expert_at.expert_tensor
        else:
            continue
        found[entry.megatron] = Shard(ranks[part] if len(ranks) > 1 else ranks[0], entry.megatron)
    if at.pipeline == layout.pipeline - 1 > 0 and not any(entry.megatron == _OUTPUT for entry in weights.entries):
        found[_OUTPUT] = Shard(layout.rank_of(tensor=at.tensor), EMBEDDING.megatron)
    return found


_OUTPUT = "output_layer.weight"


def _expert_group(expert: int, layout: ParallelLayout, dims: ModelDims) -> int:
    count = 0 if dims.experts is None else dims.experts.count
    if not 0 <= expert < count or count % layout.expert:
        raise ValueError(f"expert {expert} must be one of {count} that expert={layout.expert} divides")
    return expert // (count // layout.expert)
