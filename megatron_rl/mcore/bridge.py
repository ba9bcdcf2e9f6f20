"""The tensors of families that have no table here, from megatron-bridge where it is installed; for files alone.

megatron-core calls the same tensor by the same name in every family. So the families that have a table say all of a
rule but its Hugging Face names, and megatron-bridge's mapping registry says these. A tensor that it makes in a way that
no rule here has is refused by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rl.mcore.sharded_names import PLAIN_NORMS
from megatron_rl.model_dims import ExpertDims, LatentDims, ModelDims, UnknownArchitecture, token_ids
from megatron_rl.weights.families import EMBEDDING, FAMILIES, HEADS
from megatron_rl.weights.rules import Head, Op, WeightRule

_BRIDGE = "megatron.bridge"

_OPS = {
    "AutoMapping": Op.COPY,
    "ColumnParallelMapping": Op.COPY,
    "DirectMapping": Op.COPY,
    "ReplicatedMapping": Op.COPY,
    "RowParallelMapping": Op.COPY,
    "QKVMapping": Op.QKV,
    "GatedMLPMapping": Op.GATE_UP,
}
"""What the classes of megatron-bridge's ``param_mapping`` do with elements; a subclass may do anything else."""
_PARTS = {Op.QKV: ("q", "k", "v"), Op.GATE_UP: ("gate", "up")}

_HARMLESS = {
    "get_hf_tokenizer_kwargs",
    "hf_config_to_provider_kwargs",
    "hf_to_megatron_activation",
    "mapping_registry",
    "megatron_to_hf_activation",
    "megatron_to_hf_config",
    "provider_bridge",
    "_should_map_hf_config_field",
}
"""Methods of a model's bridge that touch no weights."""


@dataclass(frozen=True, kw_only=True)
class BridgedFamily:
    """One model of a family that megatron-bridge knows.

    Attributes:
        dims: sizes; how positions are scaled is not read.
        rules: everything below the head.
        refused: why there is no rule, by the names of Hugging Face tensors, in which ``*`` stands for a number.
    """

    dims: ModelDims
    rules: tuple[WeightRule, ...]
    refused: Mapping[str, str]

    def hint(self, name: str) -> str:
        """Why the model has no rule for a Hugging Face tensor."""
        for pattern, why in self.refused.items():
            if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name):
                return why
        return "megatron-bridge names none of this kind in a model of these sizes"


def bridged_family(folder: Path, architecture: str) -> BridgedFamily:
    """What megatron-bridge says of the model in ``folder``, which holds its ``config.json``.

    Raises:
        UnknownArchitecture: megatron-bridge is not installed, cannot be imported, or does not know it either.
        ValueError: it changes weights in a way of its own, or has sizes or names that no model has here.
    """
    auto_bridge = _auto_bridge()
    if architecture not in auto_bridge.list_supported_models():
        raise UnknownArchitecture("megatron-bridge does not know it either")
    try:
        opened = auto_bridge.from_hf_pretrained(str(folder))
        bridge, provider = opened._model_bridge, opened.to_megatron_provider(load_weights=False)
        mappings = list(bridge.mapping_registry())
    except Exception as error:  # whatever transformers makes of a config.json
        raise ValueError(
            f"{folder}: megatron-bridge must say sizes and tensors of {architecture}, it says: {error}"
        ) from error
    if changes := weight_changes(bridge):
        raise ValueError(
            f"{architecture}: megatron-bridge must change weights by its table alone, it also does by "
            f"{', '.join(changes)}, which no rule here does"
        )
    dims = bridged_dims(architecture, provider, opened.hf_pretrained.config.to_dict())
    rules, refused = bridged_rules(mappings, dims)
    return BridgedFamily(dims=dims, rules=rules, refused=refused)


def _auto_bridge() -> Any:
    if importlib.util.find_spec(_BRIDGE) is None:
        raise UnknownArchitecture("megatron-bridge, where it is installed, adds others, for files")
    try:
        return importlib.import_module(_BRIDGE).AutoBridge
    except Exception as error:  # it imports most of what is installed, and anything of that may fail
        raise UnknownArchitecture(
            f"megatron-bridge, which may know it, cannot be imported: {type(error).__name__}: {error}"
        ) from error


def weight_changes(bridge: Any) -> list[str]:
    """Methods by which a model's bridge does more to weights than its mapping registry says."""
    kinds = type(bridge).__mro__
    end = next(place for place, kind in enumerate(kinds) if kind.__name__ == "MegatronModelBridge")
    methods = {name for kind in kinds[:end] for name in vars(kind) if inspect.isroutine(getattr(kind, name))}
    return sorted(name for name in methods - _HARMLESS if hasattr(kinds[end], name) and not name.startswith("__"))


