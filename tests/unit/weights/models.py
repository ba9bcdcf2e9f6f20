"""Sizes and weights of tiny models."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
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


@cache
def hf_tensors(family: str, kind: str, tied: bool) -> dict[str, Tensor]:
    """The state of a transformers model; every tensor random, so that no two are equal."""
    import transformers

    sizes = {key: value for key, value in CONFIG.items() if key != "architectures"}
    extra = {"head_dim": 8} if family == "Qwen3" else {}
    config = getattr(transformers, f"{family}Config")(**sizes | extra | {"tie_word_embeddings": tied, "num_labels": 1})
    model = getattr(transformers, f"{family}For{kind}")(config)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}
