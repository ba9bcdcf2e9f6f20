from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_rl.weights.plan import Region
from megatron_rl.weights.slices import Kept, Reads, Slicing, Window

WHOLE = torch.arange(24.0).view(6, 4)


def region(dim: int, start: int, stop: int, shape: tuple[int, ...] = (6, 4), name: str = "w") -> Region:
    return Region(rank=None, name=name, shape=shape, dim=dim, start=start, stop=stop)


def kept_by(reader: Callable[[Tensor], object], whole: Tensor = WHOLE) -> Kept:
    reads = Reads()
    reader(reads.watch("w", whole))
    return reads.kept()["w"]


@pytest.mark.parametrize(
    ("reader", "found"),
    [
        (lambda w: w.narrow(0, 2, 3), region(0, 2, 5)),
        (lambda w: w[:, 1:3], region(1, 1, 3)),
        (lambda w: w[2:], region(0, 2, 6)),
        (lambda w: w[:, -1:], region(1, 3, 4)),
        (lambda w: w[1:3][:, :2], region(0, 1, 3)),  # what is cut out of a cut is not told apart
        (lambda w: (w[1:2], w[4:5]), region(0, 1, 5)),
        (lambda w: w.to(torch.bfloat16).contiguous().narrow(0, 2, 3), region(0, 2, 5)),
        (lambda w: w.data.detach()[2:3], region(0, 2, 3)),
        (lambda w: w.narrow(0, 6, 0), region(0, 6, 6)),
        (lambda w: [expert[:, 1:2] for expert in w.unsqueeze(0).unbind()], region(1, 1, 2)),
        (lambda w: w.shape, region(0, 0, 0)),
        (lambda w: torch.empty(6, 4).copy_(w[0:6]), region(0, 0, 6)),
        (lambda w: torch.empty(6, 4, device="meta").copy_(w), region(0, 0, 6)),
    ],
)
def test_what_is_cut_out_of_a_tensor_is_noted(reader: Callable[[Tensor], object], found: Region) -> None:
    assert kept_by(reader) == Kept(region=found)


@pytest.mark.parametrize(
    ("reader", "by"),
    [
        (lambda w: w.t(), "aten.t.default"),
        (lambda w: torch.cat([w, w]), "aten.cat.default"),
        (lambda w: w.unsqueeze(0)[:, 1:2], "aten.slice.Tensor"),
        (lambda w: w.unsqueeze(1).unbind(), "aten.unsqueeze.default"),
        (lambda w: w[::2], "a cut with steps"),
        (lambda w: (w[1:2], w[:, 1:2]), "cuts along several dims"),
        (lambda w: (w[1:2], w.sum()), "aten.sum.default"),
    ],
)
def test_a_tensor_that_is_read_in_any_other_way_is_kept_whole_and_it_is_said_why(
    reader: Callable[[Tensor], object], by: str
) -> None:
    assert kept_by(reader) == Kept(region=region(0, 0, 6), by=by)


def test_a_watched_tensor_gives_what_it_would_have_given() -> None:
    watched = Reads().watch("w", WHOLE)
    assert torch.equal(watched.t(), WHOLE.t())
    assert torch.equal(watched.unsqueeze(0) + 0, WHOLE[None])
    assert torch.equal(watched.unsqueeze(0).unbind()[0][1:3], WHOLE[1:3])
    assert torch.equal(watched[1:5:2], WHOLE[1:5:2])
    assert torch.equal(watched[2:4], WHOLE[2:4])
    assert torch.equal(torch.empty(6, 4).copy_(watched), WHOLE)
    assert torch.equal(watched.half()[:, 3:], WHOLE.half()[:, 3:])


