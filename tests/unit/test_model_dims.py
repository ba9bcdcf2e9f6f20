from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import (
    UnknownArchitecture,
    dims_from_config,
    read_model_dims,
    weight_problems,
)

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 3,
}


def dims(**changes):
    return dims_from_config(CONFIG | changes)


def test_sizes_are_read_from_a_model_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = read_model_dims(tmp_path)
    assert (found.layers, found.hidden, found.ffn_hidden, found.heads, found.kv_heads) == (6, 64, 192, 8, 4)
    assert (found.head_dim, found.vocabulary, found.max_positions) == (8, 384, 512)
    assert (found.norm_eps, found.rope_theta, found.tied_embeddings) == (1e-6, 1e6, True)
    assert (found.eos_ids, found.pad_id) == ((3,), 3)


@pytest.mark.parametrize(("content", "says"), [("{", "must be JSON: "), ("[1]", r"must be a JSON object, got \[1\]")])
def test_a_broken_config_is_named(tmp_path, content, says):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json {says}"):
        read_model_dims(tmp_path)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs a config\.json, found none in"):
        read_model_dims(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "qkv_bias", "qk_norm"),
    [
        ("LlamaForCausalLM", False, False),
        ("MistralForCausalLM", False, False),
        ("Qwen2ForCausalLM", True, False),
        ("Qwen3ForCausalLM", False, True),
    ],
)
def test_each_family_has_its_switches(architecture, qkv_bias, qk_norm):
    found = dims(architectures=[architecture])
    assert (found.qkv_bias, found.qk_norm) == (qkv_bias, qk_norm)


def test_what_a_config_leaves_out_is_derived():
    short = {key: value for key, value in CONFIG.items() if key not in {"num_key_value_heads", "rope_theta"}}
    found = dims_from_config(short | {"architectures": ["LlamaForCausalLM"], "eos_token_id": [5, 7]})
    assert (found.kv_heads, found.rope_theta, found.eos_ids, found.pad_id) == (8, 10000.0, (5, 7), 5)
    found = dims_from_config(short | {"architectures": ["MistralForCausalLM"], "num_attention_heads": 16})
    assert found.kv_heads == 8  # transformers' default


def test_what_a_config_states_wins():
    found = dims(head_dim=16, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert (found.head_dim, found.pad_id, found.rope_theta) == (16, 0, 5e5)


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(
        UnknownArchitecture, match="unknown architecture GPT2LMHeadModel; known: DeepseekV2ForCausalLM, DeepseekV3"
    ):
        dims(architectures=["GPT2LMHeadModel"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "^Qwen2ForCausalLM: rope scaling 'dynamic' is not"),
        (
            {"attention_bias": True, "architectures": ["Qwen3ForCausalLM"]},
            "^Qwen3ForCausalLM: attention_bias=true puts",
        ),
        ({"mlp_bias": True}, "mlp_bias=true puts biases where the weight map has none"),
        ({"qkv_bias": False}, "qkv_bias=false leaves out biases that the weight map has"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got gelu"),
        ({"eos_token_id": None}, "must name eos_token_id"),
    ],
)
def test_settings_that_would_change_the_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dims(**change)


def test_quantised_weights_are_not_trained_from_but_have_sizes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "fp8"}}))
    assert read_model_dims(tmp_path) == dims()
    (problem,) = weight_problems(tmp_path)
    assert "no quantization_config" in problem
    assert "with hf_to_megatron.py and then megatron_to_hf.py" in problem
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert weight_problems(tmp_path) == []


def test_biases_of_a_llama_are_those_of_its_configuration():
    llama = {"architectures": ["LlamaForCausalLM"]}
    for attention in (False, True):
        for mlp in (False, True):
            found = dims(**llama, attention_bias=attention, mlp_bias=mlp)
            assert (found.qkv_bias, found.projection_bias, found.mlp_bias) == (attention, attention, mlp)


