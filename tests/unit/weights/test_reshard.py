from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.weights.plan import holders
from megatron_rl.weights.reshard import shard_pieces, shard_shape
from megatron_rl.weights.shapes import full_shape
from megatron_rl.weights.weight_map import Head, Op, WeightEntry, WeightMap, weight_map
from tests.unit.weights.in_memory import legal_layouts, merge, models, split
from tests.unit.weights.models import dims


@settings(max_examples=100)
@given(weights=models(), data=st.data())
def test_merging_the_shards_gives_the_tensor(weights: WeightMap, data: Any) -> None:
    layout = data.draw(st.sampled_from(legal_layouts(weights.dims)))
    for entry in weights.entries:
        shape = full_shape(entry, weights.dims)
        full = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)
        ranks = len(holders(entry, layout, weights.dims))
        shards = [split(full, entry, weights.dims, ranks, rank) for rank in range(ranks)]
        assert torch.equal(merge(shards, entry, weights.dims), full)
        assert {tuple(shard.shape) for shard in shards} == {shard_shape(entry, weights.dims, ranks)}
        assert sum(int(shard.count_nonzero()) for shard in shards) == full.numel()  # the rest is padding


def entry_of(op: Op) -> WeightEntry:
    return next(entry for entry in weight_map(dims(), Head.TOKEN).entries if entry.op is op)


def test_each_rank_gets_its_part_of_the_gate_and_of_the_up_projection() -> None:
    full, sizes = torch.arange(8)[:, None], dims(intermediate_size=4, hidden_size=1)
    assert split(full, entry_of(Op.GATE_UP), sizes, 2, 1).flatten().tolist() == [2, 3, 6, 7]


def test_each_rank_gets_whole_query_groups() -> None:
    weights = weight_map(dims(hidden_size=1, head_dim=2), Head.TOKEN)
    entry = next(entry for entry in weights.entries if entry.op is Op.QKV)
    parts = [torch.arange(8.0)[:, None], torch.arange(10.0, 14.0)[:, None], torch.arange(20.0, 24.0)[:, None]]
    shard = split(weights.to_megatron(entry, parts), entry, weights.dims, 2, 1)
    assert shard.flatten().tolist() == [4, 5, 6, 7, 12, 13, 22, 23]


def test_the_last_ranks_of_a_vocabulary_hold_padding() -> None:
    embedding, sizes = weight_map(dims(), Head.TOKEN).entries[0], dims(vocab_size=131, hidden_size=1)
    full = torch.arange(1.0, 132.0)[:, None]
    shards = [split(full, embedding, sizes, 2, rank) for rank in range(2)]
    assert shards[0].flatten().tolist() == list(range(1, 129))
    assert shards[1].flatten().tolist() == [129, 130, 131] + [0] * 125
    assert torch.equal(merge(shards, embedding, sizes), full)
    assert split(full[:5], embedding, dims(vocab_size=5, hidden_size=1), 2, 1).tolist() == [[0.0]] * 128


def test_uneven_cuts_and_ranks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="must divide its 2 key/value heads or be a multiple of them, got 3"):
        shard_pieces(entry_of(Op.QKV), dims(), 3, 0)
    with pytest.raises(ValueError, match="5 tensor ranks must divide its 24 rows of each half"):
        shard_pieces(entry_of(Op.GATE_UP), dims(), 5, 0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        shard_pieces(entry_of(Op.QKV), dims(), 2, 2)


def test_a_tensor_without_a_shape_is_named() -> None:
    unknown = dataclasses.replace(entry_of(Op.QKV), megatron="decoder.layers.0.self_attention.linear_gate.weight")
    with pytest.raises(ValueError, match=r"shape of linear_gate\.weight must be in megatron_rl/weights/shapes\.py"):
        full_shape(unknown, dims())
