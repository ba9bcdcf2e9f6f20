"""Every tensor of a model under both its names, from the family's table and the model's sizes. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_rl.model_dims import ModelDims, UnknownArchitecture
from megatron_rl.weights.families import EMBEDDING, FAMILIES, HEADS
from megatron_rl.weights.rules import Ffn, Head, Layers, Op, Split, WeightRule


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


def weight_entries(dims: ModelDims, head: Head, family: Sequence[WeightRule] | None = None) -> tuple[WeightEntry, ...]:
    """The tensors of the model that ``dims`` describes, under ``head``, each once, from the embedding up.

    A critic has an output layer of its own and so never shares its embedding.

    Args:
        dims: sizes of the model.
        head: on top of it.
        family: the table below the head; None: that of the model's architecture.

    Raises:
        UnknownArchitecture: there is no table for the model's family.
    """
    if family is None:
        if dims.architecture not in FAMILIES:
            raise UnknownArchitecture(f"no weight map for {dims.architecture}; known: {', '.join(sorted(FAMILIES))}")
        family = FAMILIES[dims.architecture]
    rules = [rule for rule in family if rule.when(dims)]
    if head is Head.VALUE or not dims.tied_embeddings:
        rules += HEADS[head]
    layered = [rule for rule in rules if "{layer}" in rule.megatron]
    single = [rule for rule in rules if "{layer}" not in rule.megatron and rule != EMBEDDING]
    sparse = () if dims.experts is None else dims.experts.layers
    return (
        _entry(EMBEDDING, Stage.FIRST),
        *(
            _entry(rule, Stage.LAYER, layer, expert)
            for layer in range(dims.layers)
            for rule in layered
            if rule.layers is Layers.ALL or (rule.layers is Layers.SPARSE) == (layer in sparse)
            for expert in _experts(dims, rule)
        ),
        *(_entry(rule, Stage.LAST) for rule in single),
    )


def _experts(dims: ModelDims, rule: WeightRule) -> Iterable[int | None]:
    if "{expert}" not in rule.megatron or dims.experts is None:
        return (None,)
    return range(dims.experts.count)


def _entry(rule: WeightRule, stage: Stage, layer: int | None = None, expert: int | None = None) -> WeightEntry:
    hf = tuple(name.format(layer=layer, expert=expert) for name in rule.hf)
    name = rule.megatron.format(layer=layer, expert=expert)
    return WeightEntry(name, hf, rule.op, rule.split, layer, stage, expert, rule.ffn)