@pytest.mark.parametrize(
    ("change", "longest"),
    [
        ({"sliding_window": 64}, 512),  # Qwen2 has the number without using it
        ({"sliding_window": 64, "use_sliding_window": True}, 64),
        ({"sliding_window": 1024, "use_sliding_window": True}, 512),
        ({"sliding_window": 64, "architectures": ["MistralForCausalLM"]}, 64),
        ({"sliding_window": None, "architectures": ["MistralForCausalLM"]}, 512),
        ({"max_position_embeddings": 8192, "architectures": ["MistralForCausalLM"]}, 4096),  # transformers' default
        ({"max_position_embeddings": 8192}, 8192),
        ({"max_position_embeddings": 8192, "use_sliding_window": True}, 4096),
        ({"sliding_window": 64, "architectures": ["LlamaForCausalLM"]}, 512),
    ],
)
def test_rows_may_not_be_longer_than_a_window_of_attention(change, longest):
    assert dims(**change).max_positions == longest


DEEPSEEK = {
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}


CHOICE = {
    "V2": {},
    "V3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1},
}
DEEPSEEK_YARN = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 128}


def deepseek(version, **changes):
    return dims(architectures=[f"Deepseek{version}ForCausalLM"], **DEEPSEEK | CHOICE[version] | changes)


def test_deepseek_chooses_experts_by_its_version():
    v2, v3 = deepseek("V2", routed_scaling_factor=1.5).experts, deepseek("V3", n_group=4, topk_group=2).experts
    assert (v2.sigmoid, v2.bias, v2.normalise, v2.groups, v2.scale) == (False, False, False, 1, 1.5)
    assert (v3.sigmoid, v3.bias, v3.normalise, v3.groups, v3.groups_per_token) == (True, True, True, 4, 2)
    grouped = deepseek("V2", topk_method="group_limited_greedy", n_group=4, topk_group=3).experts
    assert (grouped.groups, grouped.groups_per_token) == (4, 3)
    assert v2.layers == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        ("V2", {"topk_method": "noaux_tc"}, "topk_method must be greedy or group_limited_greedy, got noaux_tc"),
        ("V2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "less than 2 x topk_group"),
        (
            "V2",
            {"topk_method": "greedy", "n_group": 4, "topk_group": 2},
            "n_group must be 1 with topk_method=greedy, got 4",
        ),
        ("V2", {"n_group": 4}, "n_group must be 1 with topk_method=greedy, got 4"),
        ("V2", {"norm_topk_prob": True}, "norm_topk_prob=true is not supported with softmax"),
        ("V2", {"scoring_func": "sigmoid"}, "scoring_func must be softmax, got sigmoid"),
        ("V2", {"moe_layer_freq": 2}, "moe_layer_freq must be 1, got 2"),
        ("V2", {"rms_norm_eps": 1e-5}, "rms_norm_eps must be 1e-6, got 1e-05"),
        ("V2", {"attention_bias": True}, "attention_bias=true puts biases"),
        ("V3", {"topk_method": None}, "must say topk_method=noaux_tc, got None"),
        ("V3", {"topk_method": "greedy"}, "must say topk_method=noaux_tc, got greedy"),
        ("V3", {"n_group": 4, "topk_group": 3}, "must be 2 x topk_group, got 4 and 3"),
        ("V3", {"norm_topk_prob": False}, "norm_topk_prob=false is not supported with sigmoid"),
        ("V3", {"rope_interleave": False}, "rope_interleave=false is not supported"),
        ("V3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "latent attention is scaled by yarn alone"),
    ],
)
def test_variants_of_deepseek_that_would_change_the_numbers_are_refused(version, change, message):
    with pytest.raises(ValueError, match=f"^Deepseek{version}ForCausalLM: .*{message}"):
        deepseek(version, **change)


