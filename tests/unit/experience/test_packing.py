from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batches import ExperienceBatch, MicroBatch, Minibatch, RolloutBatch, TokenRows
from megatron_rl.experience.packing import micro_batches, pack, pack_rows, split_rows, unpack

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
        truncated=torch.zeros(3).bool(),
        scores=torch.zeros(3),
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
