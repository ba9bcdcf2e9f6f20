"""Where states lie that megatron-core gathers; plain objects stand for its gradient buffers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.device import prepare_megatron

prepare_megatron()

from megatron_rl.mcore.checkpoint import _ranges_without_padding, _rounds_to  # noqa: E402
from megatron_rl.mcore.optimizer import Training  # noqa: E402


def buffer() -> Any:
    """Three buckets; parameters begin at multiples of 64, buckets at multiples of 128."""
    return SimpleNamespace(
        param_index_map={"bias": (0, 1, 0), "norm": (64, 96, 0), "qkv": (128, 328, 1), "embedding": (384, 500, 2)},
        bucket_indices=[(0, 128), (128, 384), (384, 512)],
        buckets=[SimpleNamespace(numel_unpadded=count) for count in (96, 200, 116)],
    )


def as_released(packed: Tensor, ranges: dict[str, tuple[int, int, int]], padding: list[int]) -> dict[str, Tensor]:
    return {name: packed[start:end] for name, (start, end, _) in ranges.items()}


def as_mended(packed: Tensor, ranges: dict[str, tuple[int, int, int]], padding: list[int]) -> dict[str, Tensor]:
    before = {bucket: sum(padding[:bucket]) for bucket in range(len(padding))}
    return {name: packed[start - before[index] : end - before[index]] for name, (start, end, index) in ranges.items()}


@pytest.mark.parametrize("cut", [as_released, as_mended])
def test_gathered_states_are_cut_right_by_releases_that_take_padding_off_and_by_those_that_do_not(cut: Any) -> None:
    dense, experts = buffer(), buffer()
    training: Any = SimpleNamespace(chunks=[SimpleNamespace(buffers=[dense], expert_parallel_buffers=[experts])])
    gathered = torch.arange(512.0)
    packed = torch.cat([gathered[0:96], gathered[128:328], gathered[384:500]])
    ranges = dense.param_index_map
    with _ranges_without_padding(training):
        for each in (dense, experts):
            found = cut(packed, each.param_index_map, [32, 56, 12])
            assert list(found) == list(ranges)
            for name, (start, end, _) in ranges.items():
                torch.testing.assert_close(found[name], gathered[start:end], rtol=0, atol=0)
    assert dense.param_index_map is ranges
    assert experts.param_index_map == ranges


def test_ranges_are_put_back_where_states_cannot_be_described() -> None:
    dense = buffer()
    ranges = dense.param_index_map
    training = Training(
        chunks=[SimpleNamespace(buffers=[dense], expert_parallel_buffers=[])], optimizer=None, scheduler=None
    )
    with pytest.raises(KeyError), _ranges_without_padding(training):
        raise KeyError
    assert dense.param_index_map is ranges


class Quantised(torch.nn.Parameter):
    """Reads as zeros until it is dequantised."""

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return torch.linspace(-1, 1, self.numel(), dtype=self.dtype).view(self.shape)


Quantised.__module__ = "transformer_engine.pytorch.tensor.stand_in"


def test_an_fp8_parameter_may_differ_from_its_main_weight_by_its_rounding_and_no_more() -> None:
    parameter = Quantised(torch.zeros(8, 64, dtype=torch.bfloat16))
    main = parameter.dequantize().float()
    rounding = 1 + torch.tensor([1 / 16, -1 / 16]).repeat(8, 32)
    plain = parameter.dequantize()  # as a run without FP8 parameters loads it
    for weights in (parameter, plain):
        assert _rounds_to(main * rounding, weights, in_fp8=True)
        assert not _rounds_to(main.flatten().roll(64).view(8, 64), weights, in_fp8=True)
    assert _rounds_to(main * (1 + 2**-10), plain, in_fp8=False)
    assert not _rounds_to(main * rounding, plain, in_fp8=False)
