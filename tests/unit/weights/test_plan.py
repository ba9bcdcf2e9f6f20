from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.layout import ParallelLayout
from megatron_rl.weights.families import FAMILIES
from megatron_rl.weights.plan import (
    HfFiles,
    Shard,
    TransferPlan,
    holders,
    shards_on,
    stage_of,
    transfer_plan,
)
from megatron_rl.weights.rules import Split
from megatron_rl.weights.shapes import is_float32
from megatron_rl.weights.weight_map import Head, WeightMap, weight_map
from tests.unit.weights.in_memory import Held, execute, files_of, fused, legal_layouts, models, split
from tests.unit.weights.models import EXTRA, dims, hf_tensors

EMBEDDING = "embedding.word_embeddings.weight"
NORM_0, NORM_1 = (f"decoder.layers.{layer}.input_layernorm.weight" for layer in range(2))
QKV_0, QKV_1 = (f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in range(2))
FINAL, OUTPUT = "decoder.final_layernorm.weight", "output_layer.weight"
FILES = HfFiles()


def same(mine: Held, theirs: Held) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[place], theirs[place]) for place in mine)


def size_bytes(weights: WeightMap, files: Held, element_bytes: int) -> int:
    wide = {name for entry in weights.entries if is_float32(entry) for name in entry.hf}
    return sum(tensor.numel() * (4 if name in wide else element_bytes) for (_, name), tensor in files.items())


@settings(max_examples=150, deadline=None)
@given(weights=models(), data=st.data())
def test_any_layout_gets_each_byte_of_the_files_once_and_gives_it_back(weights: WeightMap, data: Any) -> None:
    layouts = st.sampled_from(legal_layouts(weights.dims))
    first, second = data.draw(layouts), data.draw(layouts)
    files = files_of(weights)
    size = size_bytes(weights, files, 2)

    def carried(plan: TransferPlan, given: Held) -> Held:
        assert sum(plan.bytes_by_pair().values()) == size
        return execute(plan, given)  # which sees that each element is written once and the rest is padding

    on_first = carried(transfer_plan(weights, FILES, first), files)
    on_second = carried(transfer_plan(weights, first, second), on_first)
    assert same(carried(transfer_plan(weights, second, first), on_second), on_first)
    assert same(on_second, execute(transfer_plan(weights, FILES, second), files))
    assert same(carried(transfer_plan(weights, second, FILES), on_second), files)


@settings(max_examples=50, deadline=None)
@given(weights=models(), data=st.data())
def test_a_planned_shard_is_the_shard_of_the_fused_tensor(weights: WeightMap, data: Any) -> None:
    layout = data.draw(st.sampled_from(legal_layouts(weights.dims)))
    files = files_of(weights)
    shards = execute(transfer_plan(weights, FILES, layout), files)
    for entry in weights.entries:
        full = fused(entry, weights.dims, [files[None, name] for name in entry.hf])
        ranks = holders(entry, layout, weights.dims)
        for part, rank in enumerate(ranks):
            expected = split(full, entry, weights.dims, len(ranks), part)
            assert torch.equal(shards.pop((rank, entry.megatron)), expected)
    assert not shards


