"""What a model is made of, and where; torch's meta device is the GPU: what asks for CUDA gets it, nothing else does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rl import device
from megatron_rl.config.schema import OptimizerConfig, TrainerConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import dims_from_config
from megatron_rl.weights.weight_map import Head

device.prepare_megatron()

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.tensor_parallel import random as random_states  # noqa: E402

from megatron_rl.mcore.groups import build_parallel_groups, stop_groups  # noqa: E402
from megatron_rl.mcore.model import build_chunks  # noqa: E402

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 32},
    "Qwen2MoeForCausalLM": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "norm_topk_prob": False,
    },
    "DeepseekV3ForCausalLM": {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
    },
}


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ParallelLayout]:
    """This is rank 0 of two tensor ranks, and nobody else is there."""
    layout = ParallelLayout(tensor=2, sequence_parallel=True)
    # a random state would be kept of a device that has none
    monkeypatch.setattr(random_states.CudaRNGStatesTracker, "fork", lambda self, name=None: contextlib.nullcontext())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    build_parallel_groups(layout)
    yield layout
    stop_groups()


def built(layout: ParallelLayout, family: str, head: Head) -> torch.nn.Module:
    dims = dims_from_config({**SIZES, **FAMILIES[family], "architectures": [family]})
    trainer = TrainerConfig(optimizer=OptimizerConfig(lr=1e-6), layout=layout)
    (chunk,) = build_chunks(dims, trainer, torch.bfloat16, head)
    return chunk


@pytest.mark.parametrize("head", [Head.TOKEN, Head.VALUE])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_lies_on_the_device_alone_and_its_parameters_know_how_they_are_split(
    monkeypatch: pytest.MonkeyPatch, two_ranks: ParallelLayout, family: str, head: Head
) -> None:
    on_host = built(two_ranks, family, head)
    monkeypatch.setattr(device, "_CPU", torch.device("meta"))
    model = built(two_ranks, family, head)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, tensor in tensors if tensor.device.type != "meta"] == []
    assert [name for name, _ in tensors] == [
        name for name, _ in (*on_host.named_parameters(), *on_host.named_buffers())
    ]
    notes = {name: vars(parameter) for name, parameter in model.named_parameters()}
    assert notes == {name: vars(parameter) for name, parameter in on_host.named_parameters()}
    assert notes["decoder.layers.0.self_attention.linear_proj.weight"]["tensor_model_parallel"]
    assert notes["decoder.final_layernorm.weight"]["sequence_parallel"]


def test_norms_are_the_same_where_apex_is_installed(monkeypatch: pytest.MonkeyPatch, two_ranks: ParallelLayout) -> None:
    monkeypatch.setattr(gpt_layer_specs, "LNImpl", FusedLayerNorm)  # what megatron-core takes then
    model: Any = built(two_ranks, "Qwen2ForCausalLM", Head.TOKEN)
    assert type(model.decoder.final_layernorm) is torch.nn.RMSNorm
    assert model.decoder.final_layernorm.weight.sequence_parallel
