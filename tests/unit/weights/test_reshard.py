from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.reshard import merge, split
from megatron_rl.weights.weight_map import Head, Op, Split, WeightEntry, weight_map
from tests.unit.weights.models import dims


def full_shape(entry: WeightEntry, sizes: ModelDims) -> tuple[int, ...]:
    qkv = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    shapes = {
        "word_embeddings.weight": (sizes.vocabulary, sizes.hidden),
        "linear_qkv.weight": (qkv, sizes.hidden),
        "linear_qkv.bias": (qkv,),
        "linear_proj.weight": (sizes.hidden, sizes.heads * sizes.head_dim),
        "linear_fc1.weight": (2 * sizes.ffn_hidden, sizes.hidden),
        "linear_fc2.weight": (sizes.hidden, sizes.ffn_hidden),
        "output_layer.weight": (sizes.vocabulary, sizes.hidden),
    }
    return next((shape for name, shape in shapes.items() if entry.megatron.endswith(name)), (sizes.hidden,))


@given(
    size=st.integers(1, 4),
    groups=st.integers(1, 2),
    queries=st.integers(1, 3),
    head_dim=st.integers(1, 3),
    ffn=st.integers(1, 3),
    vocabulary=st.integers(1, 3),
    hidden=st.integers(1, 5),
)
def test_merging_the_shards_gives_the_tensor(
    size: int, groups: int, queries: int, head_dim: int, ffn: int, vocabulary: int, hidden: int
) -> None:
    sizes = dataclasses.replace(
        dims(),
        kv_heads=size * groups,
        heads=size * groups * queries,
        head_dim=head_dim,
        ffn_hidden=size * ffn,
        vocabulary=size * vocabulary,
        hidden=hidden,
    )
    for entry in weight_map(sizes, Head.TOKEN).entries:
        shape = full_shape(entry, sizes)
        full = torch.arange(torch.Size(shape).numel()).reshape(shape)
        ranks = 1 if entry.split is Split.NONE else size
        shards = [split(full, entry, sizes, size, rank) for rank in range(ranks)]
        assert torch.equal(merge(shards, entry, sizes), full)
        if entry.split is not Split.NONE:
            assert {shard.numel() for shard in shards} == {full.numel() // size}


def entry_of(op: Op) -> WeightEntry:
    return next(entry for entry in weight_map(dims(), Head.TOKEN).entries if entry.op is op)


def test_each_rank_gets_its_part_of_the_gate_and_of_the_up_projection() -> None:
    full = torch.arange(8)[:, None]
    assert split(full, entry_of(Op.GATE_UP), dims(), 2, 1).flatten().tolist() == [2, 3, 6, 7]


def test_each_rank_gets_whole_query_groups() -> None:
    weights = weight_map(dims(hidden_size=8), Head.TOKEN)
    entry = next(entry for entry in weights.entries if entry.op is Op.QKV)
    parts = [torch.arange(8.0)[:, None], torch.arange(10.0, 14.0)[:, None], torch.arange(20.0, 24.0)[:, None]]
    shard = split(weights.to_megatron(entry, parts), entry, weights.dims, 2, 1)
    assert shard.flatten().tolist() == [4, 5, 6, 7, 12, 13, 22, 23]


def test_uneven_cuts_and_ranks_that_do_not_exist_are_refused() -> None:
    full = torch.zeros(64, 16)
    with pytest.raises(ValueError, match="4 tensor ranks must divide its 2 key/value heads"):
        split(full, entry_of(Op.QKV), dims(), 4, 0)
    with pytest.raises(ValueError, match="5 tensor ranks must divide its 32 rows of each half"):
        split(full, entry_of(Op.GATE_UP), dims(), 5, 0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        split(full, entry_of(Op.QKV), dims(), 2, 2)
    with pytest.raises(ValueError, match=r"must come as shards of one shape, got 2"):
        merge([torch.zeros(2), torch.zeros(3)], entry_of(Op.QKV), dims())
    norm = next(entry for entry in weight_map(dims(), Head.TOKEN).entries if entry.split is Split.NONE)
    with pytest.raises(ValueError, match="must come as one tensor, got 2"):
        merge([torch.zeros(2), torch.zeros(2)], norm, dims())
