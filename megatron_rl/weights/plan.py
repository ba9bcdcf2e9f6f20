"""Which ranks hold a tensor, computed from names and layouts alone."""

from __future__ import annotations

from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.rules import Split
from megatron_rl.weights.weight_map import Stage, WeightEntry


def stage_of(entry: WeightEntry, layout: ParallelLayout, layers: int) -> int:
    """The pipeline stage that holds ``entry``: layers are cut into equal pieces, dealt out to the stages in turn.

    Args:
        entry: the tensor.
        layout: of the model.
        layers: of the whole model.

    Raises:
        ValueError: the pieces do not divide the layers, or the model has no such layer.
    """
    if layers % layout.chunks:
        raise ValueError(
            f"pipeline={layout.pipeline} x virtual_pipeline={layout.virtual_pipeline} must divide the model's {layers} "
            "layers"
        )
    if entry.stage is Stage.FIRST:
        return 0
    if entry.layer is None:
        return layout.pipeline - 1
    if not 0 <= entry.layer < layers:
        raise ValueError(f"{entry.megatron}: the layer must be in [0, {layers})")
    return entry.layer // (layers // layout.chunks) % layout.pipeline


def holders(entry: WeightEntry, layout: ParallelLayout, dims: ModelDims) -> tuple[int, ...]:
    """The ranks whose shards make up ``entry``, in the order that ``merge`` expects: of all copies, the first.

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


def part_of(entry: WeightEntry, layout: ParallelLayout, rank: int) -> tuple[int, int]:
    """Into how many parts ``entry`` is cut, and which of them ``rank`` holds where it holds any."""
    if entry.expert is None:
        return layout.tensor, layout.coordinates(rank).tensor
    return layout.expert_tensor, layout.expert_coordinates(rank).expert_tensor


def _expert_group(expert: int, layout: ParallelLayout, dims: ModelDims) -> int:
    count = 0 if dims.experts is None else dims.experts.count
    if not 0 <= expert < count or count % layout.expert:
        raise ValueError(f"expert {expert} must be one of {count} that expert={layout.expert} divides")
    return expert // (count // layout.expert)
