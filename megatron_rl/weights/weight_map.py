"""Every tensor of a model under both its names, and the change of form between them, in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from megatron_rl.model_dims import ModelDims, UnknownArchitecture
from megatron_rl.weights.families import EMBEDDING, FAMILIES, HEADS
from megatron_rl.weights.rules import Ffn, Head, Layers, Op, Split, WeightRule

__all__ = ["Head", "Op", "Split", "Stage", "WeightEntry", "WeightMap", "WeightRule", "weight_map"]


class Stage(Enum):
    """Which pipeline stage holds a tensor."""

    FIRST = "first"
    LAYER = "layer"
    """The one that holds the tensor's layer."""
    LAST = "last"


@dataclass(frozen=True)
class WeightEntry:
    """A rule for one layer of the whole model, or for a tensor outside the layers.

    Attributes:
        megatron: name with the global number of the layer.
        hf: names of the Hugging Face tensors.
        op: how they make the Megatron tensor.
        split: how that is cut over tensor-parallel ranks.
        layer: global, from 0; None outside the layers.
        stage: which pipeline stage holds it.
        expert: global, from 0; None where all ranks of a stage have a part or a copy.
        ffn: whose width its gate and up projections have.
    """

    megatron: str
    hf: tuple[str, ...]
    op: Op
    split: Split
    layer: int | None
    stage: Stage
    expert: int | None = None
    ffn: Ffn = Ffn.DENSE

    def ffn_hidden(self, dims: ModelDims) -> int:
        """Width of the feed-forward block that the tensor belongs to."""
        if self.ffn is Ffn.DENSE or dims.experts is None:
            return dims.ffn_hidden
        return dims.experts.ffn_hidden if self.ffn is Ffn.EXPERT else dims.experts.shared_ffn_hidden


@dataclass(frozen=True)
class WeightMap:
    """The tensors of one model, each once, ordered from the embedding up.

    Attributes:
        dims: sizes of the model.
        entries: one per Megatron tensor.
    """

    dims: ModelDims
    entries: tuple[WeightEntry, ...]

    def to_megatron(self, entry: WeightEntry, hf_tensors: Sequence[Tensor]) -> Tensor:
        """Make the full Megatron tensor.

        Args:
            entry: one of this map's.
            hf_tensors: as ``entry.hf`` names them.

        Raises:
            ValueError: their number or shapes do not fit the model's sizes.
        """
        if len(hf_tensors) != len(entry.hf):
            raise ValueError(f"{entry.megatron} is made of {', '.join(entry.hf)}, got {len(hf_tensors)} tensors")
        if entry.op is Op.COPY:
            return hf_tensors[0]
        if entry.op is Op.GATE_UP:
            for name, tensor in zip(entry.hf, hf_tensors, strict=True):
                self._check_rows(name, tensor, entry.ffn_hidden(self.dims))
            return torch.cat(tuple(hf_tensors))
        groups, blocks = self.dims.kv_heads, []
        for name, tensor, rows in zip(entry.hf, hf_tensors, self.dims.group_rows, strict=True):
            self._check_rows(name, tensor, groups * rows)
            blocks.append(tensor.reshape(groups, rows, *tensor.shape[1:]))
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def to_hf(self, entry: WeightEntry, full: Tensor) -> list[tuple[str, Tensor]]:
        """Take the full Megatron tensor apart: the inverse of :meth:`to_megatron`, under Hugging Face names.

        Raises:
            ValueError: its shape does not fit the model's sizes.
        """
        if entry.op is Op.COPY:
            parts: Sequence[Tensor] = (full,)
        elif entry.op is Op.GATE_UP:
            width = entry.ffn_hidden(self.dims)
            self._check_rows(entry.megatron, full, 2 * width)
            parts = full.split(width)
        else:
            rows = self.dims.group_rows
            self._check_rows(entry.megatron, full, self.dims.kv_heads * sum(rows))
            grouped = full.reshape(self.dims.kv_heads, sum(rows), *full.shape[1:])
            parts = [part.flatten(0, 1) for part in grouped.split(rows, dim=1)]
        return list(zip(entry.hf, parts, strict=True))

    def _check_rows(self, name: str, tensor: Tensor, rows: int) -> None:
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            raise ValueError(
                f"{name} must have {rows} rows in this {self.dims.architecture}, got shape {tuple(tensor.shape)}; "
                "check that config.json belongs to the weights"
            )


def weight_map(dims: ModelDims, head: Head) -> WeightMap:
    """The tensors of the model that ``dims`` describes, under ``head``.

    A critic has an output layer of its own and so never shares its embedding.

    Raises:
        UnknownArchitecture: there is no table for the model's family.
    """
    if dims.architecture not in FAMILIES:
        raise UnknownArchitecture(f"no weight map for {dims.architecture}; known: {', '.join(sorted(FAMILIES))}")
    rules = [rule for rule in FAMILIES[dims.architecture] if rule.when(dims)]
    if head is Head.VALUE or not dims.tied_embeddings:
        rules += HEADS[head]
    layered = [rule for rule in rules if "{layer}" in rule.megatron]
    single = [rule for rule in rules if "{layer}" not in rule.megatron and rule is not EMBEDDING]
    sparse = () if dims.experts is None else dims.experts.layers
    return WeightMap(
        dims,
        (
            _entry(EMBEDDING, Stage.FIRST),
            *(
                _entry(rule, Stage.LAYER, layer, expert)
                for layer in range(dims.layers)
                for rule in layered
                if rule.layers is Layers.ALL or (rule.layers is Layers.SPARSE) == (layer in sparse)
                for expert in _experts(dims, rule)
            ),
            *(_entry(rule, Stage.LAST) for rule in single),
        ),
    )


def _experts(dims: ModelDims, rule: WeightRule) -> Iterable[int | None]:
    if "{expert}" not in rule.megatron or dims.experts is None:
        return (None,)
    return range(dims.experts.count)


def _entry(rule: WeightRule, stage: Stage, layer: int | None = None, expert: int | None = None) -> WeightEntry:
    hf = tuple(name.format(layer=layer, expert=expert) for name in rule.hf)
    name = rule.megatron.format(layer=layer, expert=expert)
    return WeightEntry(name, hf, rule.op, rule.split, layer, stage, expert, rule.ffn)
