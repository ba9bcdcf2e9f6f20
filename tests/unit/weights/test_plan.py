from __future__ import annotations

import pytest

from megatron_rl.layout import ParallelLayout
from megatron_rl.weights.plan import holders, part_of, stage_of
from megatron_rl.weights.weight_map import Head, weight_map
from tests.unit.weights.models import dims

EMBEDDING = "embedding.word_embeddings.weight"
NORM_0, NORM_1 = (f"decoder.layers.{layer}.input_layernorm.weight" for layer in range(2))
QKV_0, QKV_1 = (f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in range(2))
FINAL, OUTPUT = "decoder.final_layernorm.weight", "output_layer.weight"


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
    entries = {entry.megatron: entry for entry in weight_map(sizes, Head.TOKEN).entries}
    name = "decoder.layers.1.mlp.experts.local_experts.{}.linear_fc1.weight"
    shared = ParallelLayout(tensor=2, data=2, pipeline=2, expert=2, expert_tensor=2, sequence_parallel=True)
    assert [holders(entries[name.format(expert)], shared, sizes) for expert in range(4)] == [
        (4, 5),
        (4, 5),
        (6, 7),
        (6, 7),
    ]
    assert [part_of(entries[name.format(0)], shared, rank) for rank in range(4)] == [(2, 0), (2, 1), (2, 0), (2, 1)]
    spread = ParallelLayout(tensor=2, data=2, expert=4, sequence_parallel=True)
    assert [holders(entries[name.format(expert)], spread, sizes) for expert in range(4)] == [(0,), (1,), (2,), (3,)]
    assert part_of(entries[name.format(0)], spread, 3) == (1, 0)
    assert holders(entries["decoder.layers.0.mlp.router.weight"], shared, sizes) == (0,)


def test_virtual_stages_take_turns() -> None:
    entries = {entry.megatron: entry for entry in weight_map(dims(num_hidden_layers=8), Head.TOKEN).entries}
    layout = ParallelLayout(pipeline=2, virtual_pipeline=2)
    stages = [stage_of(entries[f"decoder.layers.{layer}.input_layernorm.weight"], layout, 8) for layer in range(8)]
    assert stages == [0, 0, 1, 1, 0, 0, 1, 1]
    assert stage_of(entries[OUTPUT], layout, 8) == 1


def test_uneven_stages_and_layers_beyond_the_model_are_refused() -> None:
    entries = {entry.megatron: entry for entry in weight_map(dims(), Head.TOKEN).entries}
    with pytest.raises(ValueError, match="pipeline=2 x virtual_pipeline=1 must divide the model's 3 layers"):
        stage_of(entries[EMBEDDING], ParallelLayout(pipeline=2), 3)
    with pytest.raises(ValueError, match=r"the layer must be in \[0, 1\)"):
        stage_of(entries[QKV_1], ParallelLayout(), 1)
