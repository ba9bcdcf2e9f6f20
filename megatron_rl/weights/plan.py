"""Which ranks hold a tensor, computed from names and layouts alone."""

from __future__ import annotations

from megatron_rl.layout import ParallelLayout
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


def holders(entry: WeightEntry, layout: ParallelLayout, layers: int) -> tuple[int, ...]:
    """The ranks of data replica 0 whose shards make up ``entry``, in the order that ``merge`` expects.

    One rank, the first of its stage, for a tensor that every tensor rank holds whole.

    Raises:
        ValueError: as :func:`stage_of`.
    """
    stage = stage_of(entry, layout, layers)
    ranks = 1 if entry.split is Split.NONE else layout.tensor
    return tuple(layout.rank_of(tensor=rank, pipeline=stage) for rank in range(ranks))