@settings(max_examples=50, deadline=None)
@given(weights=models(), data=st.data())
def test_every_first_holder_has_its_shard_and_every_copy_has_one(weights: WeightMap, data: Any) -> None:
    layout = data.draw(st.sampled_from(legal_layouts(weights.dims)))
    here = [shards_on(weights, layout, rank) for rank in range(layout.world_size)]
    named = {Shard(rank, e.megatron) for e in weights.entries for rank in holders(e, layout, weights.dims)}
    assert {shard for shards in here for shard in shards.values()} == named
    for shard in named:
        assert here[shard.rank][shard.name] == shard
    # as many copies of each as there are replicas, and tensor ranks that hold it whole
    for entry in weights.entries:
        shared = 1 if entry.split is Split.NONE else layout.tensor
        expected = layout.tensor * layout.context * layout.data // shared
        if entry.expert is None:
            for rank in holders(entry, layout, weights.dims):
                wanted = Shard(rank, entry.megatron)
                assert sum(shards.get(entry.megatron) == wanted for shards in here) == expected


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("head", "kind"), [(Head.TOKEN, "CausalLM"), (Head.VALUE, "TokenClassification")], ids=["token", "value"]
)
@pytest.mark.parametrize("family", [architecture.removesuffix("ForCausalLM") for architecture in FAMILIES])
def test_planned_shapes_are_those_of_transformers(family: str, head: Head, kind: str, tied: bool) -> None:
    if not hasattr(transformers, f"{family}For{kind}"):
        pytest.skip(f"transformers has no {family}For{kind}")
    weights = weight_map(dims(f"{family}ForCausalLM", tie_word_embeddings=tied, **EXTRA.get(family, {})), head)
    sources = [move.source for move in transfer_plan(weights, FILES, ParallelLayout()).moves]
    saved = hf_tensors(family, kind, tied)
    assert {source.name: source.shape for source in sources} == {name: tuple(saved[name].shape) for name in saved}


def test_the_moves_of_fused_tensors_by_hand() -> None:
    # 2 query groups of 2 heads, each 4 wide: 8 rows of queries, 4 of keys, 4 of values; 24 rows of gate and of up
    weights = weight_map(dims(num_hidden_layers=1), Head.TOKEN)
    plan = transfer_plan(weights, FILES, ParallelLayout(tensor=2))
    moves = {tensor.entry.megatron: tensor.moves for tensor in plan.tensors}

    def rows(name: str, rank: int) -> list[tuple[str, slice, slice]]:
        found = [(move.source, move.target) for move in moves[name] if move.target.rank == rank]
        return [(source.name.split(".")[-2], source.index[0], target.index[0]) for source, target in found]

    assert rows(QKV_0, 1) == [
        ("q_proj", slice(8, 16), slice(0, 8)),
        ("k_proj", slice(4, 8), slice(8, 12)),
        ("v_proj", slice(4, 8), slice(12, 16)),
    ]
    assert rows("decoder.layers.0.mlp.linear_fc1.weight", 1) == [
        ("gate_proj", slice(12, 24), slice(0, 12)),
        ("up_proj", slice(12, 24), slice(12, 24)),
    ]
    [_, columns] = moves["decoder.layers.0.mlp.linear_fc2.weight"]
    assert (columns.source.index, columns.target.index) == (
        (slice(None), slice(12, 24)),
        (slice(None), slice(0, 12)),
    )
    assert (columns.source.shape, columns.target.shape, columns.size_bytes) == ((16, 24), (16, 12), 2 * 16 * 12)


def test_tensor_ranks_beyond_the_key_value_heads_share_the_rows_of_a_group() -> None:
    # one group of 2 heads, 4 wide: rows 0 to 8 are queries, then 4 of keys and 4 of values; 4 ranks hold 4 rows each
    weights = weight_map(dims(num_attention_heads=4, num_key_value_heads=1, head_dim=2), Head.TOKEN)
    plan = transfer_plan(weights, FILES, ParallelLayout(tensor=4))
    moves = next(tensor.moves for tensor in plan.tensors if tensor.entry.megatron == QKV_0)
    found = [(move.target.rank, move.source.name.split(".")[-2], move.source.start, move.source.stop) for move in moves]
    assert found == [
        (0, "q_proj", 0, 3),
        (1, "q_proj", 3, 6),
        (2, "q_proj", 6, 8),
        (2, "k_proj", 0, 1),
        (3, "k_proj", 1, 2),
        (3, "v_proj", 0, 2),
    ]


