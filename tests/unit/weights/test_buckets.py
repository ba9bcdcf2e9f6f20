from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from megatron_rl.interfaces import PushReceipt
from megatron_rl.weights.buckets import Run, Tally, filled, streams
from megatron_rl.weights.plan import Region

SHAPE = (6, 4)
WHOLE = torch.arange(24, dtype=torch.int32).view(SHAPE)
NORM = torch.arange(5, dtype=torch.float32)


def region(dim: int, start: int, stop: int) -> Region:
    return Region(rank=None, name="w", shape=SHAPE, dim=dim, start=start, stop=stop)


COLUMNS = [region(1, 0, 3), region(1, 3, 4)]
"""Of two lanes."""


def put_together(buckets: list[list[Run]], lane: int) -> dict[str, Tensor]:
    """What a receiver of the lane makes of it."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for bucket in buckets:
        for run in bucket:
            if run.lane in (None, lane):
                for piece, content in zip(run.pieces, run.contents, strict=True):
                    assert piece.start == sum(map(len, found[piece.name]))
                    found[piece.name].append(content)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("bucket_bytes", [1, 7, 40, 1000])
def test_each_lane_gets_its_slice_and_what_all_get_in_buckets_that_are_full(bucket_bytes: int) -> None:
    regions = [*COLUMNS, region(1, 0, 0)]
    parts = [streams("w", WHOLE, regions), streams("norm", NORM, None), streams("empty", torch.zeros(0, 2), None)]
    buckets = list(filled(parts, bucket_bytes))
    sizes = [sum(run.size for run in bucket) for bucket in buckets]
    assert set(sizes[:-1]) <= {bucket_bytes}
    assert sum(sizes) == WHOLE.nbytes + NORM.nbytes
    for lane, there in enumerate(regions):
        got = put_together(buckets, lane)
        assert got["w"].view(torch.int32).tolist() == WHOLE[there.index].flatten().tolist()
        assert got["norm"].view(torch.float32).tolist() == NORM.tolist()
        assert got["empty"].tolist() == []


def test_slices_of_a_large_tensor_fill_buckets_side_by_side() -> None:
    buckets = list(filled([streams("w", WHOLE, [region(0, 0, 3), region(0, 3, 6)])], 24))
    assert [[(run.lane, run.size) for run in bucket] for bucket in buckets] == [[(0, 12), (1, 12)]] * 4


def receipts(regions: list[Region] | None, tensor: Tensor = WHOLE) -> list[PushReceipt]:
    tally = Tally()
    for bucket in filled([streams("w", tensor, regions), streams("norm", NORM, None)], 10):
        for run in bucket:
            for piece, content in zip(run.pieces, run.contents, strict=True):
                tally.copy(run.lane, piece, content, torch.empty_like(content))
    return [tally.receipt(7, lane) for lane in range(2)]


def test_a_receipt_counts_what_a_lane_was_sent() -> None:
    found = [(r.version, r.tensors, r.slices, r.size_bytes, r.tensor_bytes) for r in receipts(COLUMNS)]
    assert found == [(7, 2, 1, 72 + 20, 96 + 20), (7, 2, 1, 24 + 20, 96 + 20)]
    found = [(r.version, r.tensors, r.slices, r.size_bytes, r.tensor_bytes) for r in receipts(None)]
    assert found == [(7, 2, 0, 116, 116)] * 2


def test_a_digest_depends_on_the_lanes_own_content_alone_and_on_where_it_is_cut() -> None:
    first, second = (receipt.digest for receipt in receipts(COLUMNS))
    assert first != second
    changed = WHOLE.clone()
    changed[2, 3] = -1  # in the second lane's column
    assert receipts(COLUMNS, changed)[0].digest == first
    assert receipts(COLUMNS, changed)[1].digest != second
    zeros = torch.zeros_like(WHOLE)
    moved = [region(1, 0, 3), region(1, 2, 3)]
    assert receipts(COLUMNS, zeros)[1].digest != receipts(moved, zeros)[1].digest
