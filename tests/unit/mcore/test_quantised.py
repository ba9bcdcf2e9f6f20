"""What is kept and made of an FP8 parameter's full numbers; a plain parameter with its methods stands for one."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor

from megatron_rl.device import prepare_megatron

prepare_megatron()

from megatron_rl.layout import ParallelLayout  # noqa: E402
from megatron_rl.mcore import optimizer  # noqa: E402
from megatron_rl.mcore.export import full_tensors  # noqa: E402
from megatron_rl.mcore.quantised import store  # noqa: E402
from megatron_rl.weights.plan import HfFiles, transfer_plan  # noqa: E402
from megatron_rl.weights.weight_map import Head, weight_map  # noqa: E402
from tests.unit.weights.models import dims  # noqa: E402


class Quantised(torch.nn.Parameter):
    """Reads as zeros until it is dequantised; notes who has been, and forgets it with the copy."""

    copies: ClassVar[WeakValueDictionary[int, Tensor]] = WeakValueDictionary()
    made = 0

    def dequantize(self) -> Tensor:  # type: ignore[override]
        plain = torch.ones(self.shape, dtype=self.dtype)
        Quantised.copies[Quantised.made] = plain
        Quantised.made += 1
        return plain


Quantised.__module__ = "transformer_engine.pytorch.tensor.stand_in"


def test_a_push_makes_plain_numbers_of_one_parameter_at_a_time() -> None:
    weights = weight_map(dims(), Head.TOKEN)
    plan = transfer_plan(weights, ParallelLayout(), HfFiles())
    shapes = {tensor.entry.megatron: tensor.moves[0].source.shape for tensor in plan.tensors}
    mine = {name: Quantised(torch.zeros(shape)) for name, shape in shapes.items()}
    seen = set()
    for name, tensor in full_tensors(mine, plan, ParallelLayout(), rank=0):
        assert tensor.eq(1).all()
        assert len(Quantised.copies) <= 2  # this one's, and that before it until its last piece is dropped
        seen.add(name)
        del tensor
    assert seen == weights.hf_names
    assert Quantised.made == len(mine) < len(seen)  # fused ones too, not once for each piece


def test_what_backward_passes_read_of_fp8_parameters_is_made_anew_when_they_are_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []
    plain, quantised = torch.nn.Parameter(torch.zeros(2)), Quantised(torch.zeros(2))

    def chunk(overlap: bool) -> Any:
        return SimpleNamespace(
            ddp_config=SimpleNamespace(overlap_param_gather=overlap),
            start_param_sync=lambda force_sync: done.append(force_sync),
            parameters=lambda: iter([plain, quantised]),
        )

    monkeypatch.setattr(optimizer, "is_float8tensor", lambda tensor: isinstance(tensor, Quantised))
    monkeypatch.setattr(optimizer, "post_all_gather_processing", done.append)
    chunks = [chunk(overlap=False), chunk(overlap=True)]
    optimizer.gather_parameters(optimizer.Training(chunks=chunks, optimizer=None, scheduler=None))
    assert done[0] is True
    assert [id(parameter) for parameter in done[1]] == [id(quantised)]
    assert len(done) == 2


def test_the_numbers_that_a_layer_was_made_with_go_when_those_of_the_model_come() -> None:
    parameter: Any = torch.nn.Parameter(torch.zeros(3))
    # as Transformer Engine attaches them
    parameter._high_precision_init_val = torch.zeros(3)

    def clear(self: Any) -> None:
        del self._high_precision_init_val

    parameter.get_high_precision_init_val = MethodType(lambda self: self._high_precision_init_val, parameter)
    parameter.clear_high_precision_init_val = MethodType(clear, parameter)
    for values in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])):
        store(parameter, values)
        assert not hasattr(parameter, "_high_precision_init_val")
        assert torch.equal(parameter.get_high_precision_init_val(), values)
        assert torch.equal(parameter.detach(), values)
    parameter.clear_high_precision_init_val()
    assert parameter.get_high_precision_init_val() is None
