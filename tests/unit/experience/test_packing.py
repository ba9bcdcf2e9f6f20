from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batches import ExperienceBatch, MicroBatch, Minibatch, RolloutBatch, TokenRows
from megatron_rl.experience.packing import (
    context_positions,
    micro_batches,
    pack,
    pack_rows,
    plan_rows,
    split_rows,
    take_positions,
    unpack,
)
from megatron_rl.layout import ParallelLayout

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@given(LENGTHS, st.integers(1, 60))
def test_micro_batches_hold_every_row_once_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    parts = micro_batches(lengths, range(len(lengths)), budget)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in part) <= budget or len(part) == 1 for part in parts)


def test_micro_batches_put_like_lengths_together() -> None:
    assert micro_batches([2, 9, 3, 10], range(4), 12) == [[3], [1, 2], [0]]
    assert micro_batches([5, 5, 5], [2, 0], 10) == [[0, 2]]


@given(LENGTHS, st.integers(1, 5))
def test_split_rows_deals_every_row_once_and_leaves_no_part_empty(lengths: list[int], parts: int) -> None:
    dealt = split_rows(lengths, range(len(lengths)), parts)
    assert len(dealt) == parts
    assert sorted(row for part in dealt for row in part) == list(range(len(lengths)))
    assert all(dealt) or len(lengths) < parts
    totals = [sum(lengths[row] for row in part) for part in dealt]
    assert max(totals) - min(totals) <= max(lengths)


def _rows() -> TokenRows:
    return TokenRows(
        tokens=torch.tensor([[5, 6, 7, 8], [1, 2, 0, 0], [3, 4, 9, 0]]),
        lengths=torch.tensor([4, 2, 3]),
        response_mask=torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]]).bool(),
    )


def test_pack_rows_shifts_once() -> None:
    packed = pack_rows(_rows(), [2, 0])
    assert packed.inputs.tolist() == [3, 4, 5, 6, 7]
    assert packed.targets.tolist() == [4, 9, 6, 7, 8]
    assert packed.positions.tolist() == [0, 1, 0, 1, 2]
    assert packed.cu_seqlens.tolist() == [0, 2, 5]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_length == 3
    assert packed.loss_mask.tolist() == [True, True, False, True, True]
    assert packed.loss_weight.tolist() == [1, 1, 0, 1, 1]


def test_padding_is_a_last_row_outside_the_loss() -> None:
    packed = pack_rows(_rows(), [2, 0], multiple=4)
    assert packed.cu_seqlens.tolist() == [0, 2, 5, 8]
    assert packed.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert not packed.loss_mask[5:].any()
    assert packed.loss_weight[5:].tolist() == [0, 0, 0]


def test_unpack_aligns_values_with_the_tokens_they_speak_of() -> None:
    rows = _rows()
    packed = pack_rows(rows, [2, 0], multiple=4)
    back = unpack(packed.targets, rows.lengths[[2, 0]], 4)
    assert back.tolist() == [[0, 4, 9, 0], [0, 6, 7, 8]]


def test_a_row_of_one_token_takes_no_position() -> None:
    rows = TokenRows(
        tokens=torch.tensor([[5, 0], [6, 7]]), lengths=torch.tensor([1, 2]), response_mask=torch.zeros(2, 2).bool()
    )
    assert pack_rows(rows, [0, 1]).cu_seqlens.tolist() == [0, 0, 1]
    assert len(pack_rows(rows, [0], multiple=2).inputs) == 2
    assert unpack(torch.tensor([9.0, 9.0]), rows.lengths[:1], 2).tolist() == [[0, 0]]


def _experience(with_reference: bool) -> ExperienceBatch:
    rows = _rows()
    number = torch.arange(12.0).view(3, 4)
    rollouts = RolloutBatch(
        **vars(rows),
        rollout_logprobs=number + 100,
        sampled_mask=rows.response_mask,
        scores=torch.zeros(3),
        truncated=torch.zeros(3, dtype=torch.bool),
        group=torch.zeros(3, dtype=torch.int64),
        policy_version=0,
    )
    return ExperienceBatch(
        rollouts=rollouts,
        old_logprobs=number + 200,
        ref_logprobs=number + 300 if with_reference else None,
        values=number + 400,
        rewards=number,
        advantages=number + 500,
        returns=number + 600,
    )