def test_padding_of_the_vocabulary_is_never_moved() -> None:
    weights = weight_map(dims(vocab_size=131, num_hidden_layers=1), Head.TOKEN)
    layout = ParallelLayout(tensor=2)  # 2 x 128 rows: 128 and 3 tokens
    for plan in (transfer_plan(weights, FILES, layout), transfer_plan(weights, ParallelLayout(), layout)):
        [embedding] = [tensor for tensor in plan.tensors if tensor.entry.megatron == EMBEDDING]
        assert [(m.target.rank, m.target.start, m.target.stop) for m in embedding.moves] == [(0, 0, 128), (1, 0, 3)]
        [padding] = embedding.padding
        assert (padding.rank, padding.shape, padding.start, padding.stop) == (1, (128, 16), 3, 128)
    [back] = [tensor for tensor in transfer_plan(weights, layout, FILES).tensors if tensor.entry.megatron == OUTPUT]
    assert [(m.source.rank, m.source.start, m.source.stop) for m in back.moves] == [(0, 0, 128), (1, 0, 3)]
    assert (back.padding, back.moves[0].target.shape) == ((), (131, 16))


def test_a_plan_counts_bytes_by_pair_of_ranks() -> None:
    weights = weight_map(dims("LlamaForCausalLM", num_hidden_layers=2), Head.VALUE)
    # a layer: 2 norms of 16, 32 + 16 rows of qkv and projection, 3 x 24 of gate, up, down, all 16 wide
    layer, norm, embedding, head = 2 * 16 + (32 + 16 + 72) * 16, 16, 32 * 16, 16 + 1
    plan = transfer_plan(weights, ParallelLayout(), ParallelLayout(pipeline=2), element_bytes=2)
    assert plan.bytes_by_pair() == {(0, 0): 2 * (embedding + layer), (0, 1): 2 * (layer + norm + head)}
    plan = transfer_plan(weights, FILES, ParallelLayout(pipeline=2), element_bytes=4)
    assert plan.bytes_by_pair() == {(None, 0): 4 * (embedding + layer), (None, 1): 4 * (layer + norm + head)}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({}, {EMBEDDING: (0,), NORM_1: (0,), QKV_1: (0,), FINAL: (0,), OUTPUT: (0,)}),
        ({"tensor": 2}, {EMBEDDING: (0, 1), NORM_1: (0,), QKV_1: (0, 1), FINAL: (0,), OUTPUT: (0, 1)}),
        (
            {"pipeline": 2},
            {EMBEDDING: (0,), NORM_0: (0,), QKV_0: (0,), NORM_1: (1,), QKV_1: (1,), FINAL: (1,), OUTPUT: (1,)},
        ),
        (
            {"tensor": 2, "pipeline": 2},
            {EMBEDDING: (0, 1), NORM_0: (0,), QKV_0: (0, 1), NORM_1: (2,), QKV_1: (2, 3), FINAL: (2,), OUTPUT: (2, 3)},
        ),
        # tensor varies fastest, then data, pipeline slowest: stage 1 of replica 0 starts at rank 4
        (
            {"tensor": 2, "pipeline": 2, "data": 2},
            {EMBEDDING: (0, 1), NORM_0: (0,), QKV_1: (4, 5), FINAL: (4,), OUTPUT: (4, 5)},
        ),
    ],
    ids=["one rank", "TP2", "PP2", "TP2 PP2", "TP2 PP2 DP2"],
)
def test_holders_are_the_ranks_of_replica_0_in_tensor_order(
    layout: dict[str, int], expected: dict[str, tuple[int, ...]]
) -> None:
    entries = {entry.megatron: entry for entry in weight_map(dims(), Head.TOKEN).entries}
    assert {name: holders(entries[name], ParallelLayout(**layout), dims()) for name in expected} == expected


def test_a_value_head_is_whole_on_every_tensor_rank() -> None:
    entries = {entry.megatron: entry for entry in weight_map(dims(), Head.VALUE).entries}
    assert holders(entries[OUTPUT], ParallelLayout(tensor=2, pipeline=2), dims()) == (2,)


