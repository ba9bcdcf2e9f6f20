from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import Ranks

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
}
ODD = SIZES | {"vocab_size": 97}
DEEPSEEK_V2 = {
    **SIZES,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "routed_scaling_factor": 1.5,
}
DEEPSEEK_V3 = {
    **DEEPSEEK_V2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_group": 4,
    "topk_group": 2,
    "num_mtp_layers": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e2,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
"""Rows of the tests go beyond the first window, and the ramp has dims on both sides and between."""


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        pool = Ranks()
        yield pool
        pool.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models, by name."""
    from transformers import (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    built = {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, rope_parameters=rope, **SIZES)),
        "qwen2-tied": Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, rope_parameters=rope, **SIZES)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, head_dim=16, rope_parameters=rope, **SIZES)),
        "llama": LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **SIZES)),
        # tokens are drawn from the other models' vocabulary, which this one has, and one more that ranks cannot share
        "qwen2-odd": Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, rope_parameters=rope, **ODD)),
        "llama-odd": LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **ODD)),
        "qwen2-moe": Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
                shared_expert_intermediate_size=32,
                mlp_only_layers=[1],
                rope_parameters=rope,
                **SIZES,
            )
        ),
        "qwen3-moe": Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
                norm_topk_prob=True,
                head_dim=16,
                rope_parameters=rope,
                **SIZES,
            )
        ),
        "deepseek": DeepseekV3ForCausalLM(DeepseekV3Config(rope_parameters=rope, **DEEPSEEK_V3)),
        "mistral": MistralForCausalLM(MistralConfig(sliding_window=64, rope_parameters=rope, **SIZES)),
        "deepseek-v2": DeepseekV2ForCausalLM(DeepseekV2Config(rope_parameters=rope, **DEEPSEEK_V2)),
        "deepseek-v2-grouped": DeepseekV2ForCausalLM(
            DeepseekV2Config(
                topk_method="group_limited_greedy",
                rope_parameters=rope,
                **DEEPSEEK_V2 | {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "q_lora_rank": None},
            )
        ),
        "llama-biases": LlamaForCausalLM(LlamaConfig(attention_bias=True, mlp_bias=True, **SIZES)),
        "llama-attention-bias": LlamaForCausalLM(LlamaConfig(attention_bias=True, **SIZES)),
        "llama-linear": LlamaForCausalLM(
            LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, **SIZES)
        ),
        "llama-llama3": LlamaForCausalLM(
            LlamaConfig(
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 1e2,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
                **SIZES,
            )
        ),
        "qwen2-yarn": Qwen2ForCausalLM(Qwen2Config(rope_parameters=YARN, **SIZES)),
        "deepseek-yarn": DeepseekV3ForCausalLM(
            DeepseekV3Config(rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, **DEEPSEEK_V3)
        ),
        "deepseek-v2-yarn": DeepseekV2ForCausalLM(
            DeepseekV2Config(rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}, **DEEPSEEK_V2)
        ),
    }
    folders = {}
    for name, model in built.items():
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                # norms of one and biases of zero would hide a wrong one
                noise = 0.1 if "norm" in key or "bias" in key else 0.05
                parameter += noise * torch.randn_like(parameter)
            for key, buffer in model.named_buffers():
                if key.endswith("e_score_correction_bias"):
                    buffer += 0.1 * torch.randn_like(buffer)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders
