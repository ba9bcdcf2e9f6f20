from __future__ import annotations

import pytest
import torch

from megatron_rl.mcore.rotary import inverse_frequencies
from megatron_rl.rope_scaling import YarnScaling, read_rope

KINDS = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "Llama 3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "Qwen2.5": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "DeepSeek-V2": {
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
    },
    "fractions": {"rope_type": "yarn", "factor": 7.0, "original_max_position_embeddings": 64, "truncate": False},
    "narrow ramp": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096, "beta_slow": 32},
}


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers_to_the_last_bit(kind: str, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = KINDS[kind] | {"rope_theta": theta}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, head_dim=128, max_position_embeddings=163840, rope_parameters=rope
    )
    expected = LlamaRotaryEmbedding(config)
    base, scaling = read_rope(config.to_dict())
    assert torch.equal(inverse_frequencies(base, 128, scaling), expected.inv_freq)
    magnitude = scaling.magnitude if isinstance(scaling, YarnScaling) else 1.0
    assert magnitude == expected.attention_scaling