def test_experts_lie_on_the_ranks_of_their_group() -> None:
    sizes = dims("Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    weights = weight_map(sizes, Head.TOKEN)
    entries = {entry.megatron: entry for entry in weights.entries}
    name = "decoder.layers.1.mlp.experts.local_experts.{}.linear_fc1.weight"
    shared = ParallelLayout(tensor=2, data=2, pipeline=2, expert=2, expert_tensor=2, sequence_parallel=True)
    assert [holders(entries[name.format(expert)], shared, sizes) for expert in range(4)] == [
        (4, 5),
        (4, 5),
        (6, 7),
        (6, 7),
    ]
    spread = ParallelLayout(tensor=2, data=2, expert=4, sequence_parallel=True)
    assert [holders(entries[name.format(expert)], spread, sizes) for expert in range(4)] == [(0,), (1,), (2,), (3,)]
    assert holders(entries["decoder.layers.0.mlp.router.weight"], shared, sizes) == (0,)
    here = shards_on(weights, spread, 3)
    assert [expert for expert in range(4) if name.format(expert) in here] == [3]
    assert here["decoder.layers.1.mlp.router.weight"] == Shard(0, "decoder.layers.1.mlp.router.weight")


def test_copies_name_the_first_holder_of_their_shard() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=2)
    tied = weight_map(dims(tie_word_embeddings=True), Head.TOKEN)
    on_last = shards_on(tied, layout, 7)  # tensor rank 1 of the second replica's second stage
    assert (on_last[QKV_1], on_last[NORM_1]) == (Shard(5, QKV_1), Shard(4, NORM_1))
    assert on_last[OUTPUT] == Shard(1, EMBEDDING)  # the tied embedding once more
    assert EMBEDDING not in on_last
    assert QKV_0 not in on_last
    assert shards_on(tied, layout, 2).keys() == shards_on(tied, layout, 0).keys()
    assert OUTPUT not in shards_on(tied, layout, 2)
    assert OUTPUT not in shards_on(tied, ParallelLayout(tensor=2), 1)


def stages(layout: ParallelLayout, layers: int) -> list[int]:
    weights = weight_map(dims(num_hidden_layers=layers), Head.TOKEN)
    entries = {entry.megatron: entry for entry in weights.entries}
    assert stage_of(entries[EMBEDDING], layout, layers) == 0
    assert stage_of(entries[OUTPUT], layout, layers) == layout.pipeline - 1
    names = [f"decoder.layers.{layer}.input_layernorm.weight" for layer in range(layers)]
    return [stage_of(entries[name], layout, layers) for name in names]


def test_virtual_stages_take_turns() -> None:
    assert stages(ParallelLayout(pipeline=2, virtual_pipeline=2), 8) == [0, 0, 1, 1, 0, 0, 1, 1]


def test_the_first_and_the_last_stage_may_have_fewer_layers() -> None:
    assert stages(ParallelLayout(pipeline=2, first_stage_layers=1), 4) == [0, 1, 1, 1]
    assert stages(ParallelLayout(pipeline=3, last_stage_layers=1), 5) == [0, 0, 1, 1, 2]
    uneven = ParallelLayout(pipeline=3, virtual_pipeline=2, first_stage_layers=2, last_stage_layers=2)
    assert stages(uneven, 8) == [0, 1, 1, 2, 0, 1, 1, 2]


def test_uneven_stages_and_layers_beyond_the_model_are_refused() -> None:
    entries = {entry.megatron: entry for entry in weight_map(dims(), Head.TOKEN).entries}
    with pytest.raises(ValueError, match="pipeline=2 does not divide the model's 3 layers"):
        stage_of(entries[QKV_1], ParallelLayout(pipeline=2), 3)
    with pytest.raises(ValueError, match=r"the layer must be in \[0, 1\), got 1"):
        stage_of(entries[QKV_1], ParallelLayout(), 1)
