"""Models on paper: random small sizes and layouts, and plans executed on a dictionary instead of ranks and files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.families import FAMILIES
from megatron_rl.weights.plan import HfFiles, TransferPlan, transfer_plan
from megatron_rl.weights.reshard import cut_dim, shard_pieces, shard_shape
from megatron_rl.weights.shapes import full_shape
from megatron_rl.weights.weight_map import Head, Op, WeightEntry, WeightMap, weight_map
from tests.unit.weights.models import dims

Held = dict[tuple[int | None, str], Tensor]
"""Tensors by rank (None: in the files) and name; of copies the first."""


def execute(plan: TransferPlan, given: Held) -> Held:
    """Every region of every target tensor is written once, or is padding."""
    made: Held = {}
    for tensor in plan.tensors:
        for region in (*(move.target for move in tensor.moves), *tensor.padding):
            made.setdefault((region.rank, region.name), torch.full(region.shape, torch.nan))
        for move in tensor.moves:
            source, target = given[move.source.rank, move.source.name], made[move.target.rank, move.target.name]
            assert tuple(source.shape) == move.source.shape
            assert target[move.target.index].isnan().all(), f"{move.target} is written twice"
            target[move.target.index] = source[move.source.index]
        for region in tensor.padding:
            assert made[region.rank, region.name][region.index].isnan().all(), f"{region} is no padding"
            made[region.rank, region.name][region.index] = 0
    for place, tensor in made.items():
        assert not tensor.isnan().any(), f"a part of {place} is not written"
    return made


def split(full: Tensor, entry: WeightEntry, dims: ModelDims, size: int, rank: int) -> Tensor:
    """The shard of one of ``size`` ranks, cut off the whole tensor in Megatron's form; padding is zero."""
    dim = cut_dim(entry)
    shard = full.new_zeros(shard_shape(entry, dims, size))
    for piece in shard_pieces(entry, dims, size, rank):
        shard.narrow(dim, piece.part, piece.length).copy_(full.narrow(dim, piece.whole, piece.length))
    return shard


def merge(shards: Sequence[Tensor], entry: WeightEntry, dims: ModelDims) -> Tensor:
    """The whole tensor without padding, from the shards of all ranks."""
    full, dim = shards[0].new_empty(full_shape(entry, dims)), cut_dim(entry)
    for rank, shard in enumerate(shards):
        for piece in shard_pieces(entry, dims, len(shards), rank):
            full.narrow(dim, piece.whole, piece.length).copy_(shard.narrow(dim, piece.part, piece.length))
    return full


def fused(entry: WeightEntry, dims: ModelDims, parts: Sequence[Tensor]) -> Tensor:
    """Megatron's tensor as megatron-core describes it: query groups, each with its key and value, or gate over up."""
    if entry.op is Op.COPY:
        return parts[0]
    if entry.op is Op.GATE_UP:
        return torch.cat(tuple(parts))
    grouped = [part.reshape(dims.kv_heads, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def files_of(weights: WeightMap) -> Held:
    """Distinct numbers in every Hugging Face tensor of the model."""
    made: Held = {}
    first = 1
    for move in transfer_plan(weights, HfFiles(), ParallelLayout()).moves:
        source = move.source
        if (None, source.name) not in made:
            size = torch.Size(source.shape).numel()
            made[None, source.name] = torch.arange(first, first + size, dtype=torch.float32).view(source.shape)
            first += size
    return made


def legal_layouts(sizes: ModelDims) -> list[ParallelLayout]:
    """All that fit, up to 4 tensor ranks, 3 stages and 2 replicas."""
    axes: dict[str, tuple[Any, ...]] = {
        "tensor": (1, 2, 4),
        "pipeline": (1, 2, 3),
        "virtual_pipeline": (1, 2),
        "first_stage_layers": (None, 1, 2),
        "last_stage_layers": (None, 1, 2),
        "data": (1, 2),
        "expert": (1, 2) if sizes.experts else (1,),
        "expert_tensor": (1, 2) if sizes.experts else (1,),
    }
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        layout = ParallelLayout(**chosen, sequence_parallel=chosen["tensor"] > 1)
        if not sizes.layout_problems(layout):
            found.append(layout)
    return found


@st.composite
def models(draw: st.DrawFn) -> WeightMap:
    """A family with random sizes, tied or not, policy or critic."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    architecture = draw(st.sampled_from(sorted(FAMILIES)))
    latent = architecture.startswith("Deepseek")
    chosen = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1}
    groups, per_group = draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((1, 2)))
    layers = number(1, 6)
    return weight_map(
        dims(
            architecture,
            num_hidden_layers=layers,
            hidden_size=number(1, 5),
            intermediate_size=4 * number(1, 2),
            num_attention_heads=groups * per_group,
            num_key_value_heads=groups * per_group if latent else groups,
            head_dim=number(1, 3),
            vocab_size=number(1, 9) if draw(st.booleans()) else number(126, 132),
            tie_word_embeddings=draw(st.booleans()),
            num_experts=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=2 * number(1, 2),
            shared_expert_intermediate_size=4 * number(0, 1),
            n_shared_experts=2 * number(0, 1),
            first_k_dense_replace=number(0, layers),
            attention_bias=architecture.startswith("Llama") and draw(st.booleans()),
            mlp_bias=architecture.startswith("Llama") and draw(st.booleans()),
            mlp_only_layers=sorted(draw(st.sets(st.integers(0, layers - 1)))),
            **({"kv_lora_rank": number(1, 3), "q_lora_rank": draw(st.sampled_from((None, 1, 3)))} if latent else {}),
            qk_nope_head_dim=number(1, 3),
            qk_rope_head_dim=number(1, 2),
            v_head_dim=number(1, 3),
            **(chosen if architecture.startswith("DeepseekV3") else {}),
        ),
        draw(st.sampled_from(Head)),
    )