@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 2, 5), (1, 1, 3), (0, 0, 3)])
def test_a_window_gives_what_the_whole_tensor_would(dim: int, start: int, stop: int) -> None:
    there = region(dim, start, stop)
    window = Window(there, WHOLE[there.index].clone())
    assert (window.shape, window.dtype, window.numel()) == (WHOLE.shape, WHOLE.dtype, 24)
    for first in range(start, stop + 1):
        for behind in range(first, stop + 1):
            cut = window.narrow(dim, first, behind - first)
            assert torch.equal(cut, WHOLE.narrow(dim, first, behind - first))
    assert torch.equal(window.to(torch.bfloat16).narrow(dim, start, 1), WHOLE.bfloat16().narrow(dim, start, 1))


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        (lambda w: w[1:4], "w: the engine asks for indices 1 to 4 of dim 0, of the tensor it was sent 2 to 5 of dim 0"),
        (lambda w: w[4:6], "asks for indices 4 to 6 of dim 0"),
        (lambda w: w[:, 0:2], "asks for indices 0 to 2 of dim 1"),
        (
            lambda w: torch.empty(6, 4).copy_(w),
            r"w: the engine reads the whole tensor \(a copy\), it was sent .* 2 to 5",
        ),
        (lambda w: w.t(), r"reads the whole tensor \(aten.t.default\)"),
        (lambda w: w[2:5:2], r"reads the whole tensor \(a cut with steps\)"),
    ],
)
def test_reading_what_is_not_there_is_refused_by_name(reader: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader(Window(region(0, 2, 5), WHOLE[2:5]))


def test_what_is_kept_travels_as_plain_data() -> None:
    for kept in (Kept(region=region(1, 0, 2)), Kept(region=region(0, 0, 6), by="aten.t.default")):
        assert Kept.from_json(kept.to_json()) == kept


def rows(start: int, stop: int) -> dict[str, Kept]:
    return {"w": Kept(region=region(0, start, stop))}


def test_slices_are_sent_once_all_workers_have_told_and_those_of_a_lane_agree() -> None:
    slicing = Slicing([range(1, 5, 2), range(2, 5, 2)])  # two engines of two workers
    slicing.learn(1, rows(0, 3))
    slicing.learn(2, rows(3, 6))
    slicing.learn(3, rows(0, 3))
    assert slicing.regions("w", WHOLE) is None
    slicing.learn(4, rows(2, 6))
    assert slicing.regions("w", WHOLE) is None
    slicing.learn(4, rows(3, 6))
    assert slicing.regions("w", WHOLE) == [region(0, 0, 3), region(0, 3, 6)]
    assert slicing.regions("w", torch.zeros(6, 5)) is None, "a tensor of another shape"
    assert slicing.regions("other", WHOLE) is None


def test_what_all_keep_whole_goes_to_all_and_what_one_keeps_whole_to_that_one() -> None:
    slicing = Slicing([[1], [2]])
    slicing.learn(1, rows(0, 6))
    slicing.learn(2, rows(0, 6))
    assert slicing.regions("w", WHOLE) is None
    slicing.learn(2, rows(0, 0))
    assert slicing.regions("w", WHOLE) == [region(0, 0, 6), region(0, 0, 0)]


def test_the_plan_counts_tensors_and_bytes_and_says_why_some_are_whole() -> None:
    slicing = Slicing([[1], [2]])
    for rank, (start, stop) in ((1, (0, 4)), (2, (4, 6))):
        turned = {
            name: Kept(region=region(0, 0, 3, (3,), name), by=f"aten.{name[:-1]}.default")
            for name in ("t1", "t2", "exp1")
        }
        slicing.learn(rank, rows(start, stop) | turned)
    vectors = [(name, torch.zeros(3)) for name in ("t1", "t2", "exp1")]
    for name, tensor in (("w", WHOLE), *vectors, ("scalar", torch.tensor(1.0))):
        slicing.regions(name, tensor)
    plan = slicing.plan()
    # 4 and 2 of 6 rows of 16 bytes; three times 12 and 4 bytes whole
    assert (plan.worker_bytes, plan.model_bytes) == ((64 + 40, 32 + 40), 96 + 40)
    assert str(plan) == (
        "a push sends each of an engine's 2 workers its own slice of 1 tensors and 4 whole: 104 of 136 bytes; whole "
        "because vLLM does more than cut or copy, 1 by aten.exp.default, as exp1, 2 by aten.t.default, as t1"
    )