def test_deepseek_v3_must_say_how_it_scores_experts_as_transformers_alone_does_not():
    config = CONFIG | DEEPSEEK | CHOICE["V3"] | {"architectures": ["DeepseekV3ForCausalLM"]}
    assert dims_from_config(config) == deepseek("V3")
    del config["scoring_func"]
    with pytest.raises(ValueError, match="must say scoring_func=sigmoid, got None"):
        dims_from_config(config)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"attention_factor": 1.0}, "have no attention_factor, got 1.0"),
        ({"truncate": False}, "not have truncate=false"),
        ({"mscale": 0.707}, "both mscale and mscale_all_dim or neither, got 0.707 and None"),
        ({"mscale_all_dim": 0.5}, "both mscale and mscale_all_dim or neither, got None and 0.5"),
        ({}, None),
        ({"mscale": 1.0}, None),
        ({"mscale": 0.707, "mscale_all_dim": 0.5, "truncate": True}, None),
    ],
)
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_yarn_that_vllm_computes_otherwise_in_latent_attention_is_refused(version, rope, message):
    scaled = {"rope_scaling": DEEPSEEK_YARN | rope}
    if message is None:
        assert deepseek(version, **scaled).rope_scaling.factor == 40
        return
    with pytest.raises(ValueError, match=f"^Deepseek{version}ForCausalLM: latent attention's yarn .*{message}"):
        deepseek(version, **scaled)
    assert dims(**scaled).rope_scaling.factor == 40  # other attention takes it


def test_latent_attention_has_no_other_heads():
    """Published folders have no head_dim, those that transformers saves have that of the rotary part."""
    published = {"qk_rope_head_dim": 16, "num_key_value_heads": 8}
    assert deepseek("V3", **published) == deepseek("V3", head_dim=16, **published)
    assert deepseek("V3", **published) == deepseek("V3", **published | {"num_key_value_heads": None})


EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 100}
ALL_NAMED = {
    "Llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "Mistral": {"sliding_window": 100, "head_dim": 16},
    "Qwen2": WINDOWED,
    "Qwen2Moe": WINDOWED | EXPERTS,
    "Qwen3": WINDOWED | {"head_dim": 16},
    "Qwen3Moe": WINDOWED | EXPERTS | {"head_dim": 16},
    "DeepseekV2": DEEPSEEK | {"q_lora_rank": 8, "routed_scaling_factor": 1.5, "topk_method": "greedy"},
    "DeepseekV3": DEEPSEEK
    | CHOICE["V3"]
    | {"q_lora_rank": 8, "routed_scaling_factor": 1.5, "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
}


def found_in(config):
    try:
        return dims_from_config(config)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("family", ALL_NAMED)
def test_a_setting_that_is_not_there_is_asked_for_or_is_what_transformers_takes(family):
    import transformers

    named = CONFIG | ALL_NAMED[family]
    for left in named:
        config = {key: value for key, value in named.items() if key != left}
        read = getattr(transformers, f"{family}Config")(**config).to_dict()
        found = found_in(config | {"architectures": [f"{family}ForCausalLM"]})
        expected = found_in(read | {"architectures": [f"{family}ForCausalLM"]})
        if isinstance(found, str):
            asked = "num_local_experts" if left in ("num_experts", "n_routed_experts") else left
            assert found == expected or re.search(f"must (name|say) {asked}", found), left
        else:
            # how many layers predict further tokens is of interest in files alone
            assert found == replace(expected, further_layers=0), left


def test_a_layout_that_fits_has_no_problems():
    assert dims().layout_problems(ParallelLayout(tensor=4, pipeline=3, data=5, sequence_parallel=True)) == []


def test_a_layout_that_does_not_divide_names_the_possible_sizes():
    assert dims().layout_problems(ParallelLayout(tensor=16, pipeline=4)) == [
        "tensor=16 does not divide the model's 8 attention heads and 4 key/value heads; possible: [1, 2, 4, 8]",
        "pipeline=4 does not divide the model's 6 layers; possible: [1, 2, 3, 6] (or set first_stage_layers, "
        "last_stage_layers)",
    ]
    assert dims(num_key_value_heads=3, num_attention_heads=6).layout_problems(ParallelLayout(tensor=2)) == [
        "tensor=2 does not divide the model's 6 attention heads and 3 key/value heads; possible: [1, 3, 6]",
    ]
    assert dims(intermediate_size=190).layout_problems(ParallelLayout(tensor=4)) == [
        "tensor=4 does not divide the model's ffn width of 190",
    ]


def test_a_vocabulary_is_padded_and_key_value_heads_are_shared_where_there_are_more_tensor_ranks():
    assert dims(vocab_size=385).layout_problems(ParallelLayout(tensor=8)) == []


def test_a_size_that_is_none_is_all_that_is_said():
    assert dims().layout_problems(ParallelLayout(tensor=0)) == ["tensor must be at least 1, got 0"]


def test_virtual_stages_and_experts_that_do_not_fit_are_named():
    assert dims().layout_problems(ParallelLayout(pipeline=2, virtual_pipeline=2)) == [
        "virtual_pipeline=2 does not divide the 3 layers of a stage; possible: [1, 3]"
    ]
    assert dims().layout_problems(ParallelLayout(data=2, expert=2)) == [
        "expert and expert_tensor must be 1: Qwen2ForCausalLM has no experts"
    ]


def test_layouts_that_would_not_train_experts_right_are_refused():
    sparse = dims(architectures=["Qwen3MoeForCausalLM"], num_experts=6, num_experts_per_tok=2, moe_intermediate_size=10)
    assert sparse.experts.layers == tuple(range(6))
    shared = ParallelLayout(tensor=2, sequence_parallel=True, expert_tensor=2)
    assert sparse.layout_problems(shared) == []
    assert sparse.layout_problems(ParallelLayout(tensor=2, expert_tensor=2)) == [
        "a model with experts needs sequence_parallel=true where tensor > 1"
    ]
    assert sparse.layout_problems(ParallelLayout(tensor=2, sequence_parallel=True)) == [
        "expert_tensor must equal tensor=2 where expert = 1, got 1: copies of experts on tensor ranks would drift apart"
    ]
    assert sparse.layout_problems(ParallelLayout(data=4, expert=4)) == [
        "expert=4 does not divide the model's 6 experts; possible: [1, 2, 3, 6]"
    ]
    assert sparse.layout_problems(ParallelLayout(data=8, expert=2, expert_tensor=4)) == [
        "expert_tensor=4 does not divide the experts' ffn width of 10"
    ]


def test_engines_whose_workers_cannot_share_a_feed_forward_block_are_refused():
    assert [*dims().engine_problems(4)] == []
    assert [*dims(intermediate_size=190).engine_problems(4)] == ["must divide the model's ffn width of 190, got 4"]
    switches = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
    sparse = {"architectures": ["Qwen2MoeForCausalLM"], "intermediate_size": 190, **switches}
    # no layer has the dense block
    assert [*dims(**sparse, shared_expert_intermediate_size=10).engine_problems(4)] == [
        "must divide the model's experts' ffn width of 6, got 4",
        "must divide the model's shared expert's ffn width of 10, got 4",
    ]
    some = dims(**sparse, shared_expert_intermediate_size=8, mlp_only_layers=[0])
    assert [*some.engine_problems(2)] == []
    assert "ffn width of 190" in next(some.engine_problems(4))


def test_the_flops_of_a_row_by_hand():
    sizes = dims(num_hidden_layers=1, hidden_size=8, intermediate_size=16, vocab_size=32)
    assert (sizes.heads, sizes.kv_heads, sizes.head_dim) == (8, 4, 1)
    # per token: queries 64 + keys and values 2 * 32 + output 64 + gate, up and down 3 * 128 + logits 256, twice each;
    # attention of 10 tokens: 10 * 10 / 2 pairs, 8 wide, scores and sums, twice each
    assert sizes.row_flops(10) == 10 * 2 * (64 + 64 + 64 + 384 + 256) + 2 * 2 * 50 * 8


def test_reading_sizes_never_loads_torch():
    program = "import sys, megatron_rl.model_dims; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
