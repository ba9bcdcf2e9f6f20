from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.model_dims import UnknownArchitecture, dims_from_config
from megatron_rl.weights.families import FAMILIES
from megatron_rl.weights.weight_map import Head, Op, Split, Stage, weight_map
from tests.unit.weights.in_memory import fused
from tests.unit.weights.models import EXTRA, dims, saved_model


@st.composite
def model_sizes(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Settings of a tiny model of the family."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    groups, layers, experts = number(1, 3), number(1, 3), number(2, 4)
    expert_width = number(2, 5)  # transformers drops a dim of experts of width 1
    latent = family.startswith("Deepseek")
    heads = groups if latent else groups * number(1, 3)
    sizes: dict[str, Any] = {
        **EXTRA.get(family, {}),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": heads * 2 * number(1, 3),
        "intermediate_size": number(1, 9),
        "vocab_size": number(4, 20),
        "max_position_embeddings": 16,
        "tie_word_embeddings": draw(st.booleans()),
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    if not latent:
        sizes["head_dim"] = 2 * number(1, 4)
    if family == "Llama":
        sizes |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    if family.endswith("Moe"):
        sizes |= {
            "num_experts": experts,
            "moe_intermediate_size": expert_width,
            "decoder_sparse_step": number(1, 2),
            "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), max_size=1)),
        }
    if family == "Qwen2Moe":
        sizes["shared_expert_intermediate_size"] = number(1, 7)
    if latent:
        sizes |= {
            "n_routed_experts": experts,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": number(1, 2),
            "moe_intermediate_size": expert_width,
            "first_k_dense_replace": number(0, layers),
            "q_lora_rank": draw(st.none() | st.integers(2, 6)),
            "kv_lora_rank": number(2, 6),
            "qk_nope_head_dim": number(1, 4),
            "qk_rope_head_dim": 2 * number(1, 2),
            "v_head_dim": number(1, 5),
        }
    return sizes


@pytest.mark.parametrize(
    ("head", "kind"), [(Head.TOKEN, "CausalLM"), (Head.VALUE, "TokenClassification")], ids=["token", "value"]
)
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_a_transformers_model_goes_to_megatron_and_back_unchanged(
    architecture: str, head: Head, kind: str, data: st.DataObject
) -> None:
    family = architecture.removesuffix("ForCausalLM")
    if not hasattr(transformers, f"{family}For{kind}"):
        pytest.skip(f"transformers has no {family}For{kind}")
    config, tensors = saved_model(family, kind, data.draw(model_sizes(family)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    source = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    weights = weight_map(dims_from_config(config), head)

    written: Counter[str] = Counter()
    for entry in weights.entries:
        full = weights.to_megatron(entry, [source[name] for name in entry.hf])
        assert full.dtype is dtype
        assert torch.equal(full, fused(entry, weights.dims, [source[name] for name in entry.hf]))
        for name, tensor in weights.to_hf(entry, full):
            written[name] += 1
            assert torch.equal(tensor, source[name]), name

    assert written == Counter(list(source))


def test_every_family_has_sizes_and_tensors() -> None:
    with pytest.raises(UnknownArchitecture) as refused:
        dims("GPT2LMHeadModel")
    assert str(refused.value) == f"unknown architecture GPT2LMHeadModel; known: {', '.join(sorted(FAMILIES))}"


def test_names_are_those_of_megatron_core_ordered_from_the_embedding_up() -> None:
    weights = weight_map(dims(num_hidden_layers=1), Head.TOKEN)
    assert [entry.megatron for entry in weights.entries] == [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


def test_entries_say_layer_stage_op_and_split() -> None:
    entries = {entry.megatron: entry for entry in weight_map(dims(), Head.VALUE).entries}
    embedding, qkv = (
        entries["embedding.word_embeddings.weight"],
        entries["decoder.layers.1.self_attention.linear_qkv.bias"],
    )
    assert (embedding.layer, embedding.stage, embedding.split) == (None, Stage.FIRST, Split.ROWS)
    assert (qkv.layer, qkv.stage, qkv.op, qkv.split) == (1, Stage.LAYER, Op.QKV, Split.ROWS)
    assert qkv.hf == tuple(f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv")
    for name in ("output_layer.weight", "output_layer.bias"):
        assert (entries[name].stage, entries[name].split) == (Stage.LAST, Split.NONE)


def test_queries_keys_and_values_are_interleaved_by_group() -> None:
    weights = weight_map(dims(hidden_size=8), Head.TOKEN)  # 4 heads, 2 groups, head_dim 2
    entry = next(
        entry for entry in weights.entries if entry.megatron.endswith("layers.0.self_attention.linear_qkv.bias")
    )
    parts = [torch.arange(8.0), torch.arange(10.0, 14.0), torch.arange(20.0, 24.0)]
    expected = [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    assert weights.to_megatron(entry, parts).tolist() == expected


def test_the_gate_comes_before_the_up_projection() -> None:
    weights = weight_map(dims(), Head.TOKEN)
    entry = next(entry for entry in weights.entries if entry.op is Op.GATE_UP)
    gate, up = torch.zeros(24, 16), torch.ones(24, 16)
    assert weights.to_megatron(entry, [gate, up])[:, 0].tolist() == [0.0] * 24 + [1.0] * 24
    assert [name.rsplit(".", 2)[1] for name in entry.hf] == ["gate_proj", "up_proj"]


def test_a_tied_policy_has_no_output_layer_and_a_critic_always_has_its_own() -> None:
    policy = weight_map(dims(tie_word_embeddings=True), Head.TOKEN)
    critic = weight_map(dims(tie_word_embeddings=True), Head.VALUE)
    assert not [e for e in policy.entries if e.megatron.startswith("output_layer")]
    assert [e.hf for e in critic.entries if e.megatron.startswith("output_layer")] == [
        ("score.weight",),
        ("score.bias",),
    ]


def test_a_tensor_of_another_model_is_refused() -> None:
    weights = weight_map(dims(), Head.TOKEN)
    for op in Op:
        entry = next(entry for entry in weights.entries if entry.op is op)
        with pytest.raises(ValueError, match=rf"{entry.hf[0]} must have shape \[.*\] in this .*, got \[7, 16\]"):
            weights.to_megatron(entry, [torch.zeros(7, 16) for _ in entry.hf])
        with pytest.raises(ValueError, match=rf"{entry.megatron} must have shape \[.*\] in this .*, got \[7, 16\]"):
            weights.to_hf(entry, torch.zeros(7, 16))
        if op is not Op.COPY:
            with pytest.raises(ValueError, match="got 1 tensors"):
                weights.to_megatron(entry, [torch.zeros(7, 16)])


def test_unknown_families_and_unmapped_biases_are_refused() -> None:
    with pytest.raises(
        UnknownArchitecture, match="no weight map for GPT2LMHeadModel; known: DeepseekV2ForCausalLM, DeepseekV3"
    ):
        weight_map(dataclasses.replace(dims(), architecture="GPT2LMHeadModel"), Head.TOKEN)
    with pytest.raises(ValueError, match="MistralForCausalLM: attention_bias=true"):
        weight_map(dims("MistralForCausalLM", attention_bias=True), Head.TOKEN)