def bridged_dims(architecture: str, provider: Any, config: Mapping[str, Any]) -> ModelDims:
    """Sizes from megatron-bridge's provider, which is megatron-core's ``TransformerConfig`` of the model.

    Raises:
        ValueError: the configuration names no end of a text, or says otherwise whether the embedding is tied.
    """
    tied = bool(provider.share_embeddings_and_output_weights)
    if bool(config.get("tie_word_embeddings", tied)) is not tied:
        raise ValueError(
            f"{architecture}: megatron-bridge takes tie_word_embeddings for {tied}, config.json says {not tied}"
        )
    heads, latent = provider.num_attention_heads, provider.multi_latent_attention
    eos_ids, pad_id = token_ids(config)
    return ModelDims(
        architecture=architecture,
        layers=provider.num_layers,
        hidden=provider.hidden_size,
        ffn_hidden=provider.ffn_hidden_size,
        heads=heads,
        kv_heads=provider.num_query_groups or heads,
        head_dim=provider.kv_channels or provider.hidden_size // heads,
        vocabulary=provider.vocab_size,
        max_positions=provider.seq_length,
        tied_embeddings=tied,
        qkv_bias=provider.add_qkv_bias or provider.add_bias_linear,
        projection_bias=provider.add_bias_linear,
        mlp_bias=provider.add_bias_linear,
        qk_norm=provider.qk_layernorm and not latent,
        norm_eps=provider.layernorm_epsilon,
        rope_theta=float(provider.rotary_base),
        eos_ids=eos_ids,
        pad_id=pad_id,
        experts=None if provider.num_moe_experts is None else _experts(provider),
        latent=None if not latent else _latent(provider),
        further_layers=int(config.get("num_nextn_predict_layers") or 0),
    )


def _experts(provider: Any) -> ExpertDims:
    sigmoid = provider.moe_router_score_function == "sigmoid"
    every, layers = provider.moe_layer_freq, range(provider.num_layers)
    # megatron-core: a list says it of each layer, a number of every n-th from the first
    sparse = [layer % every == 0 for layer in layers] if isinstance(every, int) else every
    return ExpertDims(
        count=provider.num_moe_experts,
        per_token=provider.moe_router_topk,
        ffn_hidden=provider.moe_ffn_hidden_size or provider.ffn_hidden_size,
        shared_ffn_hidden=provider.moe_shared_expert_intermediate_size or 0,
        shared_gate=provider.moe_shared_expert_gate,
        normalise=sigmoid or not provider.moe_router_pre_softmax,
        sigmoid=sigmoid,
        bias=provider.moe_router_enable_expert_bias,
        scale=provider.moe_router_topk_scaling_factor or 1.0,
        groups=provider.moe_router_num_groups or 1,
        groups_per_token=provider.moe_router_group_topk or 1,
        layers=tuple(layer for layer in layers if sparse[layer]),
    )


def _latent(provider: Any) -> LatentDims:
    return LatentDims(
        query_rank=provider.q_lora_rank,
        kv_rank=provider.kv_lora_rank,
        plain_head_dim=provider.qk_head_dim,
        rotary_head_dim=provider.qk_pos_emb_head_dim,
        value_head_dim=provider.v_head_dim,
    )


def bridged_rules(mappings: Iterable[Any], dims: ModelDims) -> tuple[tuple[WeightRule, ...], dict[str, str]]:
    """Our rules for the model that ``dims`` describes, in the order of our own tables.

    Args:
        mappings: of megatron-bridge's registry: ``megatron_param``, a name, and ``hf_param``, one or several by their
            part, in which ``*`` stands for the layer and then for the expert.
        dims: of the model.

    Returns:
        the rules below the head; for Hugging Face names without a rule, why.

    Raises:
        ValueError: embedding or head have other names than every family here, or a tensor is made in two ways.
    """
    known = {rule.megatron: rule for table in FAMILIES.values() for rule in table if rule.when(dims)}
    known |= {rule.megatron: rule for rule in HEADS[Head.TOKEN]}
    found: dict[str, WeightRule] = {}
    refused: dict[str, str] = {}
    for mapping in mappings:
        op = _OPS.get(type(mapping).__name__) if getattr(mapping, "permute_dims", None) is None else None
        parts = mapping.hf_param if isinstance(mapping.hf_param, dict) else {"": mapping.hf_param}
        kind = known.get(_megatron_name(mapping.megatron_param))
        if kind is None or op is not kind.op:
            why = f"megatron-bridge makes {mapping.megatron_param} of it ({type(mapping).__name__}), no rule here does"
            refused |= dict.fromkeys(parts.values(), why)
            continue
        hf = tuple(_numbered(parts[part]) for part in _PARTS.get(op, ("",)))
        rule = replace(kind, hf=hf)
        if found.setdefault(kind.megatron, rule) != rule:
            raise ValueError(
                f"{dims.architecture}: {kind.megatron} must be made in one way, megatron-bridge makes it of "
                f"{', '.join(found[kind.megatron].hf)} and of {', '.join(hf)}"
            )
    for fixed in (EMBEDDING, *(() if dims.tied_embeddings else HEADS[Head.TOKEN])):
        if found.get(fixed.megatron) != fixed:
            names = found[fixed.megatron].hf if fixed.megatron in found else ("nothing",)
            raise ValueError(
                f"{dims.architecture}: {fixed.megatron} must be {fixed.hf[0]}, megatron-bridge makes it of {names[0]}"
            )
    heads = {rule.megatron for rule in HEADS[Head.TOKEN]}
    return tuple(found[name] for name in known if name in found and name not in heads), refused


def _megatron_name(pattern: str) -> str:
    """A name in megatron-core's local specification, from that of any specification."""
    name = pattern.replace("decoder.layers.*.", "decoder.layers.{layer}.", 1)
    name = re.sub(r"\.experts\.(linear_fc[12])\.(weight|bias)\*$", r".experts.local_experts.{expert}.\1.\2", name)
    name = name.replace(".local_experts.*.", ".local_experts.{expert}.")
    layer, _, tail = name.partition("{layer}.")
    return f"{layer}{{layer}}.{PLAIN_NORMS[tail]}" if tail in PLAIN_NORMS else name


def _numbered(pattern: str) -> str:
    return pattern.replace("*", "{layer}", 1).replace("*", "{expert}", 1)
