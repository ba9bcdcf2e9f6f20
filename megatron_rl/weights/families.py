"""One table per model family: which Megatron tensor is made of which Hugging Face tensors, and how it is cut.

A new family is a new entry of ``FAMILIES`` (and of the sizes' reader, :mod:`megatron_rl.model_dims`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.rules import Ffn, Head, Layers, Op, Split, WeightRule, always

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


def _norm(megatron: str, hf: str, when: Callable[[ModelDims], bool] = always) -> WeightRule:
    return WeightRule(f"{_MEGATRON}{megatron}.weight", (f"{_HF}{hf}.weight",), when=when)


def _biased(weight: WeightRule, when: Callable[[ModelDims], bool]) -> WeightRule:
    """The bias of a linear layer: cut along the rows of its weight, whole where the weight is cut along its columns."""
    return replace(
        weight,
        megatron=weight.megatron.replace(".weight", ".bias"),
        hf=tuple(name.replace(".weight", ".bias") for name in weight.hf),
        split=Split.NONE if weight.split is Split.COLUMNS else weight.split,
        when=when,
    )


def _block(
    megatron: str, hf: str, layers: Layers, ffn: Ffn, when: Callable[[ModelDims], bool] = always
) -> tuple[WeightRule, WeightRule]:
    """A gated feed-forward block."""
    return (
        WeightRule(
            f"{_MEGATRON}{megatron}.linear_fc1.weight",
            (f"{_HF}{hf}.gate_proj.weight", f"{_HF}{hf}.up_proj.weight"),
            Op.GATE_UP,
            Split.GATE_UP,
            layers,
            ffn,
            when,
        ),
        WeightRule(
            f"{_MEGATRON}{megatron}.linear_fc2.weight",
            (f"{_HF}{hf}.down_proj.weight",),
            split=Split.COLUMNS,
            layers=layers,
            ffn=ffn,
            when=when,
        ),
    )


def _sparse(megatron: str, hf: str, when: Callable[[ModelDims], bool] = always) -> WeightRule:
    return WeightRule(f"{_MEGATRON}mlp.{megatron}", (f"{_HF}mlp.{hf}",), layers=Layers.SPARSE, when=when)


def _shares(dims: ModelDims) -> bool:
    return dims.experts is not None and dims.experts.shared_ffn_hidden > 0


def _corrects(dims: ModelDims) -> bool:
    return dims.experts is not None and dims.experts.bias


def _low_rank(dims: ModelDims) -> bool:
    return dims.latent is not None and dims.latent.query_rank is not None


EMBEDDING = WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), split=Split.ROWS)

_FINAL_NORM = WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",))

_QKV = WeightRule(
    f"{_MEGATRON}self_attention.linear_qkv.weight",
    tuple(f"{_HF}self_attn.{part}_proj.weight" for part in "qkv"),
    Op.QKV,
    Split.ROWS,
)

_PROJECTION = WeightRule(
    f"{_MEGATRON}self_attention.linear_proj.weight", (f"{_HF}self_attn.o_proj.weight",), split=Split.COLUMNS
)

_FFN = _block("mlp", "mlp", Layers.DENSE, Ffn.DENSE)

_LLAMA = (
    EMBEDDING,
    _norm("input_layernorm", "input_layernorm"),
    _QKV,
    _biased(_QKV, lambda dims: dims.qkv_bias),
    _norm("self_attention.q_layernorm", "self_attn.q_norm", lambda dims: dims.qk_norm),
    _norm("self_attention.k_layernorm", "self_attn.k_norm", lambda dims: dims.qk_norm),
    _PROJECTION,
    _biased(_PROJECTION, lambda dims: dims.projection_bias),
    _norm("pre_mlp_layernorm", "post_attention_layernorm"),
    *_FFN,
    *(_biased(weight, lambda dims: dims.mlp_bias) for weight in _FFN),
    _FINAL_NORM,
)
"""What has biases or norms of queries and keys is told by the sizes; most dense families differ in nothing else."""

_EXPERTS = (
    _sparse("router.weight", "gate.weight"),
    *_block("mlp.experts.local_experts.{expert}", "mlp.experts.{expert}", Layers.SPARSE, Ffn.EXPERT),
)


def _latent(
    megatron: str, hf: str, split: Split = Split.NONE, when: Callable[[ModelDims], bool] = always
) -> WeightRule:
    return WeightRule(
        f"{_MEGATRON}self_attention.{megatron}.weight", (f"{_HF}self_attn.{hf}.weight",), split=split, when=when
    )


_DEEPSEEK = (
    EMBEDDING,
    _norm("input_layernorm", "input_layernorm"),
    _latent("linear_q_proj", "q_proj", Split.ROWS, when=lambda dims: not _low_rank(dims)),
    _latent("linear_q_down_proj", "q_a_proj", when=_low_rank),
    _latent("q_layernorm", "q_a_layernorm", when=_low_rank),
    _latent("linear_q_up_proj", "q_b_proj", Split.ROWS, when=_low_rank),
    _latent("linear_kv_down_proj", "kv_a_proj_with_mqa"),
    _latent("kv_layernorm", "kv_a_layernorm"),
    _latent("linear_kv_up_proj", "kv_b_proj", Split.ROWS),
    _PROJECTION,
    _norm("pre_mlp_layernorm", "post_attention_layernorm"),
    *_FFN,
    *_EXPERTS,
    _sparse("router.expert_bias", "gate.e_score_correction_bias", when=_corrects),
    *_block("mlp.shared_experts", "mlp.shared_experts", Layers.SPARSE, Ffn.SHARED, _shares),
    _FINAL_NORM,
)

FAMILIES: Mapping[str, tuple[WeightRule, ...]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen2MoeForCausalLM": (
        *_LLAMA,
        *_EXPERTS,
        *_block("mlp.shared_experts", "mlp.shared_expert", Layers.SPARSE, Ffn.SHARED, _shares),
        _sparse("shared_experts.gate_weight", "shared_expert_gate.weight", _shares),
    ),
    "Qwen3ForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": (*_LLAMA, *_EXPERTS),
    "DeepseekV2ForCausalLM": _DEEPSEEK,
    "DeepseekV3ForCausalLM": _DEEPSEEK,
}
"""By architecture: everything below the head."""

HEADS: Mapping[Head, tuple[WeightRule, ...]] = {
    Head.TOKEN: (WeightRule("output_layer.weight", ("lm_head.weight",), split=Split.ROWS),),
    Head.VALUE: (
        WeightRule("output_layer.weight", ("score.weight",)),
        WeightRule("output_layer.bias", ("score.bias",)),
    ),
}
"""What untied models have on top; the value head is that of transformers' ``*ForTokenClassification``, one label."""
