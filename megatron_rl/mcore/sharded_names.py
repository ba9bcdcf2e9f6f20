"""Under which names, and where in them, megatron-core's distributed checkpoints keep the tensors of a model.

Rules instead of a model: whoever converts files needs neither megatron-core nor memory for weights. A test compares the
rules with what ``sharded_state_dict`` of the real models says.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.rules import Split
from megatron_rl.weights.weight_map import WeightEntry, WeightMap

_LAYERS = "decoder.layers."
_EXPERTS, _STACKED_EXPERTS = "local_experts", "experts"
_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Norms that Transformer Engine's modules hold, whose names the checkpoints of all modules share."""
PLAIN_NORMS = {fused: plain for plain, fused in _FUSED_NORMS.items()} | {
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
"""From the names of norms inside Transformer Engine's linears to those of norms by themselves."""


@dataclass(frozen=True)
class ShardedName:
    """Where a checkpoint keeps one tensor.

    Attributes:
        key: name in the checkpoint, which several layers or experts may share.
        index: which of these: it comes first in the tensor's offset; empty where the key is this tensor's alone.
        axes: how many there are: it comes first in the key's shape; as long as ``index``.
    """

    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...]


def sharded_name(entry: WeightEntry, dims: ModelDims, *, stacked: bool | None = None) -> ShardedName:
    """Where ``entry`` of a model of these sizes is kept.

    Layers share a key, stacked along the first axis, or have keys of their own; the experts of a layer share a key in
    any case.

    Args:
        entry: which tensor it is.
        dims: sizes of the model.
        stacked: whether layers share keys; None: as a model of ours keeps them, stacked unless some have experts.
            megatron-core stacks layers with experts, too, where its ``moe_layer_freq`` is the number 1, not a list.
    """
    if entry.layer is None:
        return ShardedName(entry.megatron, (), ())
    tail = entry.megatron.removeprefix(f"{_LAYERS}{entry.layer}.")
    if dims.latent is None:
        tail = _FUSED_NORMS.get(tail, tail)
    prefix, index, axes = f"{_LAYERS}{entry.layer}.", tuple[int, ...](), tuple[int, ...]()
    if dims.experts is None if stacked is None else stacked:
        prefix, index, axes = _LAYERS, (entry.layer,), (dims.layers,)
    if entry.expert is None or dims.experts is None:
        return ShardedName(prefix + tail, index, axes)
    tail = tail.replace(f"{_EXPERTS}.{entry.expert}.", f"{_STACKED_EXPERTS}.")
    return ShardedName(prefix + tail, (*index, entry.expert), (*axes, dims.experts.count))


def kept_key(key: str, keys: Container[str]) -> str:
    """Where a checkpoint with these keys keeps what ours have under ``key``: a norm may be by itself or in the linear
    behind it, whatever made the checkpoint; of a tensor that it has under neither name, ``key``.

    Transformer Engine's layers have it otherwise than ours in layers with experts and with latent attention: see
    ``get_gpt_layer_with_transformer_engine_spec`` in megatron-core's ``gpt_layer_specs.py``.
    """
    if key in keys:
        return key
    others = (
        key.removesuffix(mine) + other
        for fused, plain in PLAIN_NORMS.items()
        for mine, other in ((fused, plain), (plain, fused))
        if key.endswith(f".{mine}")
    )
    return next((other for other in others if other in keys), key)


def stacks_layers(keys: Iterable[str]) -> bool:
    """Whether the layers of the model that these keys are of share them."""
    return not any(key.startswith(f"{_LAYERS}0.") for key in keys)


def extra_states(weights: WeightMap) -> Iterator[str]:
    """Keys of the empty objects that megatron-core expects beside each linear layer that is cut over tensor ranks.

    With Transformer Engine they hold scales of 8-bit training; the local modules keep nothing in them.
    """
    for entry in weights.entries:
        if entry.layer is not None and entry.split is not Split.NONE and entry.megatron.endswith(".weight"):
            name = sharded_name(entry, weights.dims)
            index, axes = name.index or (0,), name.axes or (1,)
            place = ".".join(map(str, index)) + "_" + ".".join(map(str, axes))
            yield f"{name.key.removesuffix('weight')}_extra_state/shard_{place}"
