from __future__ import annotations

import math

import pytest

from megatron_rl.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling, read_rope, yarn_mscale

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def read(rope=None, **config):
    return read_rope({"max_position_embeddings": 131072} | config | ({} if rope is None else {"rope_scaling": rope}))


def test_a_plain_model_has_a_base_and_no_scaling():
    assert read() == (10000.0, None)
    assert read(rope_theta=5e5) == (5e5, None)
    assert read({"rope_type": "default"}, rope_theta=1e6) == (1e6, None)
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_theta=3.0) == (1e6, None)


def test_each_kind_is_read_from_either_spelling():
    linear, llama3 = (
        LinearScaling(factor=2.0),
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192),
    )
    assert read({"type": "linear", "factor": 2}) == (10000.0, linear)
    assert read(rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 7.0}) == (7.0, linear)
    assert read(LLAMA3, rope_theta=5e5) == (5e5, llama3)
    assert read(rope_parameters=LLAMA3 | {"attention_factor": None}) == (10000.0, llama3)


def test_yarn_scales_attention_as_its_settings_say():
    plain = YarnScaling(
        factor=4.0,
        original_positions=32768,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
        magnitude=0.1 * math.log(4) + 1,
        mscale_all_dim=0.0,
    )
    assert read(YARN)[1] == plain
    deepseek = read(YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_slow": 2, "truncate": False})[1]
    assert deepseek.magnitude == pytest.approx((0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1))
    assert (deepseek.mscale_all_dim, deepseek.beta_slow, deepseek.truncate) == (0.5, 2.0, False)
    assert read(YARN | {"attention_factor": 1.25, "mscale": 3.0})[1].magnitude == 1.25
    assert yarn_mscale(1.0, 5.0) == yarn_mscale(0.5) == 1.0


def test_the_first_window_is_where_the_configuration_has_it():
    unnamed = {key: value for key, value in YARN.items() if not key.startswith("original")}
    assert read(unnamed)[1].original_positions == 131072
    assert read(YARN, original_max_position_embeddings=4096)[1].original_positions == 4096


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported; known: default, linear, llama3, yarn"),
        ({"type": "longrope", "long_factor": [1.0]}, "'longrope' is not supported; known: default"),
        ({"rope_type": "linear"}, r"'linear' must have \['factor'\] .* missing: \['factor'\]"),
        (LLAMA3 | {"mrope_section": [1]}, r"not understood: \['mrope_section'\]"),
        ({"full_attention": {"rope_type": "yarn"}}, r"'default' .* not understood: \['full_attention'\]"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(rope, message):
    with pytest.raises(ValueError, match=message):
        read(rope)