@pytest.mark.parametrize("with_reference", [True, False])
def test_pack_takes_the_experience_of_each_target(with_reference: bool) -> None:
    weight = torch.arange(8.0).view(2, 4)
    minibatch = Minibatch(source=_experience(with_reference), rows=torch.tensor([2, 0]), loss_weight=weight)
    packed = pack(minibatch, [1, 0], multiple=2)  # row 0 of the batch, then row 2
    assert isinstance(packed, MicroBatch)
    assert packed.targets.tolist() == [6, 7, 8, 4, 9, 0]
    assert packed.loss_weight.tolist() == [0, 6, 7, 1, 2, 0]
    assert packed.old_logprobs.tolist() == [0, 202, 203, 209, 210, 0]
    assert packed.rollout_logprobs.tolist() == [0, 102, 103, 109, 110, 0]
    assert packed.values.tolist() == [0, 402, 403, 409, 410, 0]
    assert packed.advantages.tolist() == [0, 502, 503, 509, 510, 0]
    assert packed.returns.tolist() == [0, 602, 603, 609, 610, 0]
    if with_reference:
        assert packed.ref_logprobs is not None
        assert packed.ref_logprobs.tolist() == [0, 302, 303, 309, 310, 0]
    else:
        assert packed.ref_logprobs is None


def test_pack_of_token_rows_carries_tokens_alone() -> None:
    minibatch = Minibatch(source=_rows(), rows=torch.tensor([1]), loss_weight=torch.full((1, 4), 0.5))
    packed = pack(minibatch, [0])
    assert not isinstance(packed, MicroBatch)
    assert packed.loss_weight.tolist() == [0.5]


def test_rows_are_padded_each_for_context_ranks() -> None:
    packed = pack_rows(_rows(), [2, 0, 1], multiple=8, row_multiple=4)
    # rows of 2, 3 and 1 positions take 4 each, and a last row of 4 fills the batch up to a multiple of 8
    assert packed.cu_seqlens.tolist() == [0, 4, 8, 12, 16]
    assert packed.inputs.tolist() == [3, 4, 0, 0, 5, 6, 7, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert packed.positions.tolist() == [0, 1, 2, 3] * 4
    assert packed.loss_mask.nonzero().flatten().tolist() == [0, 1, 5, 6, 8]
    back = unpack(packed.targets, torch.tensor([3, 4, 2]), 4, row_multiple=4)
    assert back.tolist() == [[0, 4, 9, 0], [0, 6, 7, 8], [0, 2, 0, 0]]


def test_context_ranks_hold_an_early_and_a_late_piece_of_each_row() -> None:
    bounds = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert context_positions(bounds, 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert context_positions(bounds, 2, 1).tolist() == [1, 2, 6, 7, 8, 9]
    assert context_positions(bounds, 1, 0).tolist() == list(range(12))
    with pytest.raises(ValueError, match="4 context ranks need rows padded to a multiple of 8"):
        context_positions(bounds, 4, 0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 4))
def test_context_ranks_hold_every_position_once(pieces: list[int], size: int) -> None:
    bounds = torch.tensor([0, *pieces]).cumsum(0) * 2 * size
    held = [context_positions(bounds, size, rank) for rank in range(size)]
    assert torch.cat(held).sort().values.tolist() == list(range(int(bounds[-1])))
    assert len({len(each) for each in held}) == 1


def test_positions_are_taken_from_every_tensor_but_the_bounds() -> None:
    packed = pack_rows(_rows(), [0])
    some = take_positions(packed, torch.tensor([2, 0]))
    assert some.inputs.tolist() == [7, 5]
    assert some.loss_mask.tolist() == [True, False]
    assert some.cu_seqlens.tolist() == packed.cu_seqlens.tolist()


def test_replicas_get_rows_of_like_cost_and_count_their_padding() -> None:
    lengths = [9, 5, 5, 5]
    plan = plan_rows(
        lengths, [length**2 for length in lengths], ParallelLayout(data=2, context=2), budget=4, multiple=4
    )
    assert plan.parts == (((0,),), ((1,), (2,), (3,)))
    assert plan.imbalance == pytest.approx(81 / 78 - 1)
    assert plan.padding == 0
    assert plan_rows([4, 2], [1, 1], ParallelLayout(context=2), budget=100, multiple=4).padding == pytest.approx(
        1 - 4 / 8
    )


def test_micro_batches_without_rows_keep_ranks_in_step() -> None:
    interleaved = ParallelLayout(pipeline=2, virtual_pipeline=2)
    assert plan_rows([9, 9, 9], [1.0] * 3, interleaved, budget=9, multiple=1).parts == (((0,), (1,), (2,), ()),)
    experts = plan_rows([9, 9, 9], [1.0] * 3, ParallelLayout(data=2, expert=2), budget=9, multiple=1)
    assert experts.parts == (((0,), (2,)), ((1,), ()))
    fewer = plan_rows([9], [1.0], ParallelLayout(data=2, pipeline=2, virtual_pipeline=2), budget=9, multiple=1)
    assert fewer.parts == (((0,), ()), ((), ()))
    assert plan_rows([9], [1.0], ParallelLayout(data=2), budget=9, multiple=1).parts == (((0,),), ((),))
    assert plan_rows([9, 9, 9], [1.0] * 3, ParallelLayout(data=2), budget=9, multiple=1).parts == (
        ((0,), (2,)),
        ((1,),),
    )
