"""Sizes and weights of tiny models."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.model_dims import ModelDims, dims_from_config

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}


def dims(architecture: str = "Qwen2ForCausalLM", **changes: Any) -> ModelDims:
    return dims_from_config(CONFIG | {"architectures": [architecture]} | changes)


EXTRA: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 8},
    "Qwen2Moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": 10,
        "mlp_only_layers": [0],
    },
    "Qwen3Moe": {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6},
    "DeepseekV2": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 4,
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2,
        "v_head_dim": 5,
    },
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 6,
        "kv_lora_rank": 4,
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2,
        "v_head_dim": 5,
        "num_mtp_layers": 0,
    },
}
"""What a family's configuration has beyond :data:`CONFIG`."""


@cache
def hf_tensors(family: str, kind: str, tied: bool, **changes: Any) -> dict[str, Tensor]:
    """What transformers saves of a model of :data:`CONFIG`'s sizes, or others; every tensor random, so that no two are
    equal.
    """
    sizes = {key: value for key, value in CONFIG.items() if key != "architectures"} | EXTRA.get(family, {}) | changes
    return saved_model(family, kind, sizes | {"tie_word_embeddings": tied})[1]


def saved_model(family: str, kind: str, sizes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors that transformers saves of a model; the tensors are replaced by random ones."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**sizes | {"num_labels": 1})
    model = getattr(transformers, f"{family}For{kind}")(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
        written = json.loads((Path(folder) / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    return written, {name: torch.randn(t.shape, generator=generator) for name, t in saved.items()}
