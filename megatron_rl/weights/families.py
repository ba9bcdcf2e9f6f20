"""One table per model family: which Megatron tensor is made of which Hugging Face tensors, and how it is cut.

A new family is a new entry of ``FAMILIES`` (and of the sizes' reader, :mod:`megatron_rl.model_dims`).
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rl.weights.rules import Ffn, Head, Layers, Op, Split, WeightRule

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


def _qkv(kind: str) -> WeightRule:
    parts = tuple(f"{_HF}self_attn.{part}_proj.{kind}" for part in "qkv")
    return WeightRule(f"{_MEGATRON}self_attention.linear_qkv.{kind}", parts, Op.QKV, Split.ROWS)


def _norm(megatron: str, hf: str) -> WeightRule:
    return WeightRule(f"{_MEGATRON}{megatron}.weight", (f"{_HF}{hf}.weight",))


EMBEDDING = WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), split=Split.ROWS)

_FINAL_NORM = WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",))


def _block(megatron: str, hf: str, layers: Layers, ffn: Ffn) -> tuple[WeightRule, WeightRule]:
    """A gated feed-forward block."""
    return (
        WeightRule(
            f"{_MEGATRON}{megatron}.linear_fc1.weight",
            (f"{_HF}{hf}.gate_proj.weight", f"{_HF}{hf}.up_proj.weight"),
            Op.GATE_UP,
            Split.GATE_UP,
            layers,
            ffn,
        ),
        WeightRule(
            f"{_MEGATRON}{megatron}.linear_fc2.weight",
            (f"{_HF}{hf}.down_proj.weight",),
            split=Split.COLUMNS,
            layers=layers,
            ffn=ffn,
        ),
    )


def _sparse(megatron: str, hf: str) -> WeightRule:
    return WeightRule(f"{_MEGATRON}mlp.{megatron}", (f"{_HF}mlp.{hf}",), layers=Layers.SPARSE)


_PROJECTION = WeightRule(
    f"{_MEGATRON}self_attention.linear_proj.weight", (f"{_HF}self_attn.o_proj.weight",), split=Split.COLUMNS
)

_LLAMA = (
    EMBEDDING,
    _norm("input_layernorm", "input_layernorm"),
    _qkv("weight"),
    _PROJECTION,
    _norm("pre_mlp_layernorm", "post_attention_layernorm"),
    *_block("mlp", "mlp", Layers.DENSE, Ffn.DENSE),
    _FINAL_NORM,
)

_QK_NORM = (
    _norm("self_attention.q_layernorm", "self_attn.q_norm"),
    _norm("self_attention.k_layernorm", "self_attn.k_norm"),
)

_EXPERTS = (
    _sparse("router.weight", "gate.weight"),
    *_block("mlp.experts.local_experts.{expert}", "mlp.experts.{expert}", Layers.SPARSE, Ffn.EXPERT),
)


def _latent(megatron: str, hf: str, split: Split = Split.NONE) -> WeightRule:
    return WeightRule(f"{_MEGATRON}self_attention.{megatron}.weight", (f"{_HF}self_attn.{hf}.weight",), split=split)


_DEEPSEEK = (
    EMBEDDING,
    _norm("input_layernorm", "input_layernorm"),
    _latent("linear_q_proj", "q_proj", Split.ROWS),
    _latent("linear_q_down_proj", "q_a_proj"),
    _latent("q_layernorm", "q_a_layernorm"),
    _latent("linear_q_up_proj", "q_b_proj", Split.ROWS),
    _latent("linear_kv_down_proj", "kv_a_proj_with_mqa"),
    _latent("kv_layernorm", "kv_a_layernorm"),
    _latent("linear_kv_up_proj", "kv_b_proj", Split.ROWS),
    _PROJECTION,
    _norm("pre_mlp_layernorm", "post_attention_layernorm"),
    *_block("mlp", "mlp", Layers.DENSE, Ffn.DENSE),
    *_EXPERTS,
    _sparse("router.expert_bias", "gate.e_score_correction_bias"),
    *_block("mlp.shared_experts", "mlp.shared_experts", Layers.SPARSE, Ffn.SHARED),
    _FINAL_NORM,
)

FAMILIES: Mapping[str, tuple[WeightRule, ...]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": (*_LLAMA, _qkv("bias")),
    "Qwen2MoeForCausalLM": (
        *_LLAMA,
        _qkv("bias"),
        *_EXPERTS,
        *_block("mlp.shared_experts", "mlp.shared_expert", Layers.SPARSE, Ffn.SHARED),
        _sparse("shared_experts.gate_weight", "shared_expert_gate.weight"),
    ),
    "Qwen3ForCausalLM": (*_LLAMA, *_QK_NORM),
    "Qwen3MoeForCausalLM": (*_LLAMA, *_QK_NORM, *_EXPERTS),
    "DeepseekV3ForCausalLM": _DEEPSEEK,
}
"""By architecture: everything below the head. What a model of the family does not have is left out of its map: a shared
expert, or queries of low rank."""

HEADS: Mapping[Head, tuple[WeightRule, ...]] = {
    Head.TOKEN: (WeightRule("output_layer.weight", ("lm_head.weight",), split=Split.ROWS),),
    Head.VALUE: (
        WeightRule("output_layer.weight", ("score.weight",)),
        WeightRule("output_layer.bias", ("score.bias",)),
    ),
}
"""What untied models have on top; the value head is that of transformers' ``*ForTokenClassification``, one label."""
