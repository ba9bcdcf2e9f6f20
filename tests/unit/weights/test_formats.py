from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rl.config.precision import FP8Config
from megatron_rl.linear_formats import LinearFormat
from megatron_rl.model_dims import dims_from_config
from megatron_rl.weights.formats import check_formats, expected_formats
from megatron_rl.weights.weight_map import Head, WeightMap, weight_map

LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def weights() -> WeightMap:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 384,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": 3,
    }
    return weight_map(dims_from_config(config), Head.TOKEN)


def names(layer: int) -> list[str]:
    return [f"model.layers.{layer}.{linear}.weight" for linear in LINEARS]


def test_the_linears_of_the_layers_and_no_others_multiply_in_fp8() -> None:
    found = expected_formats(weights(), FP8Config(), "bfloat16")
    block = {"dtype": "float8_e4m3fn", "block": (128, 128), "scale": "float32"}
    assert found == [LinearFormat(weight=name, **block) for layer in range(3) for name in names(layer)]


def test_the_layers_at_both_ends_stay_in_bfloat16_when_asked() -> None:
    found = expected_formats(weights(), FP8Config(recipe="tensorwise"), "bfloat16")
    by_layer = {layer: {f.dtype for f in found if f".{layer}." in f.weight} for layer in range(3)}
    assert by_layer == {0: {"bfloat16"}, 1: {"float8_e4m3fn"}, 2: {"bfloat16"}}
    assert [(f.block, f.scale) for f in found if f.weight == names(1)[0]] == [((0, 0), "float32")]


def test_without_fp8_every_linear_has_the_type_of_the_model() -> None:
    assert {f.dtype for f in expected_formats(weights(), None, "float32")} == {"float32"}


def test_the_first_layer_that_differs_is_named() -> None:
    expected = expected_formats(weights(), FP8Config(), "bfloat16")
    mine = [f for f in expected if ".0." not in f.weight]  # another stage has layer 0
    check_formats("policy", expected, mine)
    left = [
        replace(f, dtype="bfloat16", block=None, scale=None) if "down_proj" in f.weight and ".0." not in f.weight else f
        for f in mine
    ]
    with pytest.raises(ValueError, match=r"down_proj") as caught:
        check_formats("policy", expected, left)
    assert str(caught.value).startswith(
        "policy: model.layers.1.mlp.down_proj.weight must multiply in float8_e4m3fn with one float32 scale per 128x128 "
        "weights, but multiplies in bfloat16 (2 of 14 weights differ)"
    )


def test_a_scale_of_another_kind_is_a_difference() -> None:
    expected = expected_formats(weights(), FP8Config(), "bfloat16")
    rounded = [replace(expected[0], scale="float8_e8m0fnu"), *expected[1:]]
    with pytest.raises(ValueError, match="multiplies in float8_e4m3fn with one float8_e8m0fnu scale per 128x128"):
        check_formats("policy", expected, rounded)


def test_a_linear_of_which_nothing_is_expected_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing is expected of extra"):
        check_formats("policy", [], [LinearFormat(weight="extra", dtype="bfloat16")])
