"""The words in which a model family says how its tensors are called and cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from megatron_rl.model_dims import ModelDims


class Head(Enum):
    """What sits on top of the transformer."""

    TOKEN = "token"
    """A language model's head: logits over the vocabulary."""
    VALUE = "value"
    """A critic's: one number per position."""


class Op(Enum):
    """How one Megatron tensor is made of Hugging Face tensors."""

    COPY = "copy"
    """It is the one tensor."""
    QKV = "qkv"
    """Queries, keys and values, interleaved by query group: [kv_heads, (queries per group + 2) * head_dim, ...]."""
    GATE_UP = "gate_up"
    """The gate's rows, then the up projection's."""


class Split(Enum):
    """How one Megatron tensor is cut over tensor-parallel ranks."""

    NONE = "none"
    """Every rank holds all of it."""
    ROWS = "rows"
    """Equal parts of dim 0."""
    COLUMNS = "columns"
    """Equal parts of dim 1."""
    GATE_UP = "gate_up"
    """Equal parts of the first half of dim 0, and of the second."""


class Layers(Enum):
    """Which layers have a tensor."""

    ALL = "all"
    DENSE = "dense"
    """Those with one feed-forward block."""
    SPARSE = "sparse"
    """Those with experts."""


class Ffn(Enum):
    """Whose feed-forward width a tensor has, where it has one."""

    DENSE = "dense"
    EXPERT = "expert"
    SHARED = "shared"


def always(dims: ModelDims) -> bool:
    """Every model of a family."""
    return True


@dataclass(frozen=True)
class WeightRule:
    """One tensor, one per layer, or one per expert of each layer.

    Attributes:
        megatron: its name in megatron-core's local specification; ``{layer}`` and ``{expert}`` stand for their numbers.
        hf: the Hugging Face tensors it is made of, in the order ``op`` expects.
        op: how it is made.
        split: how it is cut.
        layers: which layers have it.
        ffn: whose width its gate and up projections have.
        when: which models of the family have it.
    """

    megatron: str
    hf: tuple[str, ...]
    op: Op = Op.COPY
    split: Split = Split.NONE
    layers: Layers = Layers.ALL
    ffn: Ffn = Ffn.DENSE
    when: Callable[[ModelDims], bool] = always
