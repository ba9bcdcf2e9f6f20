"""One table per model family: which Megatron tensor is made of which Hugging Face tensors, and how it is cut.

A new dense family is a new entry of ``FAMILIES`` (and of the sizes' reader, :mod:`megatron_rl.model_dims`).
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rl.weights.rules import Head, Op, Split, WeightRule

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


def _qkv(kind: str) -> WeightRule:
    parts = tuple(f"{_HF}self_attn.{part}_proj.{kind}" for part in "qkv")
    return WeightRule(f"{_MEGATRON}self_attention.linear_qkv.{kind}", parts, Op.QKV, Split.ROWS)


def _norm(megatron: str, hf: str) -> WeightRule:
    return WeightRule(f"{_MEGATRON}{megatron}.weight", (f"{_HF}{hf}.weight",))


EMBEDDING = WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), split=Split.ROWS)

_LLAMA = (
    EMBEDDING,
    _norm("input_layernorm", "input_layernorm"),
    _qkv("weight"),
    WeightRule(
        f"{_MEGATRON}self_attention.linear_proj.weight", (f"{_HF}self_attn.o_proj.weight",), split=Split.COLUMNS
    ),
    _norm("pre_mlp_layernorm", "post_attention_layernorm"),
    WeightRule(
        f"{_MEGATRON}mlp.linear_fc1.weight",
        (f"{_HF}mlp.gate_proj.weight", f"{_HF}mlp.up_proj.weight"),
        Op.GATE_UP,
        Split.GATE_UP,
    ),
    WeightRule(f"{_MEGATRON}mlp.linear_fc2.weight", (f"{_HF}mlp.down_proj.weight",), split=Split.COLUMNS),
    WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",)),
)

_QK_NORM = (
    _norm("self_attention.q_layernorm", "self_attn.q_norm"),
    _norm("self_attention.k_layernorm", "self_attn.k_norm"),
)

FAMILIES: Mapping[str, tuple[WeightRule, ...]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": (*_LLAMA, _qkv("bias")),
    "Qwen3ForCausalLM": (*_LLAMA, *_QK_NORM),
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
