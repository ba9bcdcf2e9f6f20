from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.layout import Coordinates, ParallelLayout, padded_vocabulary

sizes = st.integers(1, 4)
layouts = st.builds(ParallelLayout, tensor=sizes, pipeline=sizes, context=sizes, data=sizes)


def test_tensor_varies_fastest_then_context_then_data_and_pipeline_slowest():
    layout = ParallelLayout(tensor=2, context=2, data=2, pipeline=2)
    assert layout.world_size == 16
    assert [layout.coordinates(rank) for rank in (0, 1, 2, 4, 8, 15)] == [
        Coordinates(tensor=0, context=0, data=0, pipeline=0),
        Coordinates(tensor=1, context=0, data=0, pipeline=0),
        Coordinates(tensor=0, context=1, data=0, pipeline=0),
        Coordinates(tensor=0, context=0, data=1, pipeline=0),
        Coordinates(tensor=0, context=0, data=0, pipeline=1),
        Coordinates(tensor=1, context=1, data=1, pipeline=1),
    ]


@given(layouts)
def test_every_rank_has_its_own_place(layout):
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    assert [layout.rank_of(**vars(at)) for at in places] == list(range(layout.world_size))


@given(layouts)
def test_one_rank_per_replica_reports_the_model_output(layout):
    places = [layout.coordinates(rank) for rank in layout.reporting_ranks()]
    assert [at.data for at in places] == list(range(layout.data))
    assert {(at.tensor, at.context, at.pipeline) for at in places} == {(0, 0, layout.pipeline - 1)}


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_layout_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank must be in \[0, 4\), got {rank}"):
        ParallelLayout(tensor=2, data=2).coordinates(rank)


def test_problems_name_the_axis_and_the_size():
    assert ParallelLayout(tensor=2, pipeline=3, data=4, sequence_parallel=True).problems() == []
    assert ParallelLayout(tensor=0, data=-1).problems() == [
        "tensor must be at least 1, got 0",
        "data must be at least 1, got -1",
    ]
    assert ParallelLayout(sequence_parallel=True).problems() == ["sequence_parallel needs tensor > 1, got tensor=1"]
    assert ParallelLayout(virtual_pipeline=2).problems() == ["virtual_pipeline=2 needs pipeline > 1, got pipeline=1"]
    assert ParallelLayout(tensor=2, data=3, expert=4).problems() == [
        "expert x expert_tensor = 4 must divide tensor x context x data = 6",
        "expert > 1 together with tensor > 1 needs sequence_parallel=true",
    ]


def test_stages_of_their_own_size_share_the_layers_with_the_others():
    layout = ParallelLayout(pipeline=4, first_stage_layers=1, last_stage_layers=2)
    assert [layout.stage_of_layer(layer, 9) for layer in range(9)] == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert layout.layers_of_stage(1, 9) == (1, 2, 3)
    assert layout.layer_problems(9) == []
    assert layout.layer_problems(8) == [
        "first_stage_layers=1 and last_stage_layers=2 leave 5 of the model's 8 layers to the other 2 stages; must be a "
        "multiple of 2, at least 2"
    ]
    assert ParallelLayout(pipeline=2, last_stage_layers=3).layer_problems(3) == [
        "last_stage_layers=3 leave 0 of the model's 3 layers to the other 1 stages; must be a multiple of 1, at least 1"
    ]
    assert ParallelLayout(pipeline=2, first_stage_layers=1, last_stage_layers=2).layer_problems(4) == [
        "first_stage_layers=1 and last_stage_layers=2 leave 1 of the model's 4 layers to the other 0 stages; must be 0"
    ]
    assert ParallelLayout(pipeline=2, virtual_pipeline=2, first_stage_layers=2).layer_problems(5) == [
        "virtual_pipeline=2 does not divide the 3 layers of a stage; possible: [1, 3]"
    ]
    assert ParallelLayout(first_stage_layers=2, last_stage_layers=1).problems() == [
        "first_stage_layers=2 needs pipeline > 1, got pipeline=1",
        "last_stage_layers=1 needs pipeline > 1, got pipeline=1",
    ]
    assert ParallelLayout(pipeline=2, first_stage_layers=0).problems() == [
        "first_stage_layers must be at least 1, got 0"
    ]


def test_a_vocabulary_is_padded_only_where_tensor_ranks_do_not_divide_it():
    assert [padded_vocabulary(96, tensor) for tensor in (1, 2, 5)] == [96, 96, 640]
    assert [padded_vocabulary(129, tensor) for tensor in (1, 2, 3)] == [129, 256, 129]


def test_rows_are_padded_for_context_ranks_and_batches_for_sequence_parallelism_too():
    assert (ParallelLayout().row_multiple, ParallelLayout().batch_multiple) == (1, 1)
    shared = ParallelLayout(tensor=2, context=3, sequence_parallel=True)
    assert (shared.row_multiple, shared.batch_multiple) == (6, 12)


def test_the_short_form_names_every_axis():
    assert str(ParallelLayout(tensor=2, sequence_parallel=True, data=3)) == "TP2+SP PP1 DP3"
    whole = ParallelLayout(pipeline=2, virtual_pipeline=3, context=4, data=5, expert=2, expert_tensor=5)
    assert str(whole) == "TP1 PP2xVPP3 DP5 CP4 EP2 ETP5"
    assert str(ParallelLayout(pipeline=3, first_stage_layers=1)) == "TP1 PP3(1..) DP1"
    assert str(ParallelLayout(pipeline=3, first_stage_layers=1, last_stage_layers=2)) == "TP1 PP3(1..2) DP1"
